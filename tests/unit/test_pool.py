"""Block allocator and prefix cache: the books balance after every operation."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from workers.engine.base import OutOfBlocks
from workers.engine.native.pool import ROOT, BlockPool, chain_hash

BLOCK = 4


class PoolMachine(RuleBasedStateMachine):
    """Sequences of few different tokens, so that prefixes meet often. The model: what each held block must contain."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(12)
        self.held: list[tuple[list[int], list[int]]] = []  # (blocks, tokens)
        self.contents: dict[int, tuple[int, ...]] = {}  # block -> the whole prefix up to its end

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=24))
    def take(self, tokens: list[int]) -> None:
        blocks, hashes = self.pool.match(tokens, BLOCK, (len(tokens) - 1) // BLOCK)
        for index, block in enumerate(blocks):
            assert self.contents[block] == tuple(tokens[: (index + 1) * BLOCK]), "a cached block of another prefix"
        missing = -(-len(tokens) // BLOCK) - len(blocks)
        try:
            fresh = self.pool.allocate(missing)
        except OutOfBlocks:
            assert missing > self.pool.available
            self.pool.release(blocks)
            return
        for block in fresh:
            assert all(block not in others for others, _ in self.held), "handed out twice"
            self.contents.pop(block, None)
        blocks += fresh
        parent = hashes[-1] if hashes else ROOT
        for index in range(len(hashes), len(tokens) // BLOCK):
            parent = chain_hash(parent, tokens[index * BLOCK : (index + 1) * BLOCK])
            self.contents[blocks[index]] = tuple(tokens[: (index + 1) * BLOCK])
            self.pool.publish(blocks[index], parent)
        self.held.append((blocks, tokens))

    @rule(index=st.integers(0, 20))
    def give_back(self, index: int) -> None:
        if self.held:
            blocks, _ = self.held.pop(index % len(self.held))
            self.pool.release(blocks)

    @invariant()
    def balanced(self) -> None:
        self.pool.check()
        assert self.pool.used == len({block for blocks, _ in self.held for block in blocks})


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_least_recently_used_goes_first_and_ends_before_beginnings() -> None:
    pool = BlockPool(4)
    old, new = [1] * 8, [2] * 8
    for tokens in (old, new):
        blocks = pool.allocate(2)
        first = chain_hash(ROOT, tokens[:4])
        pool.publish(blocks[0], first)
        pool.publish(blocks[1], chain_hash(first, tokens[4:]))
        pool.release(blocks)
    pool.allocate(1)
    assert len(pool.match([*old, 9], BLOCK, 2)[0]) == 1, "the end of the older went"
    assert len(pool.match([*new, 9], BLOCK, 2)[0]) == 2
