"""Which rows the next step computes, and which blocks they get.

1. Every sequence that decodes gets one row; if they are too many, those that waited longest come first.
2. Drafts get what is left of the token budget and of the pool, oldest sequence first; nobody gives way to a draft.
3. Prompts in flight get chunks, oldest first.
4. New sequences are admitted in order of arrival, as far as blocks and budget go.

When a row needs a block and there is none, held sequences give theirs up, then the youngest that runs: their KV is
computed again later. Blocks that wait for KV from elsewhere, and those of paused sequences, are never taken.

Prompts may be held back for the sake of those that decode: see Engine.limit_prompts.
"""

from collections import Counter, deque
from dataclasses import dataclass, field

from tidemill.core.tree import EMPTY, ROOT, TokenTree
from workers.engine.native.paths import TreePath, lay_out
from workers.engine.native.pool import BlockPool
from workers.engine.native.sequence import Sequence, SequenceState


@dataclass(slots=True)
class Slice:
    """Rows of one sequence in a step: tokens [start, start + rows), and then the nodes of its draft, path by path.

    Owns the branches of the paths until `release`.
    """

    sequence: Sequence
    start: int
    rows: int
    yields: bool  # the step decodes a token for the sequence
    draft: TokenTree = EMPTY
    paths: list[TreePath] = field(default_factory=list)

    @property
    def end(self) -> int:
        """Position after the last of the sequence's own rows."""
        return self.start + self.rows

    @property
    def nodes(self) -> list[int]:
        """The draft's nodes that have a row, in the order of the rows."""
        return [node for path in self.paths for node in path.nodes]

    @property
    def places(self) -> dict[int, int]:
        """Where the logits after each node are among those of this slice, the last committed token's being first."""
        return {ROOT: 0} | {node: 1 + index for index, node in enumerate(self.nodes)}

    def release(self) -> None:
        """Give up what the draft's branches hold."""
        for path in self.paths:
            if path.branch is not None:
                path.branch.release()


@dataclass(slots=True)
class Plan:
    """One step."""

    slices: list[Slice] = field(default_factory=list)
    reached: list[Sequence] = field(default_factory=list)  # at their goal without a row: all of it is here
    preempted: list[Sequence] = field(default_factory=list)

    @property
    def batch_tokens(self) -> int:
        """Rows of the flattened forward."""
        return sum(piece.rows + len(piece.nodes) for piece in self.slices)


