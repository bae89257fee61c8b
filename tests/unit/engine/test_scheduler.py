"""Planning alone: who is in the next step, with which rows, and who gives way."""

from tidemill.core.model import Request
from tidemill.core.tree import TokenTree
from tidemill.types import SamplingParams
from workers.engine.native.pool import BlockPool
from workers.engine.native.scheduler import Plan, Scheduler
from workers.engine.native.sequence import Sequence, SequenceState
from workers.engine.native.table import BlockTable
from workers.engine.sampling import Sampler

BLOCK = 4


class Bench:
    """A scheduler, and what an engine does with its plans: every row is computed, every decode yields token 9."""

    def __init__(self, blocks: int = 100, max_batch_tokens: int = 64, max_running: int = 8) -> None:
        self.pool = BlockPool(blocks, BLOCK, caching=False)
        self.scheduler = Scheduler(self.pool, max_batch_tokens, max_running)
        self.names = 0

    def sequence(self, tokens: int, decodes: bool = True) -> Sequence:
        self.names += 1
        request = Request(f"{self.names}", tuple(range(tokens)), SamplingParams())
        return Sequence(
            request, list(request.tokens), decodes, BlockTable(self.pool), Sampler(request.sampling, (), ())
        )

    def waiting(self, tokens: int, decodes: bool = True) -> Sequence:
        sequence = self.sequence(tokens, decodes)
        self.scheduler.wait(sequence)
        return sequence

    def decoding(self, tokens: int) -> Sequence:
        """KV of all tokens but the last came from elsewhere."""
        sequence = self.receiving(tokens)
        sequence.kv.advance(sequence.tokens, tokens - 1)
        self.scheduler.run(sequence)
        return sequence

    def receiving(self, tokens: int) -> Sequence:
        sequence = self.sequence(tokens)
        self.scheduler.receive(sequence)
        assert sequence.kv.grow(tokens - 1)
        return sequence

    def held(self, tokens: int) -> Sequence:
        sequence = self.waiting(tokens, decodes=False)
        self.step()
        assert sequence.state is SequenceState.HELD
        return sequence

    def step(self, prompt_limit: int | None = None) -> Plan:
        plan = self.scheduler.plan(prompt_limit)
        for piece in plan.slices:
            sequence = piece.sequence
            if piece.yields:
                sequence.tokens.append(9)
                sequence.draft = TokenTree()
            sequence.kv.advance(sequence.tokens, piece.start + piece.rows)
            sequence.kv.trim()
            piece.release()
        for sequence in [*plan.reached, *(piece.sequence for piece in plan.slices)]:
            if sequence.todo == 0:
                self.scheduler.hold(sequence)
        self.scheduler.check()
        self.pool.check()
        return plan


def rows(plan: Plan) -> list[tuple[Sequence, int, int, int]]:
    """(sequence, first row, rows of its own, rows of its draft) of each slice."""
    return [(each.sequence, each.start, each.rows, len(each.nodes)) for each in plan.slices]


class TestPromptLimit:
    def test_prompts_get_no_more(self) -> None:
        bench = Bench()
        decoding, prompt, new = bench.decoding(5), bench.waiting(10), bench.waiting(20)
        assert rows(bench.step(7)) == [(decoding, 4, 1, 0), (prompt, 0, 7, 0)]
        assert rows(bench.step(7)) == [(decoding, 5, 1, 0), (prompt, 7, 3, 0), (new, 0, 4, 0)]
        assert rows(bench.step()) == [(decoding, 6, 1, 0), (prompt, 10, 1, 0), (new, 4, 16, 0)]

    def test_none_begins_where_none_may(self) -> None:
        bench = Bench()
        decoding, new = bench.decoding(5), bench.waiting(20)
        assert rows(bench.step(0)) == [(decoding, 4, 1, 0)]
        assert new.state is SequenceState.WAITING

    def test_a_step_that_has_nothing_else_to_do_disregards_it(self) -> None:
        bench = Bench()
        prompt = bench.waiting(4)
        assert rows(bench.step(0)) == [(prompt, 0, 4, 0)]


class TestOrder:
    def test_decodes_come_before_chunks_and_chunks_before_new_ones(self) -> None:
        bench = Bench(max_batch_tokens=10)
        prompt = bench.waiting(24)
        assert rows(bench.step()) == [(prompt, 0, 10, 0)]
        decoding = bench.decoding(5)
        new = bench.waiting(8)
        assert rows(bench.step()) == [(decoding, 4, 1, 0), (prompt, 10, 9, 0)]
        assert rows(bench.step()) == [(decoding, 5, 1, 0), (prompt, 19, 5, 0), (new, 0, 4, 0)]

    def test_the_last_chunk_yields_and_others_do_not(self) -> None:
        bench = Bench(max_batch_tokens=4)
        bench.waiting(7)
        assert [piece.yields for _ in range(3) for piece in bench.step().slices] == [False, True, True]

    def test_a_prefilled_sequence_yields_nothing_and_leaves_out_its_last_token(self) -> None:
        bench = Bench()
        sequence = bench.waiting(7, decodes=False)
        plan = bench.step()
        assert rows(plan) == [(sequence, 0, 6, 0)]
        assert not plan.slices[0].yields
        assert sequence.state is SequenceState.HELD

    def test_nothing_to_compute_is_reached_without_a_row(self) -> None:
        bench = Bench()
        sequence = bench.waiting(1, decodes=False)
        plan = bench.step()
        assert (plan.slices, plan.reached) == ([], [sequence])

    def test_more_decodes_than_rows_take_turns(self) -> None:
        bench = Bench(max_batch_tokens=2)
        sequences = [bench.decoding(5) for _ in range(5)]
        for _ in range(10):
            bench.step()
        assert [len(sequence.tokens) for sequence in sequences] == [5 + 4] * 5

    def test_no_more_sequences_than_may_run(self) -> None:
        bench = Bench(max_running=3)
        for _ in range(5):
            bench.waiting(4)
        assert len(bench.step().slices) == 3
        assert len(bench.scheduler.waiting) == 2


