"""Runs the decoder with stock torch operators: where no compiler is found, and on CUDA.

Every matrix product has a shape that does not depend on the batch (rows in tiles of 16, keys in tiles of 64 counted
from position 0), so a row's result does not depend on what shares the step, as with the compiled kernels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.engine.native.batch import StepBatch
from workers.engine.native.config import ModelConfig
from workers.engine.native.weights import LayerWeights, ModelWeights

ROWS = 16
KEYS = 64


def tiled_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [rows, in] -> [rows, out], in tiles of exactly ROWS rows."""
    rows = x.shape[0]
    padded = F.pad(x, (0, 0, 0, -rows % ROWS))
    return torch.cat([F.linear(tile, weight, bias) for tile in padded.split(ROWS)])[:rows]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Over the last dimension; rounds to the model's type before the weight, as Hugging Face does."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def rotate(x: Tensor, cosines: Tensor) -> Tensor:
    """x [rows, heads, head_dim]; cosines [rows, head_dim]: cosines of half the channels, then sines."""
    cos, sin = (part[:, None] for part in cosines.chunk(2, -1))
    left, right = x.float().chunk(2, -1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1).to(x.dtype)


class TorchRunner:
    """Same interface and same KV pool shape as CpuRunner; keys lie in rows inside a block."""

    packing = "rows"

    def __init__(self, config: ModelConfig, weights: ModelWeights, device: torch.device) -> None:
        self._config = config
        self._weights = weights
        self._cosines = config.cosines(device)
        self._device = device

    def forward(self, batch: StepBatch, kv: Tensor) -> Tensor:
        """Float32 logits [R, vocabulary]; keys and values of all rows are written to `kv`."""
        starts, context = batch.query_starts.tolist(), batch.context_lengths.tolist()
        tables, positions = batch.block_tables.to(self._device), batch.positions.to(self._device)
        slots = batch.slots.to(self._device)
        residual = self._weights.embedding[batch.token_ids.to(self._device)]
        cosines = self._cosines[positions]
        eps = self._config.rms_norm_eps
        for layer, pool in zip(self._weights.layers, kv, strict=True):
            q = self._project_and_keep(rms_norm(residual, layer.input_norm, eps), layer, cosines, slots, pool)
            mixed = torch.cat(
                [self._attend(q[starts[b] : starts[b + 1]], context[b], tables[b], pool) for b in range(len(context))]
            )
            residual = residual + tiled_linear(mixed, layer.output, layer.output_bias)
            gate, up = tiled_linear(rms_norm(residual, layer.post_norm, eps), layer.gate_up).chunk(2, -1)
            residual = residual + tiled_linear(F.silu(gate) * up, layer.down)
        wanted = rms_norm(residual[batch.logit_rows.to(self._device)], self._weights.final_norm, eps)
        return tiled_linear(wanted, self._weights.head).float()

    def _project_and_keep(self, x: Tensor, layer: LayerWeights, cosines: Tensor, slots: Tensor, pool: Tensor) -> Tensor:
        """Rotated queries [rows, heads, head_dim]; keys and values go to their slots of the layer's pool."""
        heads, kv_heads, size = self._config.num_heads, self._config.num_kv_heads, self._config.head_dim
        qkv = tiled_linear(x, layer.qkv, layer.qkv_bias).view(-1, heads + 2 * kv_heads, size)
        q, k, v = qkv.split([heads, kv_heads, kv_heads], 1)
        if layer.q_norm is not None and layer.k_norm is not None:
            q = rms_norm(q, layer.q_norm, self._config.rms_norm_eps)
            k = rms_norm(k, layer.k_norm, self._config.rms_norm_eps)
        block_size = pool.shape[3]
        block, offset = slots // block_size, slots % block_size
        pool[block, 0, :, offset] = rotate(k, cosines)
        pool[block, 1, :, offset] = v
        return rotate(q, cosines)

    def _attend(self, q: Tensor, context: int, table: Tensor, pool: Tensor) -> Tensor:
        """Rows of one sequence, [rows, heads, head_dim] -> [rows, heads * head_dim]."""
        rows, heads, size = q.shape
        kv_heads, block_size = self._config.num_kv_heads, pool.shape[3]
        needed = -(-(context + rows) // KEYS) * KEYS
        keys = torch.arange(needed, device=self._device).clamp(max=context + rows - 1)
        # [2, kv_heads, needed, head_dim]: past the end, the last key again; masked below
        gathered = pool[table[keys // block_size].long(), :, :, keys % block_size].permute(1, 2, 0, 3)
        tiles = []
        for first in range(0, rows, ROWS):
            tile = F.pad(q[first : first + ROWS], (0, 0, 0, 0, 0, max(0, first + ROWS - rows)))
            grouped = tile.view(ROWS, kv_heads, heads // kv_heads, size).permute(1, 2, 0, 3).reshape(kv_heads, -1, size)
            position = context + first + torch.arange(ROWS, device=self._device).repeat(heads // kv_heads)
            out = self._attend_tile(grouped.float(), gathered, position)
            tiles.append(out.view(kv_heads, -1, ROWS, size).permute(2, 0, 1, 3).reshape(ROWS, heads * size))
        return torch.cat(tiles)[:rows].to(q.dtype)

    def _attend_tile(self, q: Tensor, kv: Tensor, position: Tensor) -> Tensor:
        """q [kv_heads, group * ROWS, head_dim], position [group * ROWS] -> like q; online softmax over key tiles."""
        highest = q.new_full((*q.shape[:2], 1), -1e30)
        total = torch.zeros_like(highest)
        out = torch.zeros_like(q)
        for first in range(0, kv.shape[2], KEYS):
            k, v = kv[:, :, first : first + KEYS].float()
            scores = q @ k.transpose(1, 2) * self._config.head_dim**-0.5
            seen = first + torch.arange(KEYS, device=self._device) <= position[:, None]
            scores = scores.masked_fill(~seen, -1e30)
            now = torch.maximum(highest, scores.amax(-1, keepdim=True))
            weights = torch.exp(scores - now).masked_fill(~seen, 0.0)
            keep = torch.exp(highest - now)
            total = total * keep + weights.sum(-1, keepdim=True)
            out = out * keep + weights @ v
            highest = now
        return out / total
