"""Model folders: what is read from them, and what is said of those that cannot be served."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.support.miniatures import CPU, config_document, folder_tensors, random_model, shaped, step, write_folder
from workers.engine.native.config import ModelFolderError, read_config
from workers.engine.native.model import NativeModel
from workers.engine.native.weights import INDEX

BATCH = step([([5, 6, 7, 8, 9], 0, [1])])


def load(folder: Path) -> NativeModel:
    return NativeModel.load(folder, dtype=torch.float32, device=CPU, kernels="torch")


def logits(model: NativeModel) -> Tensor:
    return model.forward(BATCH, model.new_kv(2, 16))


def test_a_folder_gives_the_model_it_was_made_from(tmp_path: Path) -> None:
    assert torch.equal(logits(load(write_folder(tmp_path))), logits(random_model(shaped(), torch.float32, "torch")))


def test_shards_are_read_as_one(tmp_path: Path) -> None:
    whole = logits(load(write_folder(tmp_path)))
    tensors = folder_tensors()
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-1-of-2.safetensors": names[::2], "model-2-of-2.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, tmp_path / file)
    save_file({"model.norm.weight": torch.zeros(3)}, tmp_path / "consolidated.safetensors")  # not in the index
    weight_map = {name: file for file, held in shards.items() for name in held}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert torch.equal(logits(load(tmp_path)), whole)
    (tmp_path / "model-2-of-2.safetensors").unlink()
    with pytest.raises(ModelFolderError, match=r"names model-2-of-2\.safetensors, which is not there"):
        load(tmp_path)


def test_tied_embeddings_need_no_head(tmp_path: Path) -> None:
    tensors = folder_tensors()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    untied = logits(load(write_folder(tmp_path, tensors)))
    del tensors["lm_head.weight"]
    with pytest.raises(ModelFolderError, match=r"lm_head\.weight is missing"):
        load(write_folder(tmp_path, tensors))
    tied = load(write_folder(tmp_path, tensors, config_document(tie_word_embeddings=True)))
    assert torch.equal(logits(tied), untied)


def test_float16_weights_are_converted(tmp_path: Path) -> None:
    tensors = {name: tensor.half() for name, tensor in folder_tensors().items()}
    assert torch.allclose(logits(load(write_folder(tmp_path, tensors))), logits(load(write_folder(tmp_path))), atol=0.1)


def test_ends_of_text_come_from_generation_defaults_first(tmp_path: Path) -> None:
    write_folder(tmp_path)
    assert read_config(tmp_path).eos_token_ids == {1}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    assert read_config(tmp_path).eos_token_ids == {3, 4}


BAD_CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "another architecture": ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not supported"),
    "no architecture": ({"architectures": None}, "architecture none is not supported"),
    "rope type": ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'yarn' is not supported"),
    "rope without its factor": ({"rope_scaling": {"type": "linear"}}, "'linear' needs factor"),
    "llama3 rope without its bounds": (
        {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
        "needs low_freq_factor, high_freq_factor, original_max_position_embeddings",
    ),
    "partial rotation": ({"partial_rotary_factor": 0.5}, "part of the channels"),
    "sliding window": ({"sliding_window": 64, "use_sliding_window": True}, r"sliding-window attention \(64 tokens\)"),
    "Mistral's window": ({"architectures": ["MistralForCausalLM"], "sliding_window": 64}, "sliding-window attention"),
    "activation": ({"hidden_act": "gelu"}, "'gelu' is not supported"),
    "feed-forward biases": ({"mlp_bias": True}, "mlp_bias"),
    "quantised": ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
    "heads that do not divide": ({"num_attention_heads": 5}, "5 heads are no multiple of 2"),
    "odd heads": ({"head_dim": 33}, "even head_dim, not 33"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers is 0, expected a positive whole number"),
    "size that is no number": ({"hidden_size": "64"}, "hidden_size is '64'"),
    "size missing": ({"vocab_size": None}, "vocab_size is None"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_configurations_that_are_refused(name: str, tmp_path: Path) -> None:
    changes, said = BAD_CONFIGS[name]
    write_folder(tmp_path, document=config_document(**changes))
    with pytest.raises(ModelFolderError, match=said):
        load(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": 64, "use_sliding_window": False},  # Qwen2 names a window it does not use
        {"sliding_window": 4096, "use_sliding_window": True},  # wider than the context
        {"architectures": ["MistralForCausalLM"], "sliding_window": None},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        {"partial_rotary_factor": 1.0, "mlp_bias": False},
    ],
)
def test_settings_that_change_nothing_are_taken(changes: dict[str, Any], tmp_path: Path) -> None:
    expected = logits(load(write_folder(tmp_path)))
    assert torch.equal(logits(load(write_folder(tmp_path, document=config_document(**changes)))), expected)


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def truncate_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:50])


def drop(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = folder_tensors()
        del tensors[name]
        save_file(tensors, folder / "model.safetensors")

    return change


def replace(name: str, tensor: Tensor) -> Callable[[Path], None]:
    return lambda folder: save_file(folder_tensors() | {name: tensor}, folder / "model.safetensors")


LAYER = "model.layers.1."
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (truncate, r"model\.safetensors: is truncated or not a safetensors file"),
    "truncated in its header": (truncate_header, "is truncated or not a safetensors file"),
    "empty": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "is truncated"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), r"has no \*\.safetensors file"),
    "no config": (lambda folder: (folder / "config.json").unlink(), r"config\.json: cannot be read"),
    "config no JSON": (lambda folder: (folder / "config.json").write_text("{"), "is not JSON"),
    "config a list": (lambda folder: (folder / "config.json").write_text("[]"), "expected a JSON object"),
    "config not text": (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe{}"), "is not JSON"),
    "a field missing": (lambda folder: (folder / "config.json").write_text(bare_config()), "has no 'rms_norm_eps'"),
    "index no JSON": (lambda folder: (folder / INDEX).write_text("{"), "expected JSON with a weight_map"),
    "index a list": (lambda folder: (folder / INDEX).write_text("[1]"), "expected JSON with a weight_map"),
    "a projection missing": (drop(LAYER + "mlp.up_proj.weight"), r"model\.layers\.1\.mlp\.up_proj\.weight is missing"),
    "a bias missing": (drop(LAYER + "self_attn.k_proj.bias"), r"k_proj\.bias is missing"),
    "embedding missing": (drop("model.embed_tokens.weight"), r"embed_tokens\.weight is missing"),
    "another shape": (
        replace(LAYER + "mlp.down_proj.weight", torch.zeros(64, 95)),
        r"down_proj\.weight has shape \(64, 95\), config\.json says \(64, 96\)",
    ),
    "quantised": (
        replace(LAYER + "mlp.down_proj.weight", torch.zeros(64, 96, dtype=torch.int8)),
        "is of type I8; quantised models are not supported",
    ),
}


def bare_config() -> str:
    document = config_document()
    del document["rms_norm_eps"]
    return json.dumps(document)


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folders(name: str, tmp_path: Path) -> None:
    harm, said = BROKEN[name]
    harm(write_folder(tmp_path))
    with pytest.raises(ModelFolderError, match=said):
        load(tmp_path)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match="no such folder"):
        load(tmp_path / "nowhere")


def test_more_layers_than_tensors(tmp_path: Path) -> None:
    write_folder(tmp_path, document=config_document(num_hidden_layers=3))
    with pytest.raises(ModelFolderError, match=r"model\.layers\.2\.input_layernorm\.weight is missing"):
        load(tmp_path)
