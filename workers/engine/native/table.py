"""The KV blocks of one sequence, and how much of them is filled."""

from array import array
from collections.abc import Sequence

from workers.engine.native.pool import ROOT, BlockPool, chain_hash


class Branch:
    """Another way on for a sequence: its own blocks up to `first`, which are borrowed, then private ones.

    Owns the private ones until it is released, or until the sequence's table takes them.
    """

    __slots__ = ("_pool", "blocks", "first")

    def __init__(self, pool: BlockPool, shared: "array[int]", count: int) -> None:
        """Raises OutOfBlocks."""
        self._pool = pool
        self.first = len(shared)
        self.blocks = shared + array("i", pool.allocate(count))

    def grow(self, tokens: int) -> bool:
        """As `BlockTable.grow`."""
        count = max(-(-tokens // self._pool.block_size) - len(self.blocks), 0)
        if count > self._pool.available:
            return False
        self.blocks.extend(self._pool.allocate(count))
        return True

    def take(self) -> "array[int]":
        """The private blocks; whoever calls owns them from here on."""
        private = self.blocks[self.first :]
        del self.blocks[self.first :]
        return private

    def release(self) -> None:
        """Give the private blocks up, if it still has them."""
        self._pool.release(self.take())


class BlockTable:
    """Owns one reference to each of its blocks; block i holds tokens [i * block_size, (i + 1) * block_size).

    `computed` tokens have their KV here. Of the full blocks the first `published` are in the prefix cache, or equal to
    one that is; they may be shared, so they are never written to.
    """

    __slots__ = ("_hashes", "_pool", "_size", "blocks", "computed", "published")

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._size = pool.block_size
        self._hashes: list[bytes] = []  # of leading full blocks of the sequence's tokens, computed or not
        self.blocks = array("i")
        self.computed = 0
        self.published = 0

    def missing(self, tokens: int) -> int:
        """Blocks to be allocated before this many tokens fit."""
        return max(-(-tokens // self._size) - len(self.blocks), 0)

    @property
    def room(self) -> int:
        """Tokens that can be computed beyond those that are, with every block that could be had."""
        return (len(self.blocks) + self._pool.available) * self._size - self.computed

    def grow(self, tokens: int) -> bool:
        """Allocate blocks for this many tokens in all; False, and nothing changed, if there are too few."""
        count = self.missing(tokens)
        if count > self._pool.available:
            return False
        if count:
            self.blocks.extend(self._pool.allocate(count))
        return True

    def adopt(self, tokens: Sequence[int]) -> None:
        """Begin with what the cache holds of `tokens`, which never includes their last: that is always computed."""
        if self._pool.caching:
            full = (len(tokens) - 1) // self._size
            self._hash_up_to(tokens, full)
            self.blocks = array("i", self._pool.match(self._hashes[:full]))
            self.published = len(self.blocks)
            self.computed = self.published * self._size

    def advance(self, tokens: Sequence[int], computed: int) -> None:
        """KV of the first `computed` tokens is here now; blocks that became full are entered into the cache."""
        self.computed = computed
        full = computed // self._size
        if full > self.published and self._pool.caching:
            self._hash_up_to(tokens, full)
            for index in range(self.published, full):
                self._pool.publish(self.blocks[index], self._hashes[index])
            self.published = full

    def trim(self) -> None:
        """Give back blocks past the computed tokens."""
        keep = -(-self.computed // self._size)
        if len(self.blocks) > keep:
            self._pool.release(self.blocks[keep:])
            del self.blocks[keep:]

    def branch(self, start: int, tokens: int) -> Branch | None:
        """Another way on from position `start`, with room for `tokens` in all; None if there are too few blocks.

        `start` is not before the last published block, so what is shared is never written to.
        """
        first = start // self._size
        count = -(-tokens // self._size) - first
        return Branch(self._pool, self.blocks[:first], count) if count <= self._pool.available else None

    def follow(self, branch: Branch) -> None:
        """Go on as the branch does: its private blocks are the table's now, and those they replace are given back."""
        self._pool.release(self.blocks[branch.first :])
        self.blocks[branch.first :] = branch.take()

    def diverge(self, common: int, keep: int) -> None:
        """Only the first `common` tokens are still the sequence's: keep the KV of at most `keep` of them.

        A block that becomes partial will be written to again. If others share it, it is given up and computed anew.
        """
        del self._hashes[common // self._size :]
        self.computed = min(self.computed, keep, common)
        self.trim()
        full = self.computed // self._size
        if self.published > full:
            self.published = full
            if len(self.blocks) > full and not self._pool.withdraw(self.blocks[full]):
                self.computed = full * self._size
                self.trim()

    def clear(self) -> None:
        """Give up all blocks."""
        self._pool.release(self.blocks)
        del self.blocks[:]
        self.computed = self.published = 0

    def _hash_up_to(self, tokens: Sequence[int], count: int) -> None:
        """The hashes of the first `count` full blocks are known."""
        for index in range(len(self._hashes), count):
            parent = self._hashes[-1] if self._hashes else ROOT
            self._hashes.append(chain_hash(parent, tokens[index * self._size : (index + 1) * self._size]))

    def check(self, tokens: Sequence[int]) -> None:
        """Raises AssertionError if something does not fit the sequence's tokens; for tests."""
        assert len(set(self.blocks)) == len(self.blocks)
        assert self.published * self._size <= self.computed <= len(self.blocks) * self._size
        assert len(self._hashes) * self._size <= len(tokens)
        fresh = BlockTable(self._pool)
        fresh._hash_up_to(tokens, len(self._hashes))
        assert self._hashes == fresh._hashes
        assert all(self._pool.references(block) == 1 for block in self.blocks[self.published :])
