"""Same tokens whatever happens: two engines, every operation in every order, against plain decoding.

The model's logits are a hash of all tokens so far, read back through the KV blocks, so any wrong block shows.
"""

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.support.gold import CONTEXT, VOCABULARY, GoldDecoder, hash_engine
from tidemill.core.messages import Draft
from tidemill.core.model import Request
from tidemill.types import FinishReason, SamplingParams
from workers.engine.base import OutOfBlocks, RequestTooLong, StepOutput
from workers.engine.native.engine import NativeEngine

SEVERAL = st.integers(0, 10**6)
SHARED = tuple(range(2, 50))  # prompts begin alike, so that cached prefixes are found
PROMPTS = st.tuples(st.integers(0, 40), st.lists(st.integers(0, 3), min_size=1, max_size=10)).map(
    lambda parts: SHARED[: parts[0]] + tuple(parts[1])
)
SAMPLING = st.builds(
    SamplingParams,
    max_tokens=st.integers(1, 30) | st.just(10**9),
    temperature=st.sampled_from([0.0, 0.0, 0.8]),
    top_k=st.sampled_from([0, 0, 7]),
    top_p=st.sampled_from([1.0, 1.0, 0.8]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.2]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.3]),
    stop_token_ids=st.sampled_from([(), (), (5, 6)]),
    ignore_eos=st.booleans(),
    seed=st.integers(0, 99),
)
SETTINGS = st.fixed_dictionaries(
    {
        "kv_blocks": st.integers(8, 24),
        "max_batch_tokens": st.integers(1, 40),
        "max_running": st.integers(1, 6),
        "prefix_cache": st.booleans(),
    }
)

DRAFTS = st.tuples(st.sampled_from([0, 0, 1, 2, 4, 9]), st.integers(0, 6))  # length, and how much of it is right


@dataclass
class Serving:
    """A request and the engine that decodes it, or will."""

    request: Request
    engine: NativeEngine
    answer: tuple[int, ...]
    reason: FinishReason
    output: list[int] = field(default_factory=list)
    source: NativeEngine | None = None  # computes its KV while the other one waits for it
    next_block: int = 0
    end_block: int = 0


@dataclass
class Drafting:
    """What a draft worker would hold."""

    request: Request
    engine: NativeEngine
    expected: list[int] = field(default_factory=list)


