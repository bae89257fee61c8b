"""Block allocator, prefix cache and block tables: the books balance after every operation, and contents are right."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from workers.engine.base import OutOfBlocks
from workers.engine.native.pool import ROOT, BlockPool, chain_hash
from workers.engine.native.table import BlockTable

BLOCK = 4
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=24)  # few different ones, so that prefixes meet often


class Held:
    """A sequence as an engine would carry it."""

    def __init__(self, pool: BlockPool, tokens: list[int]) -> None:
        self.table = BlockTable(pool)
        self.tokens = tokens


class PoolMachine(RuleBasedStateMachine):
    """The memory is modelled too: each slot keeps the whole prefix up to its token."""

    @initialize(caching=st.booleans())
    def begin(self, caching: bool) -> None:
        self.pool = BlockPool(12, BLOCK, caching=caching)
        self.held: list[Held] = []
        self.memory: dict[tuple[int, int], tuple[int, ...]] = {}

    def pick(self, index: int) -> Held:
        return self.held[index % len(self.held)]

    @rule(tokens=TOKENS)
    def take(self, tokens: list[int]) -> None:
        one = Held(self.pool, tokens)
        one.table.adopt(tokens)
        assert one.table.computed < len(tokens)
        missing, available = one.table.missing(len(tokens)), self.pool.available
        if one.table.grow(len(tokens)):
            self.held.append(one)
        else:
            assert missing > available
            one.table.clear()

    @precondition(lambda self: self.held)
    @rule(index=st.integers(0, 20), count=st.integers(1, 9))
    def compute(self, index: int, count: int) -> None:
        """Write the KV of the next tokens, as a step does."""
        one = self.pick(index)
        end = min(one.table.computed + count, len(one.tokens) - 1)
        if end > one.table.computed and one.table.grow(end):
            for at in range(one.table.computed, end):
                block = one.table.blocks[at // BLOCK]
                assert self.pool.references(block) == 1, "a shared block is written to"
                self.memory[block, at % BLOCK] = tuple(one.tokens[: at + 1])
            one.table.advance(one.tokens, end)

    @precondition(lambda self: self.held)
    @rule(index=st.integers(0, 20), tokens=TOKENS)
    def append(self, index: int, tokens: list[int]) -> None:
        self.pick(index).tokens += tokens

    @precondition(lambda self: self.held)
    @rule(index=st.integers(0, 20), at=st.integers(0, 24), tokens=TOKENS)
    def rewrite(self, index: int, at: int, tokens: list[int]) -> None:
        one = self.pick(index)
        common = min(at, len(one.tokens))
        one.tokens = one.tokens[:common] + tokens
        before = one.table.computed
        one.table.diverge(common, len(one.tokens) - 1)
        assert one.table.computed > min(before, common, len(one.tokens) - 1) - BLOCK

    @precondition(lambda self: self.held)
    @rule(index=st.integers(0, 20))
    def trim(self, index: int) -> None:
        one = self.pick(index)
        one.table.trim()
        assert one.table.missing(one.table.computed) == 0

    @precondition(lambda self: self.held)
    @rule(index=st.integers(0, 20))
    def give_back(self, index: int) -> None:
        self.held.pop(index % len(self.held)).table.clear()

    @invariant()
    def balanced(self) -> None:
        self.pool.check()
        assert self.pool.used == len({block for one in self.held for block in one.table.blocks})

    @invariant()
    def contents_are_right(self) -> None:
        for one in self.held:
            one.table.check(one.tokens)
            for at in range(one.table.computed):
                assert self.memory[one.table.blocks[at // BLOCK], at % BLOCK] == tuple(one.tokens[: at + 1])


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def full_blocks(pool: BlockPool, tokens: list[int]) -> list[int]:
    """Held blocks full of `tokens`."""
    table = BlockTable(pool)
    table.grow(len(tokens))
    table.advance(tokens, len(tokens))
    return list(table.blocks)


def cached(pool: BlockPool, tokens: list[int]) -> int:
    """Tokens the cache holds of these and one more."""
    table = BlockTable(pool)
    table.adopt([*tokens, 9])
    found = table.computed
    table.clear()
    return found


def test_least_recently_used_goes_first_and_ends_before_beginnings() -> None:
    pool = BlockPool(4, BLOCK)
    old, new = [1] * 8, [2] * 8
    for tokens in (old, new):
        pool.release(full_blocks(pool, tokens))
    pool.allocate(1)
    assert (cached(pool, old), cached(pool, new)) == (4, 8), "the end of the older went"


def test_a_hash_depends_on_every_token_before() -> None:
    assert chain_hash(ROOT, [1, 2]) != chain_hash(ROOT, [2, 1])
    assert chain_hash(chain_hash(ROOT, [1]), [3]) != chain_hash(chain_hash(ROOT, [2]), [3])
    assert chain_hash(chain_hash(ROOT, [1]), [2]) != chain_hash(ROOT, [1, 2])


def test_too_many_blocks_allocate_nothing() -> None:
    pool = BlockPool(3, BLOCK)
    pool.allocate(2)
    with pytest.raises(OutOfBlocks, match="2 KV blocks wanted, 1 of 3 available"):
        pool.allocate(2)
    assert pool.available == 1
    pool.check()


def test_releasing_twice_is_an_error() -> None:
    pool = BlockPool(3, BLOCK)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(RuntimeError, match="more often"):
        pool.release(blocks)


def test_equal_contents_computed_twice_are_cached_once() -> None:
    pool = BlockPool(4, BLOCK)
    first, second = full_blocks(pool, [1] * 4), full_blocks(pool, [1] * 4)
    pool.release(first)
    pool.release(second)
    assert cached(pool, [1] * 4) == 4
    assert pool.available == 4
    pool.check()


def test_without_caching_nothing_is_found() -> None:
    pool = BlockPool(4, BLOCK, caching=False)
    pool.release(full_blocks(pool, [1] * 8))
    assert cached(pool, [1] * 8) == 0


def test_rolling_back_into_a_block_of_ones_own_keeps_what_is_still_right() -> None:
    pool = BlockPool(8, BLOCK)
    table, tokens = BlockTable(pool), [1] * 12
    table.grow(11)
    table.advance(tokens, 11)
    table.diverge(common=6, keep=11)
    assert (table.computed, len(table.blocks)) == (6, 2)
    table.clear()
    assert cached(pool, [1] * 8) == 4, "the block that was going to be written to is not found any more"


def test_rolling_back_into_a_shared_block_leaves_it_to_the_others() -> None:
    pool = BlockPool(8, BLOCK)
    tokens = [1] * 12
    first, second = BlockTable(pool), BlockTable(pool)
    first.grow(11)
    first.advance(tokens, 11)
    second.adopt(tokens)
    second.diverge(common=6, keep=11)
    assert (second.computed, len(second.blocks)) == (4, 1)
    assert cached(pool, [1] * 8) == 8
