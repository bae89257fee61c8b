"""Bounds of admission and placement under any load, and over time."""

import asyncio
import random
from collections import Counter

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from router.gate import Gate
from router.policy.admission import AdmissionLimits
from router.policy.placement import PlacementReason, place
from tests.support.virtual_time import run_virtual
from tidemill.core.metrics import ROUTER_ACTIVE, ROUTER_QUEUED, ROUTER_SERIES, Metrics
from tidemill.core.model import Peer, PoolSnapshot, Role, WorkerId, WorkerLoad, WorkerSnapshot
from tidemill.errors import Overloaded


def worker(index: int, role: Role = Role.VERIFY, inflight: int = 0, **load: int) -> WorkerSnapshot:
    return WorkerSnapshot(Peer(WorkerId(f"w{index}", 1), f"w{index}"), role, WorkerLoad(**load), inflight)


ids = st.sets(st.integers(0, 5)).map(lambda found: {WorkerId(f"w{index}", 1) for index in found})
snapshots = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=6).map(
    lambda loads: PoolSnapshot(
        tuple(worker(i, inflight=own, running_requests=seen) for i, (own, seen) in enumerate(loads))
    )
)


@given(snapshots, ids, ids, st.integers(0, 9))
def test_last_resorts_are_taken_only_where_nothing_else_is_left(
    snapshot: PoolSnapshot, avoid: set[WorkerId], last_resort: set[WorkerId], seed: int
) -> None:
    decision = place(snapshot, Role.VERIFY, avoid, random.Random(seed), last_resort)
    allowed = [each for each in snapshot.workers if each.peer.id not in avoid]
    better = [each for each in allowed if each.peer.id not in last_resort]
    assert (decision.choice is None) == (not allowed) == (decision.reason is PlacementReason.NONE_LEFT)
    assert (decision.reason is PlacementReason.LAST_RESORT) == bool(allowed and not better)
    if decision.choice is not None:
        pool = better or allowed
        assert decision.choice in pool
        least = min(max(each.load.running_requests, each.inflight_requests) for each in pool)
        assert max(decision.choice.load.running_requests, decision.choice.inflight_requests) == least


@given(st.integers(2, 6), st.integers(1, 60), st.integers(0, 9))
def test_requests_that_come_at_once_are_spread_evenly(workers: int, requests: int, seed: int) -> None:
    """Nothing is reported meanwhile: what this router sent has to be enough."""
    rng, sent = random.Random(seed), Counter[int]()
    for _ in range(requests):
        snapshot = PoolSnapshot(tuple(worker(index, inflight=sent[index]) for index in range(workers)))
        choice = place(snapshot, Role.VERIFY, set(), rng).choice
        assert choice is not None
        sent[int(choice.peer.id.name[1:])] += 1
    counts = [sent[index] for index in range(workers)]
    assert max(counts) - min(counts) <= 1


def test_several_routers_do_not_herd() -> None:
    """The same snapshot seen by many: equal workers are drawn evenly."""
    snapshot = PoolSnapshot(tuple(worker(index) for index in range(4)))
    drawn = Counter(str(place(snapshot, Role.VERIFY, set(), random.Random(seed)).choice) for seed in range(400))
    assert len(drawn) == 4
    assert min(drawn.values()) > 60


actions = st.lists(st.tuples(st.sampled_from(["arrive", "leave", "turn"]), st.integers(0, 30)), max_size=60)


@given(st.integers(1, 4), st.integers(0, 4), actions)
@example(2, 1, [*[("arrive", 0)] * 4, ("leave", 0), ("turn", 0), ("leave", 1), ("leave", 2), ("arrive", 0)])
def test_the_gate_keeps_its_bounds_and_its_order(
    max_active: int, max_queued: int, script: list[tuple[str, int]]
) -> None:
    async def main() -> None:
        counters = Metrics(ROUTER_SERIES)
        gate = Gate(AdmissionLimits(max_active, max_queued), counters)
        waited: list[int] = []
        tasks: list[asyncio.Task[None]] = []

        async def request(index: int) -> None:
            full, overtakes = gate.active >= max_active, gate.queued > 0
            async with gate.admitted():
                assert full or not overtakes, "whoever finds a free place takes it from nobody"
                if full:
                    waited.append(index)
                await asyncio.Event().wait()

        for action, which in script:
            if action == "arrive":
                tasks.append(asyncio.create_task(request(len(tasks))))
            elif action == "leave" and tasks:
                tasks[which % len(tasks)].cancel()
            else:
                await asyncio.sleep(0)
            assert 0 <= gate.active <= max_active
            assert 0 <= gate.queued <= max_queued
        for _ in range(4):
            await asyncio.sleep(0)
        assert waited == sorted(waited), "first come, first served"
        assert not (gate.queued and gate.active < max_active), "nobody waits beside a free place"
        assert (counters.value(ROUTER_ACTIVE), counters.value(ROUTER_QUEUED)) == (gate.active, gate.queued)
        for task in tasks:
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(each, asyncio.CancelledError | Overloaded) for each in outcomes), outcomes
        assert gate.active == gate.queued == 0

    run_virtual(main())


def test_one_that_is_cancelled_while_a_place_becomes_free() -> None:
    """In the same turn of the loop: cancelled first, then passed over."""

    async def main() -> None:
        gate = Gate(AdmissionLimits(1, 2), Metrics(ROUTER_SERIES))
        release = asyncio.Event()

        async def request() -> None:
            async with gate.admitted():
                await release.wait()

        first, second, third = (asyncio.create_task(request()) for _ in range(3))
        await asyncio.sleep(0)
        release.set()
        second.cancel()
        await first
        with pytest.raises(asyncio.CancelledError):
            await second
        await third
        assert gate.active == gate.queued == 0

    run_virtual(main())
