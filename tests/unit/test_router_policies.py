"""Admission, split, placement, the gate and the journey's arithmetic."""

import asyncio
import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.gate import Gate
from router.journey import Journey
from router.policy.admission import Admission, AdmissionLimits, AdmissionReason, admit
from router.policy.placement import PlacementReason, place
from router.policy.split import SplitReason, split
from tidemill.core.lifecycle import RequestState
from tidemill.core.messages import FirstToken, Prefilled, Tokens
from tidemill.core.metrics import ROUTER_SERIES, Metrics
from tidemill.core.model import Peer, PoolSnapshot, Request, Role, WorkerId, WorkerLoad, WorkerSnapshot
from tidemill.errors import Overloaded
from tidemill.types import FinishReason, SamplingParams


def worker(name: str, role: Role, **load: int) -> WorkerSnapshot:
    inflight = load.pop("inflight", 0)
    return WorkerSnapshot(Peer(WorkerId(name, 1), name), role, WorkerLoad(**load), inflight)


workers = st.lists(
    st.builds(
        WorkerSnapshot,
        st.integers(0, 30).map(lambda i: Peer(WorkerId(f"w{i}", 1), f"w{i}")),
        st.sampled_from(Role),
        st.builds(WorkerLoad, *[st.integers(0, 50)] * 5),
        st.integers(0, 20),
        st.integers(0, 500),
    ),
    max_size=8,
    unique_by=lambda each: each.peer.id,
)


@given(st.integers(0, 20), st.integers(0, 20), st.integers(1, 10), st.integers(0, 10))
def test_admission_never_exceeds_its_bounds(active: int, queued: int, max_active: int, max_queued: int) -> None:
    decision = admit(active, queued, AdmissionLimits(max_active, max_queued))
    assert (decision.choice is Admission.SERVE) == (active < max_active and queued == 0)
    if decision.choice is Admission.WAIT:
        assert queued < max_queued
    if decision.choice is Admission.REJECT:
        assert decision.reason is AdmissionReason.QUEUE_FULL


@given(workers, st.integers(0, 99))
def test_placement_takes_a_member_of_the_role_and_never_one_to_avoid(
    members: Sequence[WorkerSnapshot], seed: int
) -> None:
    snapshot = PoolSnapshot(tuple(members))
    avoid = {each.peer.id for each in members[::2]}
    for role in Role:
        decision = place(snapshot, role, avoid, random.Random(seed))
        allowed = [each for each in members if each.role is role and each.peer.id not in avoid]
        assert (decision.choice in allowed) if allowed else decision.choice is None


def test_placement_takes_the_least_loaded_and_breaks_ties_at_random() -> None:
    busy = worker("busy", Role.VERIFY, running_requests=5)
    sent_to = worker("sent-to", Role.VERIFY, inflight=3)  # not reported yet, but this router knows
    idle = [worker(f"idle{i}", Role.VERIFY) for i in range(3)]
    snapshot = PoolSnapshot((busy, sent_to, *idle))
    chosen = {place(snapshot, Role.VERIFY, set(), random.Random(seed)).choice for seed in range(40)}
    assert chosen == set(idle)
    only = place(PoolSnapshot((busy,)), Role.VERIFY, set(), random.Random(0))
    assert (only.choice, only.reason) == (busy, PlacementReason.ONLY_ONE)


def test_split_says_why() -> None:
    long = Request("r", tuple(range(2, 100)), SamplingParams())
    short = Request("r", (5, 6), SamplingParams())
    one = Request("r", (5,), SamplingParams())
    pools = PoolSnapshot((worker("p", Role.PREFILL), worker("v", Role.VERIFY)))
    assert split(pools, long, 32).reason is SplitReason.DISAGGREGATED
    assert split(pools, short, 32).reason is SplitReason.SHORT_PROMPT
    assert split(pools, one, 0).choice is False, "a one-token prompt has no KV to hand over"
    assert split(PoolSnapshot((worker("v", Role.VERIFY),)), long, 32).reason is SplitReason.NO_PREFILL_WORKERS


class TestGate:
    def gate(self, active: int, queued: int) -> Gate:
        return Gate(AdmissionLimits(active, queued), Metrics(ROUTER_SERIES))

    async def test_first_come_first_served_and_the_rest_turned_away(self) -> None:
        gate, order = self.gate(1, 2), []
        release = [asyncio.Event() for _ in range(3)]

        async def run(index: int) -> None:
            async with gate.admitted():
                order.append(index)
                await release[index].wait()

        tasks = [asyncio.create_task(run(index)) for index in range(3)]
        await asyncio.sleep(0)
        assert (gate.active, gate.queued) == (1, 2)
        with pytest.raises(Overloaded, match="1 requests are being served and 2 wait"):
            async with gate.admitted():
                pass
        for event in release:
            event.set()
        await asyncio.gather(*tasks)
        assert order == [0, 1, 2]
        assert (gate.active, gate.queued) == (0, 0)

    async def test_cancelled_while_waiting_leaves_no_trace(self) -> None:
        gate = self.gate(1, 5)
        hold = asyncio.Event()

        async def run() -> None:
            async with gate.admitted():
                await hold.wait()

        first, second, third = (asyncio.create_task(run()) for _ in range(3))
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        assert gate.queued == 1
        # Woken and cancelled in the same moment: the turn goes to nobody, and is not lost.
        hold.set()
        await first
        third.cancel()
        await asyncio.gather(third, return_exceptions=True)
        assert (gate.active, gate.queued) == (0, 0)


times = st.floats(0, 5, allow_nan=False)


@given(times, times, times, times, st.booleans())
def test_the_parts_of_ttft_are_not_negative_and_add_up(
    queue: float, prefill: float, transfer: float, decode: float, elsewhere: bool
) -> None:
    journey = Journey(Request("r", (1, 2), SamplingParams()), 10.0, 100.0)
    now = 10.0 + queue + prefill
    if elsewhere:
        journey.prefill_worker = "p"
        journey.prefilled(Prefilled("r", queue, prefill), now)
    now += transfer + decode
    journey.took(Tokens("r", (5,), first=FirstToken(0.0, 0.0 if elsewhere else prefill, decode)), now)
    timing = journey.timing
    parts = (timing.queue_s, timing.prefill_s, timing.transfer_s, timing.first_decode_s)
    assert all(part >= -1e-9 for part in parts)
    assert sum(parts) == pytest.approx(timing.ttft_s)
    assert timing.ttft_s == pytest.approx(queue + prefill + transfer + decode)


def test_a_journey_resumes_from_what_was_sent() -> None:
    journey = Journey(Request("r", (1, 2), SamplingParams()), 0.0, 9.0)
    first = journey.next_attempt()
    assert (first.output, first.tokens) == ((), (1, 2))
    journey.took(Tokens("r", (5, 6), drafted=3, accepted=1, first=FirstToken(0, 0, 0)), 1.0)
    journey.took(Tokens("r", (7,), finish=FinishReason.LENGTH), 2.0)
    again = journey.next_attempt()
    assert again.output == (5, 6, 7)
    assert again.id != first.id, "a worker's late words of the first attempt must not be taken for the second's"
    assert (journey.verify_steps, journey.drafted, journey.accepted) == (2, 3, 1)
    assert journey.tpot_s == pytest.approx(0.5)
    assert journey.lifecycle.state is RequestState.QUEUED
