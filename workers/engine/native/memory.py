"""Large, long-lived tensors on the CPU, in huge pages where the system gives them.

A step streams all weights and much of the KV pool through one core; with pages of 4 KB that is up to a third slower.
"""

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes: a cache line, and the widest vector
HUGE_PAGE = 2 << 20


def zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A zeroed tensor on the CPU. The memory goes back to the system with the last tensor that views it."""
    size = math.prod(shape) * dtype.itemsize
    if size < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(tuple(shape), dtype=dtype)
    memory = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    raw = torch.frombuffer(memory, dtype=torch.uint8)
    start = -raw.data_ptr() % HUGE_PAGE
    return raw[start : start + size].view(dtype).view(tuple(shape))


class Arena:
    """One allocation that is handed out piece by piece."""

    def __init__(self, elements: int, pieces: int, dtype: torch.dtype) -> None:
        """Room for `pieces` tensors of `elements` elements in all."""
        self._align = ALIGNMENT // dtype.itemsize
        self._memory = zeros((elements + pieces * self._align,), dtype)
        self._used = 0

    def take(self, elements: int) -> Tensor:
        """The next piece, aligned to a cache line."""
        piece = self._memory[self._used : self._used + elements]
        self._used += -(-elements // self._align) * self._align
        return piece
