"""Tensors of a model folder, by their role in the decoder."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from workers.engine.native.config import ModelConfig, ModelFolderError

INDEX = "model.safetensors.index.json"
PLAIN_TYPES = ("F64", "F32", "F16", "BF16")


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
    """A whole decoder. `layers` of a folder are read anew at each access: who packs them never holds two copies."""

    embedding: Tensor  # [vocabulary, hidden]
    layers: Sequence[LayerWeights]
    final_norm: Tensor
    head: Tensor  # [vocabulary, hidden]; the embedding itself where the two are tied


def read_weights(folder: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> ModelWeights:
    """Open a folder's *.safetensors files and check that they hold the model.

    Raises ModelFolderError if a file is missing or broken, or a tensor missing, quantised or of the wrong shape.
    """
    reader = _Reader(folder, dtype, device)
    hidden, vocabulary = config.hidden_size, config.vocab_size
    embedding = reader.get("model.embed_tokens.weight", (vocabulary, hidden))
    layers = _Layers(reader, config)
    layers.check()
    return ModelWeights(
        embedding=embedding,
        layers=layers,
        final_norm=reader.get("model.norm.weight", (hidden,)),
        head=embedding if config.tied_embeddings else reader.get("lm_head.weight", (vocabulary, hidden)),
    )


class _Layers(Sequence[LayerWeights]):
    """The layers of a folder."""

    def __init__(self, reader: "_Reader", config: ModelConfig) -> None:
        hidden, head, inner = config.hidden_size, config.head_dim, config.intermediate_size
        queries, keys = config.num_heads * head, config.num_kv_heads * head
        self._reader = reader
        self._count = config.num_layers
        self._required: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (queries, hidden),
            "self_attn.k_proj.weight": (keys, hidden),
            "self_attn.v_proj.weight": (keys, hidden),
            "self_attn.o_proj.weight": (hidden, queries),
            "post_attention_layernorm.weight": (hidden,),
            "mlp.gate_proj.weight": (inner, hidden),
            "mlp.up_proj.weight": (inner, hidden),
            "mlp.down_proj.weight": (hidden, inner),
        }
        biases = {f"self_attn.{name}_proj.bias": (size,) for name, size in (("q", queries), ("k", keys), ("v", keys))}
        norms = {"self_attn.q_norm.weight": (head,), "self_attn.k_norm.weight": (head,)}
        if config.family in ("qwen2", "qwen3"):
            self._required |= biases if config.family == "qwen2" else norms
        self._optional = {"self_attn.o_proj.bias": (hidden,)} | biases | norms

    def check(self) -> None:
        for layer in range(self._count):
            for name, shape in self._required.items():
                self._reader.require(f"model.layers.{layer}.{name}", shape)

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> LayerWeights: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[LayerWeights]: ...
    def __getitem__(self, index: int | slice) -> LayerWeights | Sequence[LayerWeights]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(self._count))]
        if not 0 <= index < self._count:
            raise IndexError(index)
        prefix = f"model.layers.{index}."

        def get(name: str) -> Tensor:
            return self._reader.get(prefix + name, self._required[name])

        def find(name: str) -> Tensor | None:
            return self._reader.find(prefix + name, self._optional[name])

        biases = [find(f"self_attn.{name}_proj.bias") for name in "qkv"]
        present = [bias for bias in biases if bias is not None]
        if len(present) not in (0, len(biases)):
            raise ModelFolderError(f"{self._reader.folder}: {prefix}self_attn has a bias for some of q, k, v, not all")
        return LayerWeights(
            input_norm=get("input_layernorm.weight"),
            qkv=torch.cat([get(f"self_attn.{name}_proj.weight") for name in "qkv"]),
            qkv_bias=torch.cat(present) if present else None,
            q_norm=find("self_attn.q_norm.weight"),
            k_norm=find("self_attn.k_norm.weight"),
            output=get("self_attn.o_proj.weight"),
            output_bias=find("self_attn.o_proj.bias"),
            post_norm=get("post_attention_layernorm.weight"),
            gate_up=torch.cat([get(f"mlp.{name}_proj.weight") for name in ("gate", "up")]),
            down=get("mlp.down_proj.weight"),
        )


class _Reader:
    """Tensors by name, with their expected shapes. Files stay open, mapped into memory, as long as the reader lives."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        self.folder = folder
        self._dtype = dtype
        self._device = device
        self._files: dict[str, Any] = {}  # by the names of their tensors
        for path in _weight_files(folder):
            try:
                file = safe_open(str(path), "pt")
                self._files |= dict.fromkeys(file.keys(), file)
            except (SafetensorError, OSError) as error:
                raise ModelFolderError(f"{path}: is truncated or not a safetensors file: {error}") from error

    def find(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        """A copy in the model's type, since the file may be replaced while the model is in use; None if not there."""
        if name not in self._files:
            return None
        self._check(name, shape)
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor.to(device=self._device, dtype=self._dtype, copy=True)

    def get(self, name: str, shape: tuple[int, ...]) -> Tensor:
        self.require(name, shape)
        tensor = self.find(name, shape)
        assert tensor is not None
        return tensor

    def require(self, name: str, shape: tuple[int, ...]) -> None:
        if name not in self._files:
            raise ModelFolderError(f"{self.folder}: tensor {name} is missing from the *.safetensors files")
        self._check(name, shape)

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        """By the file's header; reads no tensor."""
        entry = self._files[name].get_slice(name)
        if tuple(entry.get_shape()) != shape:
            raise ModelFolderError(
                f"{self.folder}: {name} has shape {tuple(entry.get_shape())}, config.json says {shape}"
            )
        if entry.get_dtype() not in PLAIN_TYPES:
            raise ModelFolderError(
                f"{self.folder}: {name} is of type {entry.get_dtype()}; "
                f"quantised models are not supported, expected one of {', '.join(PLAIN_TYPES)}"
            )


def _weight_files(folder: Path) -> list[Path]:
    """The files the folder's index names, or model.safetensors, or else every *.safetensors file."""
    index, single = folder / INDEX, folder / "model.safetensors"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelFolderError(f"{index}: expected JSON with a weight_map from tensors to files") from error
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ModelFolderError(f"{folder}: {INDEX} names {', '.join(missing)}, which is not there")
        return [folder / name for name in names]
    paths = [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
    if not paths:
        raise ModelFolderError(f"{folder}: has no *.safetensors file")
    return paths
