"""Chat templates as Hugging Face folders carry them, and text that comes back as it went."""

import json
import shutil
from pathlib import Path

import pytest

from router.served_model import ServedModel
from tidemill.core.settings import ModelSettings
from tidemill.core.text import TokenizerError
from tidemill.errors import InvalidRequest
from tidemill.types import Message

CHAT = [Message("user", "hello")]


def served(folder: Path, models: Path, template: object = None, file: str | None = None) -> ServedModel:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(models / "target" / name, folder / name)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if file is not None:
        (folder / "chat_template.jinja").write_text(file)
    return ServedModel(ModelSettings(path=folder, name="m"), 10_000)


def laid_out(model: ServedModel) -> str:
    return str(model.tokenizer.decode(model.encode_chat(CHAT), skip_special_tokens=False))


def test_where_templates_are_found(tmp_path: Path, models: Path) -> None:
    said = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert laid_out(served(tmp_path, models, said)) == "hello"
    several = [{"name": "tools", "template": "no"}, {"name": "default", "template": said + "!"}]
    assert laid_out(served(tmp_path, models, several)) == "hello!"
    assert laid_out(served(tmp_path, models, "no", file=said + "?")) == "hello?", "the file goes first"


def test_no_template(tmp_path: Path, models: Path) -> None:
    model = served(tmp_path, models)
    assert not model.card.has_chat_template
    with pytest.raises(InvalidRequest, match="has no chat template; use Generate"):
        model.encode_chat(CHAT)


def test_what_templates_use(tmp_path: Path, models: Path) -> None:
    loop = "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{% endfor %}"
    text = loop + "{{ messages | tojson }}{{ strftime_now('%Y') | length }}"
    assert laid_out(served(tmp_path, models, text)) == '[{"role": "user", "content": "hello"}]4'


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses these messages: roles must alternate"),
        ("{{ messages[0].nothing.there }}", "cannot lay out these messages"),
        ("{{ messages + 1 }}", "cannot lay out these messages"),
        ("{{ messages.append(1) }}", "cannot lay out these messages"),  # the sandbox: nothing may be changed
        ("{{ ''.__class__.__mro__ }}", "cannot lay out these messages"),
    ],
)
def test_templates_that_refuse_or_fail(tmp_path: Path, models: Path, template: str, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        served(tmp_path, models, template).encode_chat(CHAT)


def test_a_template_that_is_none(tmp_path: Path, models: Path) -> None:
    with pytest.raises(TokenizerError, match="chat template cannot be compiled"):
        served(tmp_path, models, "{% for %}")


def test_text_goes_through_the_same_tokenizer_either_way(models: Path, prompts: list[str]) -> None:
    model = ServedModel(ModelSettings(path=models / "target"), 10_000)
    for prompt in prompts[:10]:
        ids = model.encode(prompt)
        assert ids == model.tokenizer.encode(prompt).ids
        stream = model.text_stream(())
        assert stream.push(ids) + stream.finish() == prompt
    assert model.card.context_length == 2048
    assert ServedModel(ModelSettings(path=models / "target"), 512).card.context_length == 512
