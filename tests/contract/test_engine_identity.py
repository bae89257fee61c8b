"""Same tokens whatever happens: two engines, every operation in every order, against plain decoding.

The model's logits are a hash of all tokens so far, read back through the KV blocks, so any wrong block shows.
"""

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.support.engines import random_tree
from tests.support.gold import CONTEXT, VOCABULARY, GoldDecoder, hash_engine
from tidemill.core.messages import Draft
from tidemill.core.model import Request
from tidemill.core.tree import TokenTree
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

# Nodes, how many of them are right, and whether it is a tree or a chain.
DRAFTS = st.tuples(st.sampled_from([0, 0, 1, 2, 4, 9]), st.integers(0, 6), st.booleans())


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
    output: tuple[int, ...] = ()


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
        self.random = random.Random()
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
    def steps(self, where: int, drafts: list[tuple[int, int, bool]]) -> None:
        """Before each step every sequence is offered a draft; some have no token, some are all wrong."""
        for length, right, bushy in drafts:
            for index, serving in enumerate(self.serving.values()):
                if serving.engine is self.engines[where]:
                    self.propose(serving, length, (right + index) % 7, bushy)
            self.step_once(self.engines[where])

    def propose(self, serving: Serving, length: int, right: int, bushy: bool = False, base_off: int = 0) -> None:
        """The first `right` tokens of the draft, or of a path in it, are what will come."""
        ahead = serving.answer[len(serving.output) :]
        self.random.seed(length * 7 + right + len(ahead))
        if bushy:
            tree = random_tree(self.random, ahead[:right], length, VOCABULARY)
        else:
            tree = TokenTree.chain([*ahead[: min(right, length)], *([7] * length)][:length])
        base = len(serving.request.prompt) + len(serving.output) + base_off
        draft = Draft(serving.request.id, base, tree)
        assert not (serving.engine.propose(draft) and base_off)

    @precondition(lambda self: self.serving)
    @rule(which=SEVERAL, off=st.sampled_from([-1, 1]))
    def propose_too_late_or_too_early(self, which: int, off: int) -> None:
        self.propose(self.pick(which), 3, 3, base_off=off)

    def step_once(self, engine: NativeEngine) -> StepOutput:
        had_work = engine.has_work()
        output = engine.step()
        assert had_work or output == StepOutput()
        assert output.grown or output.batch_tokens <= self.limits[self.engines.index(engine)]
        for each in output.outputs:
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
        for name in output.grown:
            self.check_tree(self.drafting[name])
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

    def check_tree(self, drafting: Drafting) -> None:
        """Each node's first child is what decoding would choose after its path."""
        growing = drafting.engine.growth(drafting.request.id)
        for node in growing.done:
            children = [child for child, parent in enumerate(growing.tree.parents) if parent == node]
            path = tuple(growing.tree.tokens[each] for each in growing.tree.path(node))
            if children:
                expected = self.gold.next_token(drafting.request, drafting.output + path)
                assert growing.tree.tokens[children[0]] == expected

    @precondition(lambda self: self.drafting)
    @rule(nodes=st.lists(st.integers(-1, 9), max_size=4), width=st.integers(1, 3))
    def grow(self, nodes: list[int], width: int) -> None:
        """Nodes that there are, and some that there are not."""
        for name, drafting in self.drafting.items():
            drafting.engine.grow(name, [-1, *nodes], width)

    @precondition(lambda self: self.drafting)
    @rule(which=SEVERAL, more=st.lists(st.integers(0, 9), max_size=3))
    def follow_the_tree(self, which: int, more: list[int]) -> None:
        """A path of each tree is committed, and perhaps other tokens after it."""
        for drafting in self.drafting.values():
            tree = drafting.engine.growth(drafting.request.id).tree
            path = [tree.tokens[node] for node in tree.path(which % len(tree))] if len(tree) else []
            self.follow(drafting, (*drafting.output, *path, *more))

    @precondition(lambda self: self.drafting)
    @rule(kept=st.integers(0, 30), garbage=st.lists(st.integers(0, 9), max_size=3))
    def go_back(self, kept: int, garbage: list[int]) -> None:
        """All drafts go on from other outputs than they had."""
        for index, drafting in enumerate(self.drafting.values()):
            self.follow(drafting, (*self.gold.continuation(drafting.request, (), kept + index), *garbage))

    def follow(self, drafting: Drafting, output: tuple[int, ...]) -> None:
        drafting.output = output[: self.context - len(drafting.request.prompt)]
        drafting.engine.follow(drafting.request.id, drafting.output)

    # --- work is moved, or dropped ------------------------------------------------------------------------------

    @precondition(lambda self: self.serving)
    @rule(which=SEVERAL)
    def migrate(self, which: int) -> None:
        """A sequence that decodes goes on in the other engine, with its KV."""
        serving = self.pick(which)
        if not serving.engine._sequences[serving.request.id].decoding:
            return
        old, new = serving.engine, self.engines[1 - self.engines.index(serving.engine)]
        request = serving.request.resumed(serving.output[len(serving.request.output) :])
        try:
            blocks = new.reserve(request)
        except OutOfBlocks:
            return
        kv = old.export_kv(request.id, blocks.first_block, blocks.end_block)
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
        while self.serving:
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
