"""KV blocks: who holds each, and which prefix of tokens each full one belongs to.

A block is free, held (one or more references), or cached: nobody holds it, but its contents are those of a known
prefix, so it can be taken again by a sequence with that prefix until it is evicted, least recently used first.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from workers.engine.base import OutOfBlocks

ROOT = b""


def chain_hash(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Identity of a full block: 128 bits over its own tokens and everything before them."""
    return hashlib.blake2b(parent + array("q", tokens).tobytes(), digest_size=16).digest()


class BlockPool:
    """Hands out block numbers; knows nothing of their contents but the hash of the prefix they hold."""

    def __init__(self, num_blocks: int, block_size: int, *, caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.caching = caching
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

    def references(self, block: int) -> int:
        """How many sequences hold a block."""
        return self._references[block]

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

    def match(self, hashes: Iterable[bytes]) -> list[int]:
        """The blocks of the longest cached prefix among these chained hashes, with a reference to each."""
        blocks: list[int] = []
        for known in hashes:
            block = self._by_hash.get(known)
            if block is None:
                break
            self._references[block] += 1
            self._cached.pop(block, None)
            blocks.append(block)
        return blocks

    def publish(self, block: int, contents: bytes) -> None:
        """A held block is full of the prefix with this hash. A second one with the same contents stays private."""
        if self.caching and self._hash[block] is None and contents not in self._by_hash:
            self._hash[block] = contents
            self._by_hash[contents] = block

    def withdraw(self, block: int) -> bool:
        """A held block is to be written to again: forget its contents. False if others hold it, so it must not be."""
        if self._references[block] > 1:
            return False
        self._forget(block)
        return True

    def check(self) -> None:
        """Raises AssertionError if the books do not balance; for tests."""
        held = [block for block, count in enumerate(self._references) if count]
        assert min(self._references) >= 0
        assert len(set(self._free)) == len(self._free)
        assert sorted([*held, *self._free, *self._cached]) == list(range(self.num_blocks))
        assert {block: known for known, block in self._by_hash.items()} == {
            block: known for block, known in enumerate(self._hash) if known is not None
        }
        assert all(self._hash[block] is not None for block in self._cached)
        assert all(self._hash[block] is None for block in self._free)
