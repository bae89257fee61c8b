"""The prefill role inside its loop; its links send when the test says so."""

import pytest

from tests.support.benches import Bench, ManualFeeder, Trio
from tests.support.engines import SMALL, VOCABULARY
from tests.support.workers import settings_of
from tidemill.core import metrics
from tidemill.core.messages import (
    Cancel,
    Failed,
    Failure,
    Lease,
    Prefill,
    Prefilled,
    Refusal,
    Refused,
    Reserve,
    Submit,
)
from tidemill.core.model import Peer, Request, Role, WorkerId
from tidemill.types import SamplingParams
from workers.kv import transfers
from workers.roles import prefill as role

HOLDER = Peer(WorkerId("verify-0", 7), "there")
CHUNKS = SMALL.model_copy(update={"max_batch_tokens": 40})


def request_of(name: str = "r", tokens: int = 101) -> Request:
    prompt = tuple(2 + i * 7 % (VOCABULARY - 2) for i in range(tokens))
    return Request(name, prompt, SamplingParams(max_tokens=4, seed=1))


def command(
    name: str = "r", tokens: int = 101, first_block: int = 0, holder: Peer = HOLDER, number: int = 5
) -> Prefill:
    lease = Lease(number, name, holder, first_block, -(-(tokens - 1) // 16), 10.0)
    return Prefill(request_of(name, tokens), lease)


@pytest.fixture
def bench() -> Bench:
    return Bench(Role.PREFILL, settings_of(CHUNKS))


def feeder_of(bench: Bench, holder: Peer = HOLDER) -> ManualFeeder:
    return bench.feeders[holder.id]


def ranges(feeder: ManualFeeder) -> list[tuple[int, int]]:
    return [(each.first_block, each.first_block + each.kv.shape[1]) for each in feeder.waiting]


def test_full_blocks_leave_after_each_step_and_the_rest_with_the_last(bench: Bench) -> None:
    bench.send(command())
    bench.mailbox.run(0.0)
    assert feeder_of(bench).prepared, "the link opens while the first chunk is computed"
    seen = []
    for _ in range(3):
        bench.turn()
        seen.append(ranges(feeder_of(bench)))
    assert seen == [[(0, 2)], [(0, 2), (2, 5)], [(0, 2), (2, 5), (5, 7)]]
    assert isinstance(bench.last("r"), Prefilled)
    assert bench.engine.load().kv_blocks_used == 0, "the copies belong to the link"
    assert all(each.lease_id == 5 for each in feeder_of(bench).waiting)


def test_blocks_the_holder_has_are_not_sent(bench: Bench) -> None:
    bench.send(command(first_block=3))
    bench.drain()
    assert ranges(feeder_of(bench)) == [(3, 5), (5, 7)]


def test_what_was_cached_here_is_sent_all_the_same(bench: Bench) -> None:
    bench.send(command("a", number=1))
    bench.drain()
    feeder_of(bench).waiting.clear()
    bench.send(command("b", number=2))
    bench.drain()
    sent = ranges(feeder_of(bench))
    assert sent[0][0] == 0
    assert sent[-1][1] == 7


def test_large_exports_go_in_messages_of_a_bounded_size(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfers, "MAX_MESSAGE_BYTES", 2 * bench.engine.info.kv.block_bytes)
    bench.send(command())
    bench.drain()
    assert ranges(feeder_of(bench)) == [(0, 2), (2, 4), (4, 5), (5, 7)]


def test_a_slow_link_holds_back_exports_and_not_the_computing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(role, "LINK_BACKLOG_BYTES", 1)
    bench.send(command())
    bench.turn(2)
    assert ranges(feeder_of(bench)) == [(0, 2)], "the second chunk's blocks stay in the pool meanwhile"
    bench.turn()
    assert ranges(feeder_of(bench)) == [(0, 2), (2, 7)]
    assert isinstance(bench.last("r"), Prefilled)


def test_the_engine_waits_when_all_links_are_behind(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(role, "MAX_BACKLOG_BYTES", 1)
    bench.send(command())
    bench.turn(3)
    assert ranges(feeder_of(bench)) == [(0, 2)]
    assert 0 < bench.loop.wait_s(bench.clock.now) <= role.BACKLOG_PAUSE_S
    feeder_of(bench).pop()
    bench.turn()
    assert ranges(feeder_of(bench)) == [(2, 5)]


def test_times_are_those_of_the_queue_and_of_the_steps(bench: Bench) -> None:
    bench.send(command())
    bench.mailbox.run(0.0)
    bench.clock.now += 2.0
    for _ in range(3):
        bench.turn(advance_s=1.0)
    done = bench.last("r")
    assert isinstance(done, Prefilled)
    assert done.queue_s == pytest.approx(3.0, abs=0.1)
    assert done.prefill_s == pytest.approx(2.0, abs=0.1)


def test_it_is_the_routers_until_the_last_message_is_sent(bench: Bench) -> None:
    bench.send(command())
    bench.drain()
    assert not bench.loop.role.idle
    feeder = feeder_of(bench)
    while feeder.waiting:
        feeder.sent(feeder.pop(), 0.001)
    bench.turn()
    assert bench.metrics.value(metrics.TRANSFER_BYTES, direction="sent") == 7 * bench.engine.info.kv.block_bytes
    bench.assert_empty()


@pytest.mark.parametrize("turns", [0, 1, 3], ids=["queued", "computing", "sending"])
def test_cancelled(bench: Bench, turns: int) -> None:
    bench.send(command())
    bench.mailbox.run(0.0)
    bench.turn(turns)
    bench.send(Cancel("r"))
    bench.turn()
    assert not feeder_of(bench).waiting, "what was not sent yet is dropped"
    bench.assert_empty()


@pytest.mark.parametrize("turns", [1, 3], ids=["computing", "sending"])
def test_a_link_that_breaks_costs_its_requests(bench: Bench, turns: int) -> None:
    bench.send(command("a", number=1))
    other = Peer(WorkerId("verify-1", 7), "elsewhere")
    bench.mailbox.run(0.0)
    bench.turn(turns)
    bench.send(command("b", holder=other, number=2))
    feeder_of(bench).break_link("cut")
    bench.drain()
    last = bench.last("a")
    assert isinstance(last, Failed)
    assert (last.failure, last.detail) == (Failure.KV_LINK, "cut")
    assert isinstance(bench.last("b"), Prefilled)
    assert bench.metrics.value(metrics.ERRORS, failure="kv_link") == 1
    feeder = feeder_of(bench, other)
    while feeder.waiting:
        feeder.sent(feeder.pop(), 0.001)
    bench.assert_empty()


def test_a_failure_of_an_earlier_lease_does_not_hurt_the_next(bench: Bench) -> None:
    bench.send(command(number=1))
    bench.drain()
    feeder = feeder_of(bench)
    late = feeder.pop()
    bench.send(Cancel("r"))
    bench.send(command(number=2))
    bench.turn()
    feeder.failed(late, "cut")
    bench.drain()
    assert isinstance(bench.last("r"), Prefilled)


def test_a_restarted_holder_ends_what_was_for_its_predecessor(bench: Bench) -> None:
    bench.send(command("old", number=1))
    bench.turn()
    restarted = Peer(WorkerId("verify-0", 8), "there")
    bench.send(command("new", holder=restarted, number=2))
    bench.drain()
    assert feeder_of(bench).closed
    last = bench.last("old")
    assert isinstance(last, Failed)
    assert last.failure is Failure.KV_LINK
    assert isinstance(bench.last("new"), Prefilled)


def test_links_nobody_uses_are_closed(bench: Bench) -> None:
    bench.send(command())
    bench.drain()
    bench.turn(advance_s=transfers.LINK_IDLE_S + 1)
    assert not feeder_of(bench).closed, "it still has something to send"
    bench.send(Cancel("r"))
    bench.turn()
    bench.turn(advance_s=transfers.LINK_IDLE_S + 1)
    assert feeder_of(bench).closed


@pytest.mark.parametrize(("first", "end"), [(0, 6), (0, 8), (7, 7), (8, 7)])
def test_a_lease_that_is_not_for_this_prompt(bench: Bench, first: int, end: int) -> None:
    bench.send(Prefill(request_of(), Lease(1, "r", HOLDER, first, end, 10.0)))
    bench.turn()
    assert isinstance(bench.last("r"), Failed)
    bench.assert_empty()


def test_refusals() -> None:
    bench = Bench(Role.PREFILL, settings_of(CHUNKS.model_copy(update={"max_waiting": 1})))
    bench.send(command("long", tokens=16 * SMALL.kv_blocks, number=1))
    bench.send(Submit(request_of("submitted")))
    bench.send(Reserve(request_of("reserved"), 1.0))
    bench.send(command("a", number=2))
    bench.send(command("b", number=3))
    bench.turn()
    assert bench.events("long") == [Refused("long", Refusal.TOO_LONG)]
    assert bench.events("submitted") == [Refused("submitted", Refusal.WRONG_ROLE)]
    assert bench.events("reserved") == [Refused("reserved", Refusal.WRONG_ROLE)]
    assert bench.events("b") == [Refused("b", Refusal.QUEUE_FULL)]


def test_preemption_sends_every_block_once() -> None:
    """Two prompts that do not fit together: one is computed again from the start, its blocks go out only once."""
    settings = settings_of(CHUNKS.model_copy(update={"kv_blocks": 9, "prefix_cache": False}))
    trio = Trio(settings)
    trio.verify = Bench(Role.VERIFY, settings_of(SMALL))
    for name, tokens in (("a", 101), ("b", 90)):
        trio.verify.send(Reserve(request_of(name, tokens), 10.0))
    trio.verify.turn()
    for name in "ab":
        trio.start_prefill(name)
    for _ in range(40):
        trio.prefill.turn()
        trio.carry_kv()
    trio.verify.drain()
    assert all(trio.verify.over(name) for name in "ab")
    assert all(trio.verify.tokens(name) for name in "ab")
    trio.assert_empty()
