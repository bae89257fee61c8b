"""What config.json of a dense Llama, Mistral, Qwen2 or Qwen3 folder says, checked."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
# Rope types that are supported, and what each needs in config.json.
ROPE_OPTIONS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


class ModelFolderError(ValueError):
    """A model folder cannot be served; the message names the file and what was expected."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shape of a decoder, and what ends its texts."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any]
    tied_embeddings: bool
    eos_token_ids: frozenset[int]

    def cosines(self, device: torch.device) -> Tensor:
        """Rotary table [context_length, head_dim]: cosines of half the channels, then their sines; float32."""
        angles = torch.outer(torch.arange(self.context_length, dtype=torch.float32), self._frequencies())
        return torch.cat([angles.cos(), angles.sin()], -1).contiguous().to(device)

    def _frequencies(self) -> Tensor:
        """Radians per position of each channel pair; with Llama 3's stretching of the slow ones if asked for."""
        plain = self.rope_theta ** -(torch.arange(0, self.head_dim, 2, dtype=torch.float32) / self.head_dim)
        kind = self.rope_scaling.get("rope_type", "default")
        if kind == "default":
            return plain
        factor = float(self.rope_scaling["factor"])
        if kind == "linear":
            return plain / factor
        low, high = self.rope_scaling["low_freq_factor"], self.rope_scaling["high_freq_factor"]
        turns = self.rope_scaling["original_max_position_embeddings"] * plain / (2 * math.pi)
        smooth = ((turns - low) / (high - low)).clamp(0, 1)
        return plain * (smooth + (1 - smooth) / factor)


def read_config(folder: Path) -> ModelConfig:
    """Raises ModelFolderError for a missing folder or file, bad JSON, and whatever the engine cannot run."""
    if not folder.is_dir():
        raise ModelFolderError(
            f"{folder}: no such folder; expected one with config.json, *.safetensors, tokenizer.json"
        )
    config = _read_json(folder / "config.json")
    generation_path = folder / "generation_config.json"
    generation = _read_json(generation_path) if generation_path.is_file() else {}
    architecture = (config.get("architectures") or ["none"])[0]
    if architecture not in ARCHITECTURES:
        raise ModelFolderError(
            f"{folder}: architecture {architecture} is not supported; the native engine runs {', '.join(ARCHITECTURES)}"
        )
    try:
        return _checked(folder, ARCHITECTURES[architecture], config, generation)
    except KeyError as error:
        raise ModelFolderError(f"{folder / 'config.json'}: has no {error.args[0]!r}") from error


def _checked(folder: Path, family: str, config: dict[str, Any], generation: dict[str, Any]) -> ModelConfig:
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    _refuse_unsupported(folder, family, config, rope)
    sizes = {name: _size(folder, name, config[name]) for name in SIZES}
    heads, hidden = sizes["num_attention_heads"], sizes["hidden_size"]
    kv_heads = _size(folder, "num_key_value_heads", config.get("num_key_value_heads") or heads)
    head_dim = _size(folder, "head_dim", config.get("head_dim") or hidden // heads)
    if heads % kv_heads:
        raise ModelFolderError(f"{folder}: {heads} heads are no multiple of {kv_heads} KV heads")
    if head_dim % 2:
        raise ModelFolderError(f"{folder}: rotary positions need an even head_dim, not {head_dim}")
    eos = generation.get("eos_token_id", config.get("eos_token_id"))
    return ModelConfig(
        family=family,
        vocab_size=sizes["vocab_size"],
        hidden_size=hidden,
        intermediate_size=sizes["intermediate_size"],
        num_layers=sizes["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        context_length=sizes["max_position_embeddings"],
        rms_norm_eps=float(config["rms_norm_eps"]),
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        rope_scaling=rope,
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        eos_token_ids=frozenset(eos if isinstance(eos, list) else [] if eos is None else [eos]),
    )


def _refuse_unsupported(folder: Path, family: str, config: dict[str, Any], rope: dict[str, Any]) -> None:
    """Raises for what would otherwise be computed wrongly without a word."""
    kind, activation = rope["rope_type"], config.get("hidden_act", "silu")
    if kind not in ROPE_OPTIONS:
        raise ModelFolderError(f"{folder}: rope type {kind!r} is not supported ({', '.join(ROPE_OPTIONS)})")
    missing = [option for option in ROPE_OPTIONS[kind] if option not in rope]
    if missing:
        raise ModelFolderError(f"{folder}: rope type {kind!r} needs {', '.join(missing)} in config.json")
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ModelFolderError(f"{folder}: rotary positions on a part of the channels are not supported")
    window = config.get("sliding_window")
    if window and config.get("use_sliding_window", family == "mistral") and window < config["max_position_embeddings"]:
        raise ModelFolderError(f"{folder}: sliding-window attention ({window} tokens) is not supported")
    if activation != "silu":
        raise ModelFolderError(f"{folder}: activation {activation!r} is not supported (silu)")
    if config.get("mlp_bias"):
        raise ModelFolderError(f"{folder}: biases in the feed-forward layers (mlp_bias) are not supported")
    if config.get("quantization_config"):
        raise ModelFolderError(f"{folder}: quantised models are not supported by the native engine")


def _size(folder: Path, name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelFolderError(f"{folder / 'config.json'}: {name} is {value!r}, expected a positive whole number")
    return value


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelFolderError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ModelFolderError(f"{path}: is not JSON: {error}") from error
    if not isinstance(document, dict):
        raise ModelFolderError(f"{path}: expected a JSON object")
    return document
