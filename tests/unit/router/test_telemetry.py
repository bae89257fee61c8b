"""Sliding windows: what counts when, what is forgotten, and that memory is bounded."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.telemetry import merge, outlook
from router.journey import Journey
from router.telemetry import BUCKET_S, NOTHING, Counted, Sliding, Telemetry, count
from tidemill.core.messages import FirstToken, Prefilled, Tokens
from tidemill.core.model import Request, Role, SloClass, WorkerId, WorkerLoad
from tidemill.core.picture import FrontDoor, Outlook
from tidemill.core.telemetry import Traffic, Waiting
from tidemill.types import FinishReason, SamplingParams

SLO = SloClass("chat", 1.0, 0.1)


def journey(name: str, at: float, prompt: int = 100, slo: SloClass = SLO) -> Journey:
    return Journey(Request(name, (1,) * prompt, SamplingParams(), slo=slo), at, at + 60.0)


def served(telemetry: Telemetry, name: str, at: float, ttft_s: float, tpot_s: float, tokens: int = 11) -> None:
    """A request's whole life, prefilled elsewhere."""
    one = journey(name, at)
    telemetry.arrived(one, at)
    one.prefill_worker = "p@1"
    one.prefilled(Prefilled(name, 0.0, ttft_s / 2), at + ttft_s * 0.75)
    one.took(Tokens(name, (1,), first=FirstToken(0.0, 0.0, ttft_s / 8)), at + ttft_s)
    telemetry.started(one, at + ttft_s)
    end = at + ttft_s + tpot_s * (tokens - 1)
    one.took(Tokens(name, (1,) * (tokens - 1), finish=FinishReason.LENGTH), end)
    telemetry.ended(one, end, failed=False)


def test_a_request_counts_when_it_arrives_starts_and_ends() -> None:
    telemetry = Telemetry((2.0, 60.0), 0.0)
    served(telemetry, "good", 10.0, 0.8, 0.05)
    served(telemetry, "slow start", 10.0, 1.6, 0.05)
    served(telemetry, "slow end", 10.0, 0.4, 0.2)
    [short, long] = telemetry.snapshot(14.0).windows
    assert short.all.arrived == 0, "they came more than two seconds ago"
    traffic = dict(long.classes)["chat"]
    assert (traffic.arrived, traffic.prompt_tokens, traffic.prompt_squares) == (3, 300, 30_000)
    assert (traffic.started, traffic.ttft_met) == (3, 2)
    parts = (traffic.queue_s, traffic.prefill_s, traffic.transfer_s, traffic.first_decode_s)
    assert sum(parts) == pytest.approx(0.8 + 1.6 + 0.4), "the parts add up to TTFT"
    assert traffic.ttft_of_goal == pytest.approx(2.8)
    assert (traffic.finished, traffic.tpot_met, traffic.met, traffic.failed) == (3, 2, 1, 0)
    assert traffic.tpot_of_goal == pytest.approx(0.5 + 0.5 + 2.0)
    assert traffic.attainment == pytest.approx(1 / 3)


def test_lengths_of_outputs_belong_to_the_traffic_that_brought_them() -> None:
    telemetry = Telemetry((2.0, 60.0), 0.0)
    served(telemetry, "long ago", 10.0, 0.5, 0.3, tokens=40)  # ends at 22.2
    [short, long] = telemetry.snapshot(23.0).windows
    assert (short.all.finished, short.all.known) == (1, 0)
    assert (long.all.known, long.all.output_tokens) == (1, 40)
    assert long.all.attended_tokens == 40 * 100 + 40 * 40 // 2


def test_a_client_that_leaves_is_no_failure_and_waits_no_more() -> None:
    telemetry = Telemetry((60.0,), 0.0)
    gone, lost = journey("gone", 1.0), journey("lost", 1.0, slo=SloClass("tight", 0.5, 0.01))
    for each in (gone, lost):
        telemetry.arrived(each, 1.0)
    assert telemetry.snapshot(2.0).waiting == Waiting(2, 200, 2.0)
    telemetry.ended(gone, 2.0, failed=False)
    telemetry.ended(lost, 2.0, failed=True)
    picture = telemetry.snapshot(2.0)
    assert picture.waiting == Waiting()
    assert {name: each.failed for name, each in picture.windows[0].classes} == {"chat": 0, "tight": 1}


def test_a_worker_is_seen_step_by_step() -> None:
    telemetry = Telemetry((60.0,), 0.0)
    me = WorkerId("v", 1)
    for turn in range(1, 101):
        load = WorkerLoad(0, 0, 4, 100, 10, 0, 16, turn, 0.05, busy_s=turn * 0.04)
        telemetry.reported(me, Role.VERIFY, True, load, Counted(8, 4, 6, 4), turn * 0.05)
    picture = telemetry.snapshot(5.0)
    [worker] = picture.workers
    assert (worker.worker, worker.role, worker.accepting, worker.stalled_s) == (me, Role.VERIFY, True, 0.0)
    progress = picture.windows[0].of(Role.VERIFY)
    assert progress.steps.seconds / progress.steps.samples == pytest.approx(0.05)
    assert progress.steps.running / progress.steps.samples == 4
    assert progress.tokens_per_verify == 2.0
    assert progress.acceptance == pytest.approx(4 / 6)
    assert progress.busy_s / progress.seconds == pytest.approx(0.8, rel=0.05)
    assert picture.windows[0].of(Role.PREFILL).seconds == 0.0


