"""Blocks of vLLM's KV tensors, moved whole: what lies inside a block is the attention kernels' own affair.

A block has the bytes of [2, kv_heads, block_size, head_dim] in an order that vLLM, its version, the attention kernel
and the processor decide. Peers compare all of that, and the names of the layers in order, when a link is opened.
"""

import hashlib
from collections.abc import Mapping, Sequence

import torch
import vllm
from torch import Tensor

from workers.engine.base import KvLayout


class KvBlocks:
    """All layers' blocks. The tensors are vLLM's."""

    def __init__(self, layers: Mapping[str, Tensor], num_blocks: int, block_size: int, kernel: str) -> None:
        """`num_blocks`: of each tensor. Raises ValueError if they cannot be moved block by block."""
        self.names = tuple(layers)
        self._layers = [_blocks_first(tensor, num_blocks) for tensor in layers.values()]
        first = self._layers[0]
        if any(each.shape != first.shape or each.dtype != first.dtype for each in self._layers):
            raise ValueError("this model's layers keep KV of different shapes, which cannot be handed over")
        per_token, rest = divmod(first[0].numel(), 2 * block_size)
        dtype = str(first.dtype).removeprefix("torch.")
        if rest or dtype not in ("float32", "bfloat16"):
            raise ValueError(f"KV blocks of {tuple(first.shape[1:])} {dtype} cannot be handed over")
        packing = "/".join((f"vllm-{vllm.__version__}", kernel, _processor(first.device), self._digest()))
        self.layout = KvLayout(len(self._layers), 1, per_token, block_size, dtype, packing)
        self._shape = (2, 1, block_size, per_token)

    def _digest(self) -> str:
        shape = "x".join(map(str, self._layers[0].shape[1:]))
        names = hashlib.blake2s("\n".join(self.names).encode(), digest_size=4).hexdigest()
        return f"{shape}/layers-{names}"

    def take(self, blocks: Sequence[int]) -> Tensor:
        """Copy of these blocks, [layers, n, 2, kv_heads, block_size, head_dim], on the CPU."""
        rows = torch.tensor(blocks, dtype=torch.int64, device=self._layers[0].device)
        copies = [layer.index_select(0, rows) for layer in self._layers]
        return torch.stack(copies).view(len(copies), len(blocks), *self._shape).cpu()

    def take_layer(self, layer: int, blocks: Sequence[int]) -> Tensor:
        """One layer of these blocks, [1, n, 2, kv_heads, block_size, head_dim], on the CPU."""
        tensor = self._layers[layer]
        rows = torch.tensor(blocks, dtype=torch.int64, device=tensor.device)
        return tensor.index_select(0, rows).contiguous().view(1, len(blocks), *self._shape).cpu()

    def put(self, blocks: Sequence[int], kv: Tensor, first_layer: int = 0) -> None:
        """Copy `kv` [layers, n, ...] into these blocks, from layer `first_layer` on. Raises ValueError if not alike."""
        layers = self._layers[first_layer : first_layer + kv.shape[0]]
        fits = len(layers) == kv.shape[0] and tuple(kv.shape[1:]) == (len(blocks), *self._shape)
        if not fits or kv.dtype != layers[0].dtype:
            raise ValueError(f"KV is {tuple(kv.shape)} {kv.dtype}, expected blocks of {self.layout}")
        rows = torch.tensor(blocks, dtype=torch.int64, device=layers[0].device)
        for layer, new in zip(layers, kv, strict=True):
            layer[rows] = new.reshape(len(blocks), *layer.shape[1:]).to(layer.device)

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """All layers of `sources` into `targets`, number by number; the two may have blocks in common."""
        device = self._layers[0].device
        rows, into = (torch.tensor(each, dtype=torch.int64, device=device) for each in (sources, targets))
        for layer in self._layers:
            layer[into] = layer[rows]


def _blocks_first(tensor: Tensor, num_blocks: int) -> Tensor:
    """A view whose first axis is that of the blocks."""
    axes = [axis for axis, size in enumerate(tensor.shape) if size == num_blocks]
    if len(axes) != 1:
        raise ValueError(f"a KV tensor of {tuple(tensor.shape)} has no one axis of {num_blocks} blocks")
    return tensor.movedim(axes[0], 0)


def _processor(device: torch.device) -> str:
    """What decides the order inside a block, beside the kernel."""
    if device.type != "cpu":
        return torch.cuda.get_device_name(device).replace(" ", "-")
    amx = "+amx" if torch.cpu._is_amx_tile_supported() else ""
    return torch.backends.cpu.get_cpu_capability() + amx
