"""Runs the decoder with stock torch operators: where no compiler is found, and on CUDA.

Every operator works on a shape that does not depend on the batch: rows in tiles, queries in groups of tiles, keys in
tiles of 64 counted from position 0. So a row's result does not depend on what shares the step, as with the compiled
kernels. Padding fills the tiles; keys that a row does not see add exact zeros.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.engine.native.batch import StepBatch
from workers.engine.native.config import ModelConfig
from workers.engine.native.weights import LayerWeights, ModelWeights

KEYS = 64
MASKED = -1e30


@dataclass(frozen=True, slots=True)
class Tiling:
    """How much one operator takes at once. More pays where starting an operator costs more than padding."""

    rows: int  # of the flattened step, in all that is done row by row
    queries: int  # of one sequence, in attention
    group: int  # such query tiles


CPU = Tiling(rows=16, queries=8, group=4)
CUDA = Tiling(rows=64, queries=16, group=32)


@dataclass(frozen=True, slots=True)
class QueryGroup:
    """Query tiles that pass their keys together; what is padding repeats something real, and is dropped."""

    rows: Tensor  # [group, queries]: rows of the step
    positions: Tensor  # [group, queries]
    tables: Tensor  # [group, width]: KV blocks of each tile's sequence
    last: Tensor  # [group, 1]: highest position of each tile
    end: int  # keys that some row sees


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Over the last dimension; rounds to the model's type before the weight, as Hugging Face does."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def rotate(x: Tensor, cosines: Tensor) -> Tensor:
    """x [rows, heads, head_dim]; cosines [rows, head_dim]: cosines of half the channels, then sines."""
    cos, sin = (part[:, None] for part in cosines.chunk(2, -1))
    left, right = x.float().chunk(2, -1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1).to(x.dtype)


def by_tiles(size: int, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """function(*tensors), computed `size` rows at a time; tensors [rows, ...] alike."""
    rows = tensors[0].shape[0]
    padded = [torch.cat([x, x.new_zeros(-rows % size, *x.shape[1:])]) for x in tensors]
    tiles = zip(*(x.split(size) for x in padded), strict=True)
    return torch.cat([function(*tile) for tile in tiles])[:rows]


class TorchRunner:
    """Same interface and same KV pool shape as CpuRunner; keys and values lie in rows inside a block."""

    packing = "rows"

    def __init__(
        self, config: ModelConfig, weights: ModelWeights, device: torch.device, tiling: Tiling | None = None
    ) -> None:
        self._config = config
        self._weights = weights
        self._layers = tuple(weights.layers)
        self._cosines = config.cosines(device)
        self._device = device
        self._tiling = tiling or (CPU if device.type == "cpu" else CUDA)

    def forward(self, batch: StepBatch, kv: Tensor) -> Tensor:
        """Float32 logits [R, vocabulary]; keys and values of all rows are written to `kv`."""
        groups = self._group_queries(batch)
        cosines = self._cosines[batch.positions.to(self._device)]
        slots = batch.slots.to(self._device)
        copies = batch.copy_rows.to(self._device), batch.copy_slots.to(self._device)
        residual = self._weights.embedding[batch.token_ids.to(self._device)]
        for layer, pool in zip(self._layers[: batch.layers], kv, strict=False):
            queries = self._project_and_keep(residual, layer, cosines, slots, copies, pool)
            mixed = self._attend(queries, groups, pool)
            residual = by_tiles(self._tiling.rows, lambda x, y, w=layer: self._update(x, y, w), residual, mixed)
        return by_tiles(self._tiling.rows, self._logits, residual[batch.logit_rows.to(self._device)])

    def _project_and_keep(
        self,
        residual: Tensor,
        layer: LayerWeights,
        cosines: Tensor,
        slots: Tensor,
        copies: tuple[Tensor, Tensor],
        pool: Tensor,
    ) -> Tensor:
        """Rotated queries [rows, heads, head_dim]; keys and values go to their slots of the layer's pool."""
        config = self._config
        heads, kv_heads, eps = config.num_heads, config.num_kv_heads, config.rms_norm_eps

        def project(x: Tensor, angles: Tensor) -> Tensor:
            qkv = F.linear(rms_norm(x, layer.input_norm, eps), layer.qkv, layer.qkv_bias)
            q, k, v = qkv.view(-1, heads + 2 * kv_heads, config.head_dim).split([heads, kv_heads, kv_heads], 1)
            if layer.q_norm is not None and layer.k_norm is not None:
                q, k = rms_norm(q, layer.q_norm, eps), rms_norm(k, layer.k_norm, eps)
            return torch.cat([rotate(q, angles), rotate(k, angles), v], 1)

        qkv = by_tiles(self._tiling.rows, project, residual, cosines)
        keys_values = qkv[:, heads:].unflatten(1, (2, kv_heads))
        pool[slots // pool.shape[3], :, :, slots % pool.shape[3]] = keys_values
        rows, others = copies
        pool[others // pool.shape[3], :, :, others % pool.shape[3]] = keys_values[rows]
        return qkv[:, :heads]

    def _update(self, residual: Tensor, mixed: Tensor, layer: LayerWeights) -> Tensor:
        """The rest of a layer after attention."""
        residual = residual + F.linear(mixed, layer.output, layer.output_bias)
        gate, up = F.linear(rms_norm(residual, layer.post_norm, self._config.rms_norm_eps), layer.gate_up).chunk(2, -1)
        return residual + F.linear(F.silu(gate) * up, layer.down)

    def _logits(self, residual: Tensor) -> Tensor:
        return F.linear(
            rms_norm(residual, self._weights.final_norm, self._config.rms_norm_eps), self._weights.head
        ).float()

    def _group_queries(self, batch: StepBatch) -> list[QueryGroup]:
        """Cut each sequence's rows into tiles, and the tiles into groups."""
        starts, size, count = batch.query_starts.tolist(), self._tiling.queries, self._tiling.group
        tiles: list[tuple[int, list[int]]] = []  # a sequence, and rows of it
        for sequence, (first, end) in enumerate(pairwise(starts)):
            tiles += [(sequence, [min(row, end - 1) for row in range(at, at + size)]) for at in range(first, end, size)]
        tiles += [tiles[0]] * (-len(tiles) % count)
        groups = []
        for at in range(0, len(tiles), count):
            sequences, chosen = zip(*tiles[at : at + count], strict=True)
            rows = torch.tensor(chosen)
            positions = batch.positions[rows]
            groups.append(
                QueryGroup(
                    rows.to(self._device),
                    positions.to(self._device),
                    batch.block_tables[list(sequences)].long().to(self._device),
                    positions.amax(1, keepdim=True).to(self._device),
                    int(positions.max()) + 1,
                )
            )
        return groups

    def _attend(self, queries: Tensor, groups: list[QueryGroup], pool: Tensor) -> Tensor:
        """queries [rows, heads, head_dim] -> [rows, heads * head_dim]."""
        rows, heads, size = queries.shape
        out = queries.new_empty(rows, heads * size)
        kv_heads, shared = self._config.num_kv_heads, heads // self._config.num_kv_heads
        for group in groups:
            count, tokens = group.rows.shape
            q = queries[group.rows].view(count, tokens, kv_heads, shared, size).transpose(1, 2)
            mixed = self._attend_group(q.reshape(count, kv_heads, tokens * shared, size).float(), group, pool)
            mixed = mixed.view(count, kv_heads, tokens, shared * size).transpose(1, 2)
            out[group.rows] = mixed.reshape(count, tokens, heads * size).to(out.dtype)
        return out

    def _attend_group(self, q: Tensor, group: QueryGroup, pool: Tensor) -> Tensor:
        """Online softmax over tiles of keys.

        q [group, kv_heads, queries * shared, head_dim] -> [group * kv_heads, queries * shared, head_dim]
        """
        config, q = self._config, q.flatten(0, 1)
        repeats = (config.num_kv_heads, q.shape[1] // group.positions.shape[1])
        position = group.positions.repeat_interleave(repeats[0], 0).repeat_interleave(repeats[1], 1)[:, :, None]
        highest = q.new_full((*q.shape[:2], 1), MASKED)
        total, out = torch.zeros_like(highest), torch.zeros_like(q)
        for first in range(0, group.end, KEYS):
            at = first + torch.arange(KEYS, device=self._device)
            there = torch.minimum(at, group.last)  # past the end, the last key again; masked below
            blocks = group.tables.gather(1, there // pool.shape[3])
            kv = pool[blocks, :, :, there % pool.shape[3]].permute(2, 0, 3, 1, 4).contiguous().float()
            k, v = kv.flatten(1, 2)  # [group * kv_heads, KEYS, head_dim] each
            seen = at <= position
            scores = (torch.bmm(q, k.transpose(1, 2)) * config.head_dim**-0.5).masked_fill_(~seen, MASKED)
            now = torch.maximum(highest, scores.amax(-1, keepdim=True))
            weights = torch.exp(scores - now).masked_fill_(~seen, 0.0)
            keep = torch.exp(highest - now)
            total = total * keep + weights.sum(-1, keepdim=True)
            out = torch.baddbmm(out * keep, weights, v)
            highest = now
        return out / total
