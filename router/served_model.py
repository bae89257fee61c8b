"""What the router needs of the served model's folder: tokenizer, chat template, sizes."""

import json
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tidemill.core.settings import EmulatedSettings, ModelSettings
from tidemill.core.text import TextStream, TokenizerError, load_tokenizer
from tidemill.errors import InvalidRequest
from tidemill.types import Message, ModelCard


class ServedModel:
    """Text in, tokens out, and the other way round."""

    def __init__(self, settings: ModelSettings, max_context: int, emulated: EmulatedSettings | None = None) -> None:
        """Raises TokenizerError for a folder that cannot be served. `max_context`: what a worker's KV pool holds.

        `emulated`: the sizes of the model that is pretended instead.
        """
        self.tokenizer = load_tokenizer(settings.path)
        config = _read_json(settings.path / "config.json")
        self._tokenizer_config = _read_json(settings.path / "tokenizer_config.json")
        self._template = _compiled(self._chat_template(settings.path))
        context_length = (emulated and emulated.context_length) or int(config["max_position_embeddings"])
        vocab_size = (emulated and emulated.vocab_size) or int(config["vocab_size"])
        self.card = ModelCard(
            settings.served_name, min(context_length, max_context), vocab_size, self._template is not None
        )

    def _chat_template(self, folder: Path) -> str | None:
        separate = folder / "chat_template.jinja"
        if separate.is_file():
            return separate.read_text(encoding="utf-8")
        template = self._tokenizer_config.get("chat_template")
        if isinstance(template, list):  # several under names
            named = {each["name"]: each["template"] for each in template}
            template = named.get("default")
        return template if isinstance(template, str) else None

    def encode(self, text: str) -> list[int]:
        """With the special tokens the model expects around a prompt."""
        return self._ids(text, special=True)

    def encode_chat(self, messages: list[Message]) -> list[int]:
        """Raises InvalidRequest if the model has no template, or the template does not take these messages."""
        if self._template is None:
            raise InvalidRequest(f"model {self.card.name!r} has no chat template; use Generate")

        try:
            text = self._template.render(
                messages=[{"role": each.role, "content": each.content} for each in messages],
                add_generation_prompt=True,
                bos_token=_text_of(self._tokenizer_config.get("bos_token")),
                eos_token=_text_of(self._tokenizer_config.get("eos_token")),
            )
        except (TemplateError, TypeError) as error:
            raise InvalidRequest(f"the chat template cannot lay out these messages: {error}") from error
        return self._ids(text, special=False)

    def _ids(self, text: str, *, special: bool) -> list[int]:
        """A batch of one: unlike `encode`, it lets other threads run, and keeps no offsets."""
        return list(self.tokenizer.encode_batch_fast([text], add_special_tokens=special)[0].ids)

    def text_stream(self, stop: tuple[str, ...]) -> TextStream:
        return TextStream(self.tokenizer, stop)


def _compiled(template: str | None) -> Template | None:
    """With what Hugging Face templates use. They come with the model, hence the sandbox. Raises TokenizerError."""

    def refuse(message: str) -> None:
        raise InvalidRequest(f"the chat template refuses these messages: {message}")

    def today(layout: str) -> str:
        return datetime.now().strftime(layout)

    if template is None:
        return None
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals |= {"raise_exception": refuse, "strftime_now": today}
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)  # Jinja's own escapes for HTML
    try:
        return environment.from_string(template)
    except TemplateError as error:
        raise TokenizerError(f"the model's chat template cannot be compiled: {error}") from error


def _text_of(token: Any) -> str:
    """Special tokens are strings, or objects with a `content`."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token or "")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise TokenizerError(f"{path}: is not JSON: {error}") from error
    return document
