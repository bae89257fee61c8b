"""Anything may happen in any order: whoever finishes has the right tokens, and nothing is left behind."""

from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.support.benches import Trio, half_right
from tests.support.engines import SMALL, VOCABULARY, one_by_one
from tests.support.workers import fixed_drafts, settings_of
from tidemill.core.messages import Cancel, Reserve, Submit
from tidemill.core.model import Request
from tidemill.types import SamplingParams
from workers.engine.emulated import EmulatedEngine

LENGTHS = (3, 17, 33, 70, 90)
REQUESTS = [
    Request(
        f"r{index}",
        tuple(2 + (i * (7 if index % 2 else 5)) % (VOCABULARY - 2) for i in range(LENGTHS[index % len(LENGTHS)])),
        SamplingParams(max_tokens=9, ignore_eos=True, seed=index),
    )
    for index in range(8)
]
PLAIN = one_by_one(EmulatedEngine(SMALL, VOCABULARY), REQUESTS)
# Small enough that requests are refused, preempted and evicted.
TIGHT = settings_of(SMALL.model_copy(update={"kv_blocks": 14, "max_batch_tokens": 24}), fixed_drafts(wait_s=0.05))

which = st.integers(0, len(REQUESTS) - 1)
ACTIONS = st.one_of(
    st.tuples(st.just("submit"), which),
    st.tuples(st.just("reserve"), which),
    st.tuples(st.just("cancel"), which),
    st.tuples(st.just("cancel prefill"), which),
    st.tuples(st.sampled_from(["turn prefill", "turn verify", "turn verify", "carry kv", "carry one kv"]), st.just(0)),
    st.tuples(st.sampled_from(["calls", "replies", "replies twice", "drafter lost", "link", "expire"]), st.just(0)),
)


class Run:
    """A trio, and what has been asked of it."""

    def __init__(self) -> None:
        self.trio = Trio(TIGHT, half_right)
        self.asked: set[str] = set()
        self.cancelled: set[str] = set()
        self.passed_on: set[str] = set()

    def do(self, action: str, index: int) -> None:
        trio, request = self.trio, REQUESTS[index]
        match action:
            case "submit" | "reserve" if request.id not in self.asked:
                self.asked.add(request.id)
                command = Submit(request, trio.draft.me) if action == "submit" else Reserve(request, 5.0, trio.draft.me)
                trio.verify.send(command)
                trio.verify.turn()
            case "cancel":
                self.cancelled.add(request.id)
                trio.verify.send(Cancel(request.id))
            case "cancel prefill":
                trio.prefill.send(Cancel(request.id))
            case "turn prefill":
                self.pass_on()
                trio.prefill.turn()
            case "turn verify":
                trio.verify.turn(advance_s=0.02)
            case "carry kv":
                trio.carry_kv()
            case "carry one kv":
                trio.carry_kv(1)
            case "calls":
                trio.carry_calls()
            case "replies":
                trio.carry_replies()
            case "replies twice":
                trio.replies *= 2
                trio.carry_replies()
            case "drafter lost":
                trio.verify.verify.on_drafter_lost(trio.draft.me, "cut")
                trio.draft.draft.stream_closed(1)
                trio.verify.streams.clear()
                trio.replies.clear()
            case "link":
                trio.break_link()
            case "expire":
                trio.verify.turn(advance_s=5.0)

    def pass_on(self) -> None:
        """What a router does with granted leases."""
        for request_id in list(self.trio.verify.verify._requests):
            lease = self.trio.verify.verify._leases.of_request(request_id)
            if lease is not None and request_id not in self.passed_on:
                self.passed_on.add(request_id)
                self.trio.start_prefill(request_id)

    def check(self) -> None:
        """Whatever came is right so far."""
        for request_id in self.asked:
            tokens = self.trio.verify.tokens(request_id)
            assert tokens == PLAIN[request_id][: len(tokens)], request_id

    def finish(self) -> None:
        """No more trouble: what is left ends, or is given up by its deadline."""
        for _ in range(60):
            self.pass_on()
            self.trio.prefill.turn()
            self.trio.carry_kv()
            self.trio.verify.turn(advance_s=0.02)
            self.trio.drafted()
        self.trio.verify.turn(advance_s=6.0)
        self.trio.cancel_all([request.id for request in REQUESTS])
        for request_id in self.asked - self.cancelled:
            assert self.trio.verify.over(request_id), f"{request_id} hangs"
        self.check()
        self.trio.prefill.turn()
        self.trio.carry_calls()
        self.trio.assert_empty()


@settings(max_examples=100, deadline=None)
@given(st.lists(ACTIONS, min_size=20, max_size=120))
@example([("submit", 0), ("submit", 5), ("reserve", 1), ("submit", 3)])  # the draft worker has a block too few
def test_any_order(actions: list[tuple[str, int]]) -> None:
    run = Run()
    for action, index in actions:
        run.do(action, index)
        run.check()
    run.finish()
