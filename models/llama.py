"""A plain Llama in torch, for training: weights carry the names of Hugging Face's LlamaForCausalLM.

RMSNorm, rotary positions (half-rotation layout), grouped-query attention, SwiGLU and a head tied to the embedding, as
in Touvron et al., "LLaMA" (arXiv 2302.13971) and Ainslie et al., "GQA" (arXiv 2305.13245).
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

KeyValues = list[tuple[Tensor, Tensor]]  # per layer: keys and values, each [rows, kv heads, tokens, head size]


@dataclass(frozen=True)
class LlamaConfig:
    """Shape of a model; field names are those of config.json."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = 64
    vocab_size: int = 4096
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    initializer_range: float = 0.02


class RMSNorm(nn.Module):
    """Zhang and Sennrich, "Root Mean Square Layer Normalization" (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Causal grouped-query attention."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.groups = config.num_attention_heads // config.num_key_value_heads
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, past: KeyValues | None, layer: int) -> Tensor:
        rows, length, _ = x.shape
        q = rotate(self.q_proj(x).view(rows, length, -1, self.head_dim).transpose(1, 2), cos, sin)
        k = rotate(self.k_proj(x).view(rows, length, -1, self.head_dim).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(rows, length, -1, self.head_dim).transpose(1, 2)
        if past is not None:
            if layer < len(past):
                k, v = torch.cat([past[layer][0], k], 2), torch.cat([past[layer][1], v], 2)
                past[layer] = (k, v)
            else:
                past.append((k, v))
        k, v = k.repeat_interleave(self.groups, 1), v.repeat_interleave(self.groups, 1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=length > 1)
        return self.o_proj(mixed.transpose(1, 2).reshape(rows, length, -1))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """SwiGLU: Shazeer, "GLU Variants Improve Transformer" (arXiv 2002.05202)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """One pre-norm decoder layer."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, past: KeyValues | None, layer: int) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, past, layer)
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """Everything below the head; its own module so that weights are named `model.…` as Hugging Face does."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Llama(nn.Module):
    """Token ids [rows, tokens] -> logits [rows, tokens, vocabulary]."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        frequencies = config.rope_theta ** -(torch.arange(0, config.head_dim, 2).float() / config.head_dim)
        angles = torch.outer(torch.arange(config.max_position_embeddings).float(), frequencies).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                # Projections into the residual stream start smaller, as in GPT-2.
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                depth_scale = math.sqrt(2 * config.num_hidden_layers) if into_residual else 1.0
                nn.init.normal_(weight, std=config.initializer_range / depth_scale)

    def forward(self, ids: Tensor, past: KeyValues | None = None) -> Tensor:
        """With `past` (empty, or filled by earlier calls) keys and values are kept there; then pass one token a row."""
        start = past[0][0].shape[2] if past else 0
        cos, sin = self.cos[start : start + ids.shape[1]], self.sin[start : start + ids.shape[1]]
        x = self.model.embed_tokens(ids)
        for index, layer in enumerate(self.model.layers):
            x = layer(x, cos, sin, past, index)
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)

    def parameter_count(self) -> int:
        return sum(weight.numel() for weight in self.parameters())


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: Su et al., "RoFormer" (arXiv 2104.09864); the two halves of a head are the pairs."""
    left, right = x.chunk(2, -1)
    return (x * cos + torch.cat([-right, left], -1) * sin).to(x.dtype)


def save_folder(model: Llama, folder: Path, tokenizer_json: str, tokenizer_config: dict[str, object]) -> None:
    """Write a Hugging Face folder (bf16); it replaces `folder` by a rename, so a reader never meets half a file."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **asdict(model.config),
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "use_cache": True,
        "torch_dtype": "bfloat16",
    }
    generation = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "do_sample": True, "temperature": 0.8}
    scratch = folder.parent / ".work"
    fresh, old = scratch / f"{folder.name}.new", scratch / f"{folder.name}.old"
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir(parents=True)
    weights = {name: value.detach().to(torch.bfloat16).contiguous() for name, value in model.state_dict().items()}
    save_file(weights, fresh / "model.safetensors", metadata={"format": "pt"})
    (fresh / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    documents = {"config": config, "generation_config": generation, "tokenizer_config": tokenizer_config}
    for name, document in documents.items():
        (fresh / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def load_folder(folder: Path) -> Llama:
    """A model from a folder written by `save_folder`, in float32 and ready for inference."""
    document = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = Llama(LlamaConfig(**{name: document[name] for name in LlamaConfig.__dataclass_fields__}))
    weights = load_file(folder / "model.safetensors")
    model.load_state_dict({name: value.float() for name, value in weights.items()})
    return model.eval().requires_grad_(False)
