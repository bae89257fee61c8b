"""Tensors of a model folder, by their role in the decoder."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from workers.engine.native.config import ModelConfig, ModelFolderError


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One decoder layer. Projections that share their input are stacked: q, k, v; gate, up. Shapes [out, in]."""

    input_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None  # Qwen3: [head_dim]
    k_norm: Tensor | None
    output: Tensor
    output_bias: Tensor | None
    post_norm: Tensor
    gate_up: Tensor
    down: Tensor


@dataclass(frozen=True, slots=True)
class ModelWeights:
    """A whole decoder."""

    embedding: Tensor  # [vocabulary, hidden]
    layers: tuple[LayerWeights, ...]
    final_norm: Tensor
    head: Tensor  # [vocabulary, hidden]; the embedding itself where the two are tied


def read_weights(folder: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> ModelWeights:
    """Read every *.safetensors of the folder. Raises ModelFolderError if one is broken or a tensor is missing."""
    tensors: dict[str, Tensor] = {}
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise ModelFolderError(f"{folder}: has no *.safetensors file")
    for path in paths:
        try:
            with safe_open(str(path), "pt") as file:
                for name in file.keys():  # noqa: SIM118 (a safe_open is no mapping)
                    tensors[name] = file.get_tensor(name).to(device=device, dtype=dtype)
        except (SafetensorError, OSError) as error:
            raise ModelFolderError(f"{path}: is truncated or not a safetensors file: {error}") from error
    reader = _Reader(folder, tensors)
    hidden, vocabulary = config.hidden_size, config.vocab_size
    embedding = reader.get("model.embed_tokens.weight", vocabulary, hidden)
    return ModelWeights(
        embedding=embedding,
        layers=tuple(_read_layer(reader, f"model.layers.{i}.", config) for i in range(config.num_layers)),
        final_norm=reader.get("model.norm.weight", hidden),
        head=embedding if config.tied_embeddings else reader.get("lm_head.weight", vocabulary, hidden),
    )


def _read_layer(reader: "_Reader", prefix: str, config: ModelConfig) -> LayerWeights:
    hidden, head, inner = config.hidden_size, config.head_dim, config.intermediate_size
    queries, keys = config.num_heads * head, config.num_kv_heads * head
    attention = prefix + "self_attn."
    widths = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
    biases = [reader.find(f"{attention}{name}.bias", width) for name, width in widths.items()]
    return LayerWeights(
        input_norm=reader.get(prefix + "input_layernorm.weight", hidden),
        qkv=torch.cat([reader.get(f"{attention}{name}.weight", width, hidden) for name, width in widths.items()]),
        qkv_bias=torch.cat([bias for bias in biases if bias is not None]) if biases[0] is not None else None,
        q_norm=reader.find(attention + "q_norm.weight", head),
        k_norm=reader.find(attention + "k_norm.weight", head),
        output=reader.get(attention + "o_proj.weight", hidden, queries),
        output_bias=reader.find(attention + "o_proj.bias", hidden),
        post_norm=reader.get(prefix + "post_attention_layernorm.weight", hidden),
        gate_up=torch.cat([reader.get(f"{prefix}mlp.{name}_proj.weight", inner, hidden) for name in ("gate", "up")]),
        down=reader.get(prefix + "mlp.down_proj.weight", hidden, inner),
    )


class _Reader:
    """Tensors by name, with their expected shapes."""

    def __init__(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        self._folder = folder
        self._tensors = tensors

    def find(self, name: str, *shape: int) -> Tensor | None:
        tensor = self._tensors.get(name)
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ModelFolderError(f"{self._folder}: {name} has shape {tuple(tensor.shape)}, config.json says {shape}")
        return tensor

    def get(self, name: str, *shape: int) -> Tensor:
        tensor = self.find(name, *shape)
        if tensor is None:
            raise ModelFolderError(f"{self._folder}: tensor {name} is missing from the *.safetensors files")
        return tensor
