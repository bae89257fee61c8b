"""KV blocks: who holds each, and which prefix of tokens each full one belongs to.

A block is free, held (one or more references), or cached: nobody holds it, but its contents are those of a known
prefix, so it can be taken again by a sequence with that prefix until it is evicted, least recently used first.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np

from workers.engine.base import OutOfBlocks

ROOT = b""


def chain_hash(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Identity of a full block: 128 bits over its own tokens and everything before them."""
    return hashlib.blake2b(parent + np.asarray(tokens, dtype=np.int64).tobytes(), digest_size=16).digest()


class BlockPool:
    """Hands out block numbers; knows nothing of their contents but the hash of the prefix they hold."""

    def __init__(self, num_blocks: int, *, caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self._caching = caching
        self._free = list(range(num_blocks - 1, -1, -1))
        self._references = [0] * num_blocks
        self._hash: list[bytes | None] = [None] * num_blocks
        self._by_hash: dict[bytes, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # unreferenced, oldest first

    @property
    def available(self) -> int:
        """Blocks that can be allocated, cached ones included."""
        return len(self._free) + len(self._cached)

    @property
    def used(self) -> int:
        """Blocks some sequence holds."""
        return self.num_blocks - self.available

    def allocate(self, count: int) -> list[int]:
        """Blocks with one reference each and no known contents. Raises OutOfBlocks and allocates nothing."""
        if count > self.available:
            raise OutOfBlocks(f"{count} KV blocks wanted, {self.available} of {self.num_blocks} available")
        return [self._take_one() for _ in range(count)]

    def _take_one(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            self._forget(block)
        self._references[block] = 1
        return block

    def _forget(self, block: int) -> None:
        known = self._hash[block]
        if known is not None:
            del self._by_hash[known]
            self._hash[block] = None

    def release(self, blocks: Iterable[int]) -> None:
        """Give up one reference to each, in the order of a sequence: its end is evicted before its beginning."""
        for block in reversed(list(blocks)):
            if self._references[block] <= 0:
                raise RuntimeError(f"block {block} is released more often than it was taken")
            self._references[block] -= 1
            if self._references[block] == 0:
                if self._hash[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None

    def match(self, tokens: Sequence[int], block_size: int, limit: int) -> tuple[list[int], list[bytes]]:
        """The longest cached prefix of at most `limit` full blocks: a reference to each, and their hashes."""
        blocks: list[int] = []
        hashes: list[bytes] = []
        parent = ROOT
        while self._caching and len(blocks) < limit:
            start = len(blocks) * block_size
            parent = chain_hash(parent, tokens[start : start + block_size])
            block = self._by_hash.get(parent)
            if block is None:
                break
            self._references[block] += 1
            self._cached.pop(block, None)
            blocks.append(block)
            hashes.append(parent)
        return blocks, hashes

    def publish(self, block: int, contents: bytes) -> None:
        """A held block is full of the prefix with this hash. A second one with the same contents stays private."""
        if self._caching and self._hash[block] is None and contents not in self._by_hash:
            self._hash[block] = contents
            self._by_hash[contents] = block

    def check(self) -> None:
        """Raises AssertionError if the books do not balance; for tests."""
        held = [block for block, count in enumerate(self._references) if count]
        assert len(set(self._free)) == len(self._free)
        assert sorted([*held, *self._free, *self._cached]) == list(range(self.num_blocks))
        assert {block: known for known, block in self._by_hash.items()} == {
            block: known for block, known in enumerate(self._hash) if known is not None
        }
        assert all(self._hash[block] is not None for block in self._cached)
        assert all(self._hash[block] is None for block in self._free)
