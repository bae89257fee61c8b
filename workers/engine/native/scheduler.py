"""Which rows the next step computes, and which blocks they get.

Decodes come first, each with its draft; then prompts in flight, oldest first; then new ones, as far as the token budget
goes. When blocks run out the youngest sequence gives its own up and is computed again later; a draft is dropped before
that, and received KV is never given up.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from workers.engine.base import OutOfBlocks
from workers.engine.native.pool import BlockPool
from workers.engine.native.sequence import Sequence, SequenceState


@dataclass(frozen=True, slots=True)
class Slice:
    """Rows of one sequence in a step: the tokens from `start` on, then the draft's, if it is verified."""

    sequence: Sequence
    start: int
    rows: int
    draft: tuple[int, ...] = ()

    @property
    def yields(self) -> bool:
        """True if the step decodes a token for the sequence."""
        return self.sequence.quota != 0 and self.start + self.rows - len(self.draft) == len(self.sequence.tokens)


@dataclass(slots=True)
class Plan:
    """One step."""

    slices: list[Slice] = field(default_factory=list)
    reached: list[Sequence] = field(default_factory=list)  # at their goal without a row: all of it was cached
    preempted: list[Sequence] = field(default_factory=list)


class Scheduler:
    """The queues of an engine. `running` holds sequences with blocks that compute or decode, oldest first."""

    def __init__(self, pool: BlockPool, block_size: int, max_batch_tokens: int, max_running: int) -> None:
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.held: list[Sequence] = []  # oldest first; evicted before anything that runs
        self._pool = pool
        self._block_size = block_size
        self._max_batch_tokens = max_batch_tokens
        self._max_running = max_running

    def plan(self) -> Plan:
        """Choose the next step's rows and allocate their blocks."""
        plan = Plan()
        budget = self._max_batch_tokens
        for sequence in [*self._in_flight(decoding=True), *self._in_flight(decoding=False)]:
            if budget <= 0:
                break
            if sequence.state is not SequenceState.RUNNING:
                continue  # preempted for the sake of an older one
            budget -= self._advance(sequence, budget, plan)
        while self.waiting and budget > 0 and len(self.running) < self._max_running:
            if not self._admit(self.waiting[0]):
                break
            sequence = self.waiting.popleft()
            sequence.state = SequenceState.RUNNING
            self.running.append(sequence)
            if sequence.todo:
                budget -= self._advance(sequence, budget, plan)
            else:
                plan.reached.append(sequence)
        return plan

    def _in_flight(self, *, decoding: bool) -> Iterator[Sequence]:
        return (each for each in self.running if each.decoding is decoding)

    def _advance(self, sequence: Sequence, budget: int, plan: Plan) -> int:
        """Add the sequence's rows to the plan; returns how many."""
        draft = sequence.draft if sequence.decoding and 1 + len(sequence.draft) <= budget else ()
        rows = min(sequence.todo, budget)
        while not self._grow(sequence, sequence.computed + rows + len(draft)):
            if draft:
                draft = ()
                continue
            victim = self._preempt(plan)
            if victim is sequence:
                return 0
        plan.slices.append(Slice(sequence, sequence.computed, rows + len(draft), draft))
        return rows + len(draft)

    def _grow(self, sequence: Sequence, tokens: int) -> bool:
        """Give the sequence blocks for this many tokens in all."""
        missing = -(-tokens // self._block_size) - len(sequence.blocks)
        if missing > 0:
            try:
                sequence.blocks += self._pool.allocate(missing)
            except OutOfBlocks:
                return False
        return True

    def _preempt(self, plan: Plan) -> Sequence:
        """Take the blocks of a held sequence, or else of the youngest that runs, and have it computed again later."""
        if self.held:
            victim = self.held.pop(0)
            self._take_blocks(victim)
            return victim
        victim = self.running.pop()
        self._take_blocks(victim)
        victim.state = SequenceState.WAITING
        self.waiting.appendleft(victim)
        plan.slices = [each for each in plan.slices if each.sequence is not victim]
        plan.preempted.append(victim)
        return victim

    def _take_blocks(self, sequence: Sequence) -> None:
        self._pool.release(sequence.blocks)
        sequence.blocks, sequence.hashes, sequence.computed, sequence.draft = [], [], 0, ()

    def _admit(self, sequence: Sequence) -> bool:
        """Find the sequence's cached prefix and allocate blocks for the rest; False if there are too few."""
        self.find_prefix(sequence)
        while not self._grow(sequence, sequence.goal):
            if not self.held:
                self._take_blocks(sequence)
                return False
            self._take_blocks(self.held.pop(0))
        return True

    def find_prefix(self, sequence: Sequence) -> None:
        """Take what the cache holds of the sequence's tokens; its last token is always computed."""
        limit = (len(sequence.tokens) - 1) // self._block_size
        sequence.blocks, sequence.hashes = self._pool.match(sequence.tokens, self._block_size, limit)
        sequence.computed = len(sequence.blocks) * self._block_size

    def forget(self, sequence: Sequence) -> None:
        """Remove it from its queue and free its blocks."""
        if sequence.state is SequenceState.WAITING:
            self.waiting.remove(sequence)
        elif sequence.state is SequenceState.RUNNING:
            self.running.remove(sequence)
        elif sequence in self.held:
            self.held.remove(sequence)
        self._take_blocks(sequence)
