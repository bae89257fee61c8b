"""Random decoders of any shape, in memory and as model folders, and steps for them."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.support.engines import TINY, random_weights
from workers.engine.native.batch import StepBatch
from workers.engine.native.config import ModelConfig
from workers.engine.native.model import NativeModel
from workers.engine.native.runner_cpu import CpuRunner
from workers.engine.native.runner_torch import TorchRunner

CPU = torch.device("cpu")


def shaped(**changes: Any) -> ModelConfig:
    """TINY with some sizes changed."""
    return replace(TINY, **changes)


def random_model(config: ModelConfig, dtype: torch.dtype, kernels: str) -> NativeModel:
    """The same weights whatever the kernels."""
    weights = random_weights(config, dtype)
    runner = CpuRunner(config, weights, dtype) if kernels == "cpu" else TorchRunner(config, weights, CPU)
    return NativeModel(config, runner, dtype, CPU)


def step(pieces: Sequence[tuple[Sequence[int], int, Sequence[int]]], block_size: int = 16) -> StepBatch:
    """From (tokens, context, blocks) of each sequence; logits of all rows."""
    tokens: list[int] = []
    positions: list[int] = []
    starts = [0]
    slots: list[int] = []
    for new, context, blocks in pieces:
        span = range(context, context + len(new))
        tokens += new
        positions += span
        slots += [blocks[at // block_size] * block_size + at % block_size for at in span]
        starts.append(len(tokens))
    width = max(len(blocks) for _, _, blocks in pieces)
    return StepBatch(
        token_ids=torch.tensor(tokens),
        positions=torch.tensor(positions),
        slots=torch.tensor(slots),
        query_starts=torch.tensor(starts, dtype=torch.int32),
        context_lengths=torch.tensor([context for _, context, _ in pieces], dtype=torch.int32),
        block_tables=torch.tensor([[*blocks, *[0] * (width - len(blocks))] for _, _, blocks in pieces]).int(),
        logit_rows=torch.arange(len(tokens)),
    )


def folder_tensors(config: ModelConfig = TINY) -> dict[str, Tensor]:
    """A decoder's tensors under the names a model folder gives them, float32."""
    weights = random_weights(config, torch.float32)
    head, inner = config.head_dim, config.intermediate_size
    widths = [config.num_heads * head, config.num_kv_heads * head, config.num_kv_heads * head]
    tensors = {
        "model.embed_tokens.weight": weights.embedding,
        "model.norm.weight": weights.final_norm.clone(),
        "lm_head.weight": weights.head,
    }
    for index, layer in enumerate(weights.layers):
        prefix = f"model.layers.{index}."
        assert layer.qkv_bias is not None
        for name, weight, bias in zip("qkv", layer.qkv.split(widths), layer.qkv_bias.split(widths), strict=True):
            tensors[f"{prefix}self_attn.{name}_proj.weight"] = weight.contiguous()
            tensors[f"{prefix}self_attn.{name}_proj.bias"] = bias.contiguous()
        for name, weight in zip(("gate", "up"), layer.gate_up.split(inner), strict=True):
            tensors[f"{prefix}mlp.{name}_proj.weight"] = weight.contiguous()
        tensors[f"{prefix}self_attn.o_proj.weight"] = layer.output
        tensors[f"{prefix}mlp.down_proj.weight"] = layer.down
        tensors[f"{prefix}input_layernorm.weight"] = layer.input_norm.clone()
        tensors[f"{prefix}post_attention_layernorm.weight"] = layer.post_norm.clone()
    return tensors


def config_document(config: ModelConfig = TINY, **changes: Any) -> dict[str, Any]:
    """Its config.json, as a Qwen2 model (the one with biases)."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "eos_token_id": 1,
    } | changes


def write_folder(
    folder: Path, tensors: dict[str, Tensor] | None = None, document: dict[str, Any] | None = None
) -> Path:
    """A model folder without a tokenizer."""
    (folder / "config.json").write_text(json.dumps(document or config_document()))
    save_file(tensors or folder_tensors(), folder / "model.safetensors")
    return folder