def test_a_worker_that_has_work_and_does_nothing_is_stalled() -> None:
    telemetry = Telemetry((60.0,), 0.0)
    me, busy = WorkerId("v", 1), WorkerLoad(running_requests=2, steps=7)
    telemetry.reported(me, Role.VERIFY, True, busy, Counted(2, 2), 1.0)
    for at in (2.0, 3.0, 4.0):
        telemetry.reported(me, Role.VERIFY, True, busy, NOTHING, at)
    [worker] = telemetry.snapshot(4.5).workers
    assert (worker.stalled_s, worker.heard_s) == (3.5, 0.5)
    telemetry.reported(me, Role.VERIFY, True, WorkerLoad(steps=7), NOTHING, 5.0)
    [worker] = telemetry.snapshot(6.0).workers
    assert worker.stalled_s == 0.0, "nothing to do is no stall"
    assert not telemetry.snapshot(60.0).workers, "one that was not heard for long is forgotten"


def test_events_are_added_up() -> None:
    events = (Prefilled("a", 0.0, 0.1), Tokens("b", (1, 2, 3), drafted=4, accepted=2), Tokens("c", (1,)))
    assert count(events, 70) == Counted(4, 2, 4, 2, 70)
    assert count((), 0) is NOTHING


@given(st.lists(st.tuples(st.integers(0, 300), st.integers(1, 9)), max_size=60), st.integers(1, 40))
def test_sliding_sums_are_those_of_the_events_and_memory_is_bounded(
    events: list[tuple[int, int]], buckets: int
) -> None:
    """Against the slow way: keep everything, add what is recent."""
    events.sort()
    horizon_s = buckets * BUCKET_S
    sliding = Sliding(Traffic(), horizon_s)
    for tick, amount in events:
        sliding.add(Traffic(arrived=amount), tick * 0.1)
    now = (events[-1][0] if events else 0) * 0.1
    [found] = sliding.totals((horizon_s,), now)
    first = now // BUCKET_S - buckets + 1
    assert found.arrived == sum(amount for tick, amount in events if tick * 0.1 // BUCKET_S >= first)
    assert len(sliding._buckets) <= buckets + 1


def test_two_routers_add_up_to_one() -> None:
    """The same requests and reports through one router, or half through each of two."""
    one, halves = Telemetry((5.0, 60.0), 0.0), [Telemetry((5.0, 60.0), 0.0) for _ in range(2)]
    for index in range(20):
        for telemetry in (one, halves[index % 2]):
            served(telemetry, f"r{index}", 10.0 + index / 8, 0.3, 0.05)
    for turn in range(1, 81):
        load = WorkerLoad(0, 0, 4, 100, 10, 0, 16, turn, 0.05, busy_s=turn * 0.04)
        report = (WorkerId("v", 1), Role.VERIFY, True, load)
        one.reported(*report, Counted(4, 4), 10 + turn * 0.05)
        for telemetry in halves:
            telemetry.reported(*report, Counted(2, 2), 10 + turn * 0.05)
    whole, merged = one.snapshot(14.0), merge([each.snapshot(14.0) for each in halves])
    assert merged.windows[1].classes == whole.windows[1].classes
    assert merged.waiting == whole.waiting
    assert merged.workers[0].load == whole.workers[0].load
    ours, theirs = merged.windows[1].of(Role.VERIFY), whole.windows[1].of(Role.VERIFY)
    assert (ours.tokens, ours.verifies) == (theirs.tokens, theirs.verifies)
    assert ours.busy_s == pytest.approx(theirs.busy_s), "both saw all of the worker's time"
    assert pickle.loads(pickle.dumps(merged)) == merged
    seen = [Outlook(front(f"h:{port}"), each.present(14.0), each.history(14.0), ()) for port, each in enumerate(halves)]
    alone = Outlook(front("h:0,h:1", 2), one.present(14.0), one.history(14.0), ()).picture(0.0)
    together = outlook(seen).picture(0.0)
    assert together.front == alone.front
    assert together.classes == alone.classes
    assert together.tokens == alone.tokens
    assert [each.running for each in together.pools] == [each.running for each in alone.pools]


def front(address: str, routers: int = 1) -> FrontDoor:
    return FrontDoor("test", address, "tiny", 3 * routers, routers, True)


def test_of_two_routers_the_one_that_knows_the_newer_incarnation_is_right() -> None:
    old, new = Telemetry((60.0,), 0.0), Telemetry((60.0,), 0.0)
    old.reported(WorkerId("w", 1), Role.PREFILL, True, WorkerLoad(), NOTHING, 1.0)
    new.reported(WorkerId("w", 2), Role.VERIFY, True, WorkerLoad(), NOTHING, 1.0)
    for order in ((old, new), (new, old)):
        [worker] = merge([each.snapshot(1.5) for each in order]).workers
        assert (worker.worker.epoch, worker.role) == (2, Role.VERIFY)
