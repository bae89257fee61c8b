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
    if rope["rope_type"] not in ("default", "linear", "llama3"):
        raise ModelFolderError(f"{folder}: rope type {rope['rope_type']!r} is not supported (default, linear, llama3)")
    window = config.get("sliding_window")
    if window and config.get("use_sliding_window", family == "mistral") and window < config["max_position_embeddings"]:
        raise ModelFolderError(f"{folder}: sliding-window attention ({window} tokens) is not supported")
    if config.get("hidden_act", "silu") != "silu":
        raise ModelFolderError(f"{folder}: activation {config['hidden_act']!r} is not supported (silu)")
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    if heads % kv_heads:
        raise ModelFolderError(f"{folder}: {heads} heads are no multiple of {kv_heads} KV heads")
    eos = generation.get("eos_token_id", config.get("eos_token_id"))
    return ModelConfig(
        family=family,
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        context_length=config["max_position_embeddings"],
        rms_norm_eps=config["rms_norm_eps"],
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        rope_scaling=rope,
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        eos_token_ids=frozenset(eos if isinstance(eos, list) else [] if eos is None else [eos]),
    )


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