class EngineMachine(RuleBasedStateMachine):
    @initialize(first=SETTINGS, second=SETTINGS)
    def begin(self, first: dict[str, int], second: dict[str, int]) -> None:
        self.engines = [hash_engine(**first), hash_engine(**second)]
        self.limits = [first["max_batch_tokens"], second["max_batch_tokens"]]
        context = min(CONTEXT, *(engine.info.context_length for engine in self.engines))
        # One context for both, so that it does not matter where a sequence runs into its end.
        for engine in self.engines:
            engine.info = type(engine.info)(
                engine.info.kind, VOCABULARY, context, engine.info.eos_token_ids, engine.info.kv
            )
        self.gold = GoldDecoder(context)
        self.context = context
        self.serving: dict[str, Serving] = {}
        self.drafting: dict[str, Drafting] = {}
        self.finished = 0
        self.names = 0

    def new_request(self, prompt: tuple[int, ...], sampling: SamplingParams) -> Request:
        self.names += 1
        return Request(f"r{self.names}", prompt, sampling)

    def pick(self, which: int) -> Serving:
        return list(self.serving.values())[which % len(self.serving)]

    # --- work comes in ------------------------------------------------------------------------------------------

    @rule(prompt=PROMPTS, sampling=SAMPLING, where=st.integers(0, 1))
    def submit(self, prompt: tuple[int, ...], sampling: SamplingParams, where: int) -> None:
        request = self.new_request(prompt, sampling)
        try:
            self.engines[where].submit(request)
        except RequestTooLong:
            assert len(prompt) >= self.context
            return
        self.serving[request.id] = Serving(request, self.engines[where], *self.gold.answer(request))

    @rule(prompt=PROMPTS, sampling=SAMPLING, where=st.integers(0, 1))
    def prefill_for_the_other(self, prompt: tuple[int, ...], sampling: SamplingParams, where: int) -> None:
        request = self.new_request(prompt, sampling)
        source, target = self.engines[where], self.engines[1 - where]
        used = target.load().kv_blocks_used
        try:
            blocks = target.reserve(request)
        except (OutOfBlocks, RequestTooLong):
            assert target.load().kv_blocks_used == used
            return
        source.prefill(request)
        self.serving[request.id] = Serving(
            request, target, *self.gold.answer(request), [], source, blocks.first_block, blocks.end_block
        )

    @rule(prompt=PROMPTS, sampling=SAMPLING, where=st.integers(0, 1))
    def open_draft(self, prompt: tuple[int, ...], sampling: SamplingParams, where: int) -> None:
        request = self.new_request(prompt, sampling)
        if len(prompt) < self.context:
            self.engines[where].prefill(request)
            self.drafting[request.id] = Drafting(request, self.engines[where])

    # --- work goes on -------------------------------------------------------------------------------------------

    @rule(where=st.integers(0, 1), drafts=st.lists(DRAFTS, min_size=1, max_size=8))
    def steps(self, where: int, drafts: list[tuple[int, int]]) -> None:
        """Before each step every sequence is offered a draft; some have no token, some are all wrong."""
        for length, right in drafts:
            for index, serving in enumerate(self.serving.values()):
                if serving.engine is self.engines[where]:
                    self.propose(serving, length, (right + index) % 7)
            self.step_once(self.engines[where])

    def propose(self, serving: Serving, length: int, right: int, base_off: int = 0) -> None:
        """The first `right` tokens of the draft are what will come."""
        ahead = serving.answer[len(serving.output) :]
        tokens = [*ahead[: min(right, length)], *([7] * length)][:length]
        base = len(serving.request.prompt) + len(serving.output) + base_off
        draft = Draft(serving.request.id, base, tuple(tokens), tuple(range(-1, length - 1)))
        assert not (serving.engine.propose(draft) and base_off)

    @precondition(lambda self: self.serving)
    @rule(which=SEVERAL, off=st.sampled_from([-1, 1]))
    def propose_too_late_or_too_early(self, which: int, off: int) -> None:
        self.propose(self.pick(which), 3, 3, off)

    def step_once(self, engine: NativeEngine) -> StepOutput:
        had_work = engine.has_work()
        output = engine.step()
        assert had_work or output == StepOutput()
        assert output.batch_tokens <= self.limits[self.engines.index(engine)]
        for each in output.outputs:
            if each.request_id in self.drafting:
                expected = self.drafting[each.request_id].expected
                assert list(each.tokens) == expected[: len(each.tokens)]
                assert each.finish is None
                del expected[: len(each.tokens)]
                continue
            serving = self.serving[each.request_id]
            serving.output += each.tokens
            assert tuple(serving.output) == serving.answer[: len(serving.output)]
            assert each.accepted <= each.drafted
            assert len(each.tokens) in {each.accepted, each.accepted + 1}
            assert (each.finish is not None) == (len(serving.output) == len(serving.answer))
            if each.finish is not None:
                assert each.finish is serving.reason
                del self.serving[each.request_id]
                self.finished += 1
        for progress in output.progress:
            if progress.request_id in self.serving and self.serving[progress.request_id].source is engine:
                self.move_kv(self.serving[progress.request_id], progress.computed_tokens, progress.held)
        return output

    def move_kv(self, serving: Serving, computed: int, held: bool) -> None:
        """As a prefill worker does after each step: full blocks leave at once, the last with the end."""
        assert serving.source is not None
        full = serving.end_block if held else computed // 8
        if serving.next_block < full:
            kv = serving.source.export_kv(serving.request.id, serving.next_block, full)
            serving.engine.import_kv(serving.request.id, serving.next_block, kv)
            serving.next_block = full
        if held:
            serving.source.release(serving.request.id)
            serving.engine.activate(serving.request.id)
            serving.source = None

    @precondition(lambda self: self.drafting)
    @rule(kept=st.integers(0, 30), garbage=st.lists(st.integers(0, 9), max_size=3), quota=st.integers(0, 5))
    def rewrite(self, kept: int, garbage: list[int], quota: int) -> None:
        """All drafts go on from other outputs than they had: much like before, or quite different."""
        for index, (name, drafting) in enumerate(self.drafting.items()):
            output = [*self.gold.continuation(drafting.request, (), kept + index), *garbage]
            output = output[: self.context - len(drafting.request.prompt)]
            drafting.engine.rewrite(name, output, quota)
            drafting.expected[:] = self.gold.continuation(drafting.request, output, quota)

    # --- work is moved, or dropped ------------------------------------------------------------------------------

    @precondition(lambda self: self.serving)
    @rule(which=SEVERAL)
    def migrate(self, which: int) -> None:
        """A sequence that decodes goes on in the other engine, with its KV."""
        serving = self.pick(which)
        if not serving.output or serving.source is not None:
            return
        old, new = serving.engine, self.engines[1 - self.engines.index(serving.engine)]
        request = serving.request.resumed(serving.output[len(serving.request.output) :])
        try:
            blocks = new.reserve(request)
        except OutOfBlocks:
            return
        try:
            kv = old.export_kv(request.id, blocks.first_block, blocks.end_block)
        except ValueError:  # it is waiting for its KV to be computed again
            new.release(request.id)
            return
        if kv.shape[1]:
            new.import_kv(request.id, blocks.first_block, kv)
        old.release(request.id)
        new.activate(request.id)
        serving.engine = new

    @precondition(lambda self: self.serving)
    @rule(which=SEVERAL, where=st.integers(0, 1))
    def fail_over(self, which: int, where: int) -> None:
        """Its worker died: another one computes everything again, from the tokens already sent."""
        serving = self.pick(which)
        for engine in self.engines:
            engine.release(serving.request.id)
        serving.source, serving.engine = None, self.engines[where]
        serving.engine.submit(Request(serving.request.id, serving.request.prompt, serving.request.sampling,
                                      tuple(serving.output)))  # fmt: skip

    @precondition(lambda self: self.serving or self.drafting)
    @rule(which=SEVERAL)
    def drop(self, which: int) -> None:
        names = [*self.serving, *self.drafting]
        name = names[which % len(names)]
        for engine in self.engines:
            engine.release(name)
            engine.release(name)
        self.serving.pop(name, None)
        self.drafting.pop(name, None)

    # --- always -------------------------------------------------------------------------------------------------

    @invariant()
    def consistent(self) -> None:
        for engine in self.engines:
            engine.check()
        receiving = sum(serving.source is not None for serving in self.serving.values())
        assert receiving or not any(engine.load().kv_blocks_leased for engine in self.engines)

    def teardown(self) -> None:
        """Everything comes to its end, and nothing is left."""
        while self.serving or any(drafting.expected for drafting in self.drafting.values()):
            progress = [self.step_once(engine) != StepOutput() for engine in self.engines]
            if not any(progress):
                self.break_deadlock()
        for name, drafting in self.drafting.items():
            drafting.engine.release(name)
        for engine in self.engines:
            engine.check()
            load = engine.load()
            assert (load.kv_blocks_used, load.running_requests, load.queued_requests) == (0, 0, 0)

    def break_deadlock(self) -> None:
        """Reservations in both engines may wait for each other's blocks; a worker's leases expire then."""
        receiving = [name for name, serving in self.serving.items() if serving.source is not None]
        assert receiving, "nothing moves, and no reservation is in the way"
        for engine in self.engines:
            engine.release(receiving[0])
        del self.serving[receiving[0]]


TestEngine = pytest.mark.timeout(600)(EngineMachine.TestCase)  # finding the smallest failing case takes minutes
TestEngine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