class TestDrafts:
    def test_every_sequence_gets_its_row_before_any_draft(self) -> None:
        bench = Bench(max_batch_tokens=6)
        first, second = bench.decoding(5), bench.decoding(5)
        first.draft = second.draft = TokenTree.chain([1, 2, 3])
        assert rows(bench.step()) == [(first, 4, 1, 3), (second, 4, 1, 1)]

    def test_nobody_gives_way_to_a_draft(self) -> None:
        bench = Bench(blocks=5)
        bench.held(4)
        first, second = bench.decoding(5), bench.decoding(5)
        first.draft = TokenTree.chain([1] * 9)
        plan = bench.step()
        assert rows(plan) == [(first, 4, 1, 3), (second, 4, 1, 0)], "as far as the block goes that it has anyway"
        assert len(bench.scheduler.held) == 1

    def test_a_draft_takes_free_blocks_only_for_the_step(self) -> None:
        bench = Bench()
        sequence = bench.decoding(5)
        sequence.draft = TokenTree.chain([1] * 9)
        assert rows(bench.step()) == [(sequence, 4, 1, 9)]
        assert bench.pool.used == 2


class TestPressure:
    def test_the_youngest_gives_way_and_queues_first(self) -> None:
        bench = Bench(blocks=4)
        old, young = bench.decoding(8), bench.decoding(8)
        other = bench.waiting(4)
        for sequence in (old, young):
            sequence.tokens.append(9)
            sequence.kv.advance(sequence.tokens, 8)
        plan = bench.step()
        assert rows(plan) == [(old, 8, 1, 0)]
        assert plan.preempted == [young]
        assert list(bench.scheduler.waiting) == [young, other]
        assert not young.kv.blocks

    def test_held_ones_give_way_before_anything_that_runs(self) -> None:
        bench = Bench(blocks=4)
        held = bench.held(5)
        first, second = bench.decoding(9), bench.decoding(4)
        plan = bench.step()
        assert not plan.preempted
        assert rows(plan) == [(first, 8, 1, 0), (second, 3, 1, 0)]
        assert not held.kv.blocks
        assert held.state is SequenceState.HELD

    def test_blocks_that_wait_for_kv_are_never_taken(self) -> None:
        bench = Bench(blocks=4)
        receiving, decoding = bench.receiving(9), bench.decoding(8)
        decoding.tokens.append(9)
        decoding.kv.advance(decoding.tokens, 8)
        plan = bench.step()
        assert (plan.slices, plan.preempted) == ([], [decoding])
        assert len(receiving.kv.blocks) == 2
        assert not bench.scheduler.has_work(), "nothing fits until the reservation ends"
        bench.scheduler.forget(receiving)
        assert bench.scheduler.has_work()
        assert rows(bench.step()) == [(decoding, 0, 9, 0)]

    def test_a_new_one_leaves_room_for_those_that_run_to_grow(self) -> None:
        bench = Bench(blocks=5)
        bench.decoding(8)
        new = bench.waiting(12)
        assert len(bench.step().slices) == 1
        assert new.state is SequenceState.WAITING

    def test_held_ones_are_not_evicted_in_vain(self) -> None:
        bench = Bench(blocks=6)
        held = bench.held(5)
        bench.receiving(17)
        bench.waiting(16)
        assert not bench.scheduler.has_work()
        assert not bench.step().slices
        assert held.kv.blocks

    def test_asking_for_work_evicts_nobody(self) -> None:
        bench = Bench(blocks=6)
        held = bench.held(21)
        bench.waiting(16)
        assert bench.scheduler.has_work()
        assert held.kv.blocks
        assert len(bench.step().slices) == 1
        assert not held.kv.blocks

    def test_an_evicted_one_queues_when_it_is_resumed(self) -> None:
        bench = Bench(blocks=6)
        held = bench.held(5)
        bench.waiting(24)
        bench.step()
        held.decodes = True
        bench.scheduler.resume(held)
        assert held.state is SequenceState.WAITING
        assert held in bench.scheduler.waiting

    def test_those_that_are_preempted_leave_the_plan(self) -> None:
        """The youngest decodes, and is planned, before an older one's chunk needs its blocks."""
        bench = Bench(blocks=8, max_batch_tokens=8)
        old = bench.waiting(20)
        bench.step()
        bench.decoding(13)
        old.tokens += [9] * 6  # as when a draft's output is rewritten
        bench.step()
        plan = bench.step()
        assert [piece.sequence for piece in plan.slices] == [old]
        assert len(plan.preempted) == 1