class Scheduler:
    """The queues of an engine. Every sequence is in the one its state says, but a held one that was evicted in none."""

    def __init__(self, pool: BlockPool, max_batch_tokens: int, max_running: int) -> None:
        self.waiting: deque[Sequence] = deque()
        # Dictionaries as ordered sets, oldest first.
        self.running: dict[Sequence, None] = {}
        self.held: dict[Sequence, None] = {}
        self.receiving: dict[Sequence, None] = {}
        self.paused: dict[Sequence, None] = {}
        self._pool = pool
        self._max_batch_tokens = max_batch_tokens
        self._max_running = max_running
        self._turns = 0

    # --- moves --------------------------------------------------------------------------------------------------

    def wait(self, sequence: Sequence) -> None:
        """Last in the queue."""
        sequence.state = SequenceState.WAITING
        self.waiting.append(sequence)

    def receive(self, sequence: Sequence) -> None:
        """Its blocks are filled by somebody else."""
        sequence.state = SequenceState.RECEIVING
        self.receiving[sequence] = None

    def run(self, sequence: Sequence) -> None:
        """From now on it is in every step, if it fits."""
        self._leave_queue(sequence)
        sequence.state = SequenceState.RUNNING
        self.running[sequence] = None

    def hold(self, sequence: Sequence) -> None:
        """It is in no step until it is resumed."""
        del self.running[sequence]
        sequence.state = SequenceState.HELD
        self.held[sequence] = None

    def pause(self, sequence: Sequence) -> None:
        """It is in no step until it runs again, and nobody may take its blocks."""
        del self.running[sequence]
        sequence.state = SequenceState.PAUSED
        self.paused[sequence] = None

    def resume(self, sequence: Sequence) -> None:
        """A held sequence has something to do again. If its blocks were taken meanwhile it queues."""
        if sequence in self.held:
            self.run(sequence)
        else:
            self.wait(sequence)

    def forget(self, sequence: Sequence) -> None:
        """Remove it from its queue and free its blocks."""
        self._leave_queue(sequence)
        sequence.take_blocks()

    def _leave_queue(self, sequence: Sequence) -> None:
        if sequence.state is SequenceState.WAITING:
            self.waiting.remove(sequence)
        else:
            for queue in (self.running, self.held, self.receiving, self.paused):
                queue.pop(sequence, None)

    # --- a step -------------------------------------------------------------------------------------------------

    def has_work(self) -> bool:
        """True if a plan would move something."""
        if self.running:
            return True
        if not self.waiting:
            return False
        head = self.waiting[0]
        head.kv.adopt(head.tokens)
        fits = self._can_fit(head)
        head.kv.clear()
        return fits

    def plan(self, prompt_limit: int | None = None) -> Plan:
        """Choose the next step's rows and allocate their blocks; `prompt_limit`: see Engine.limit_prompts."""
        plan = Plan()
        decoding: list[Sequence] = []
        computing: list[Sequence] = []
        for each in self.running:
            (decoding if each.decoding else computing).append(each)
        budget = self._max_batch_tokens - self._plan_decodes(plan, decoding)
        budget -= self._plan_drafts(plan, budget)
        if prompt_limit is not None and plan.slices:
            budget = min(budget, prompt_limit)
        budget -= self._plan_chunks(plan, computing, budget)
        self._admit(plan, budget)
        return plan

    def _plan_decodes(self, plan: Plan, decoding: list[Sequence]) -> int:
        limit = min(self._max_batch_tokens, self._max_running)
        if len(decoding) > limit:
            decoding = sorted(decoding, key=lambda each: each.turn)[:limit]
        for sequence in decoding:
            if sequence.state is SequenceState.RUNNING:  # or it was preempted for the sake of an older one
                self._add(sequence, 1, plan)
        return len(plan.slices)

    def _plan_drafts(self, plan: Plan, budget: int) -> int:
        rows = 0
        for piece in plan.slices:
            if piece.sequence.draft and rows < budget:
                piece.draft = piece.sequence.draft
                piece.paths = lay_out(piece.draft, piece.sequence.kv, piece.start, budget - rows)
                rows += len(piece.nodes)
        return rows

    def _plan_chunks(self, plan: Plan, computing: list[Sequence], budget: int) -> int:
        rows = 0
        for sequence in computing:
            if sequence.state is not SequenceState.RUNNING:
                continue
            if sequence.todo == 0:
                plan.reached.append(sequence)
            elif rows < budget and len(plan.slices) < self._max_running:
                rows += self._add(sequence, min(sequence.todo, budget - rows), plan)
        return rows

    def _admit(self, plan: Plan, budget: int) -> None:
        while self.waiting and budget > 0 and len(self.running) < self._max_running:
            sequence = self.waiting[0]
            if not self._make_room(sequence):
                break
            sequence.kv.grow(sequence.goal)
            self.run(sequence)
            if sequence.todo:
                budget -= self._add(sequence, min(sequence.todo, budget), plan)
            else:
                plan.reached.append(sequence)

    def _add(self, sequence: Sequence, rows: int, plan: Plan) -> int:
        """Add rows to the plan, with blocks for them; returns how many: none if the sequence had to give way."""
        start = sequence.kv.computed
        while not sequence.kv.grow(start + rows):
            if self._preempt(plan) is sequence:
                return 0
        yields = sequence.decodes and start + rows == len(sequence.tokens)
        plan.slices.append(Slice(sequence, start, rows, yields))
        self._turns += 1
        sequence.turn = self._turns
        return rows

    def _preempt(self, plan: Plan) -> Sequence:
        """Take the blocks of a held sequence, or else of the youngest that runs, and have it computed again later."""
        if self.held:
            return self._evict_held()
        victim = next(reversed(self.running))
        del self.running[victim]
        victim.take_blocks()
        victim.state = SequenceState.WAITING
        self.waiting.appendleft(victim)
        for each in plan.slices:
            if each.sequence is victim:
                each.release()
        plan.slices = [each for each in plan.slices if each.sequence is not victim]
        plan.reached = [each for each in plan.reached if each is not victim]
        plan.preempted.append(victim)
        return victim

    def _evict_held(self) -> Sequence:
        victim = next(iter(self.held))
        del self.held[victim]
        victim.take_blocks()
        return victim

    # --- room for new ones --------------------------------------------------------------------------------------

    def fits(self, sequence: Sequence, tokens: int) -> bool:
        """True if blocks for `tokens` tokens in all are available, and one more for each that runs.

        Without that reserve a new sequence would soon be preempted by older ones that grow.
        """
        return sequence.kv.missing(tokens) + len(self.running) <= self._pool.available

    def _make_room(self, sequence: Sequence) -> bool:
        """Find the sequence's cached prefix, and evict held sequences if that makes room for the rest.

        False if there is too little room; then the sequence holds nothing, and nothing was evicted.
        """
        sequence.kv.adopt(sequence.tokens)
        if not self._can_fit(sequence):
            sequence.kv.clear()
            return False
        while not self.fits(sequence, sequence.goal):
            self._evict_held()
        return True

    def _can_fit(self, sequence: Sequence) -> bool:
        """True if evicting held sequences, or none, gives it room."""
        if self.fits(sequence, sequence.goal):
            return True
        lacking = sequence.kv.missing(sequence.goal) + len(self.running) - self._pool.available
        return lacking <= self._evictable()

    def _evictable(self) -> int:
        """Blocks that only held sequences hold."""
        holders = Counter(block for each in self.held for block in each.kv.blocks)
        return sum(self._pool.references(block) == count for block, count in holders.items())

    def check(self) -> None:
        """Raises AssertionError if a sequence is not where its state says; for tests."""
        assert all(each.state is SequenceState.WAITING and not each.kv.blocks for each in self.waiting)
        assert all(each.state is SequenceState.RUNNING for each in self.running)
        assert all(each.state is SequenceState.HELD and not each.decodes for each in self.held)
        assert all(each.state is SequenceState.RECEIVING for each in self.receiving)
        assert all(each.state is SequenceState.PAUSED for each in self.paused)
