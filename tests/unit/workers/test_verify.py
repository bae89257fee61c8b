"""The verify role inside its loop, without threads, sockets or time of its own."""

import pytest
import torch

from tests.support.benches import Bench, Trio
from tests.support.engines import SMALL, VOCABULARY, one_by_one, random_requests
from tests.support.requests import plain
from tests.support.workers import settings_of
from tidemill.core import metrics
from tidemill.core.messages import (
    Cancel,
    Failed,
    Failure,
    LeaseGranted,
    Prefill,
    Proceed,
    Refusal,
    Refused,
    Reserve,
    Submit,
    Tokens,
)
from tidemill.core.model import Peer, Request, Role, WorkerId
from tidemill.types import SamplingParams
from workers.engine.emulated import EmulatedEngine
from workers.kv.link import Arrival


def request_of(name: str = "r", tokens: int = 50, max_tokens: int = 6) -> Request:
    prompt = tuple(2 + i * 7 % (VOCABULARY - 2) for i in range(tokens))
    return Request(name, prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=1))


def kv(blocks: int) -> torch.Tensor:
    return torch.zeros(1, blocks, 2, 1, 16, 4)


@pytest.fixture
def bench() -> Bench:
    return Bench(Role.VERIFY)


class TestSubmitted:
    def test_tokens_come_one_a_step_and_the_first_says_where_the_time_went(self, bench: Bench) -> None:
        request = request_of()
        bench.send(Submit(request))
        bench.drain()
        events = bench.events("r")
        assert all(isinstance(event, Tokens) and len(event.tokens) == 1 for event in events)
        assert bench.tokens("r") == plain(request)
        assert [event.first is not None for event in events if isinstance(event, Tokens)] == [True] + [False] * 5
        bench.assert_empty()

    def test_queue_ends_with_the_first_step_that_computes_a_part_of_it(self) -> None:
        bench = Bench(Role.VERIFY, settings_of(SMALL.model_copy(update={"max_batch_tokens": 16})))
        bench.send(Submit(request_of(tokens=50)))
        bench.mailbox.run(0.0)
        bench.clock.now += 5.0
        for _ in range(4):
            bench.turn(advance_s=1.0)
        first = bench.events("r")[0]
        assert isinstance(first, Tokens)
        assert first.first is not None
        assert first.first.queue_s == pytest.approx(6.0, abs=0.1)
        assert first.first.prefill_s == pytest.approx(3.0, abs=0.1)
        assert first.first.decode_s == 0.0

    def test_too_long(self, bench: Bench) -> None:
        bench.send(Submit(request_of(tokens=16 * SMALL.kv_blocks)))
        bench.turn()
        assert bench.events("r") == [Refused("r", Refusal.TOO_LONG)]
        bench.assert_empty()

    def test_a_full_queue_refuses(self) -> None:
        bench = Bench(Role.VERIFY, settings_of(SMALL.model_copy(update={"max_waiting": 2})))
        for name in "abc":
            bench.send(Submit(request_of(name)))
        bench.turn()
        assert bench.events("c") == [Refused("c", Refusal.QUEUE_FULL)]
        bench.drain()
        assert bench.tokens("a") == bench.tokens("b") == plain(request_of())
        bench.assert_empty()

    def test_leases_do_not_count_as_a_queue(self) -> None:
        bench = Bench(Role.VERIFY, settings_of(SMALL.model_copy(update={"max_waiting": 1})))
        bench.send(Reserve(request_of("leased", 100), 10.0))
        bench.send(Submit(request_of("a")))
        bench.drain()
        assert bench.tokens("a") == plain(request_of())

    def test_a_token_outside_the_vocabulary_never_reaches_the_engine(self, bench: Bench) -> None:
        bench.send(Submit(Request("r", (1, VOCABULARY), SamplingParams(seed=1))))
        bench.turn()
        assert isinstance(bench.last("r"), Failed)
        bench.assert_empty()

    def test_what_a_verify_worker_does_not_do(self, bench: Bench) -> None:
        bench.send(Reserve(request_of("leased"), 10.0))
        bench.turn()
        bench.send(Prefill(request_of("r"), bench.granted("leased").lease))
        bench.turn()
        assert bench.events("r") == [Refused("r", Refusal.WRONG_ROLE)]


class TestLeased:
    def test_blocks_come_in_parts_then_it_decodes(self) -> None:
        trio = Trio()
        request = request_of(tokens=100)
        trio.verify.send(Reserve(request, 10.0))
        trio.verify.turn()
        lease = trio.verify.granted("r").lease
        assert (lease.first_block, lease.end_block, lease.ttl_s) == (0, 7, 10.0)
        assert lease.holder.id == trio.verify.me.id
        assert trio.verify.engine.load().kv_blocks_leased == 7
        trio.start_prefill("r")
        trio.prefill.turn()
        assert trio.carry_kv() == 1, "the first chunk leaves before the second is computed"
        assert not trio.verify.tokens("r")
        trio.prefill.turn(2)
        trio.carry_kv()
        trio.verify.drain()
        assert trio.verify.tokens("r") == plain(request)
        assert trio.verify.metrics.value(metrics.LEASES, end="committed") == 1
        trio.assert_empty()

    def test_nothing_is_computed_twice(self) -> None:
        trio = Trio()
        trio.verify.send(Reserve(request_of(tokens=100, max_tokens=1), 10.0))
        trio.verify.turn()
        trio.start_prefill("r")
        trio.prefill.drain()
        trio.carry_kv()
        trio.verify.drain()
        assert (
            trio.prefill.metrics.registry.get_sample_value("tidemill_worker_step_tokens_sum", {"role": "prefill"}) == 99
        )
        assert trio.verify.metrics.registry.get_sample_value("tidemill_worker_step_tokens_sum", {"role": "verify"}) == 1

    def test_a_prefix_found_here_is_not_sent_and_one_found_whole_needs_nobody(self) -> None:
        trio = Trio()
        for name, tokens in (("a", 65), ("b", 100), ("c", 65)):
            trio.verify.send(Reserve(request_of(name, tokens), 10.0))
            trio.verify.turn()
            if trio.start_prefill(name):
                trio.prefill.drain()
                trio.carry_kv()
            trio.verify.drain()
            assert trio.verify.tokens(name) == plain(request_of(name, tokens))
        lease = trio.verify.granted("b").lease
        assert (lease.first_block, lease.end_block) == (4, 7)
        lease = trio.verify.granted("c").lease
        assert lease.first_block == lease.end_block == 4
        trio.assert_empty()

    def test_no_blocks(self) -> None:
        bench = Bench(Role.VERIFY, settings_of(SMALL.model_copy(update={"kv_blocks": 10})))
        bench.send(Reserve(request_of("a", 100), 10.0))
        bench.send(Reserve(request_of("b", 100), 10.0))
        bench.send(Reserve(request_of("c", 160), 10.0))
        bench.turn()
        assert isinstance(bench.last("a"), LeaseGranted)
        assert bench.events("b") == [Refused("b", Refusal.NO_BLOCKS)]
        assert bench.events("c") == [Refused("c", Refusal.TOO_LONG)]
        bench.send(Cancel("a"))
        bench.assert_empty()

    def test_it_expires_and_late_blocks_hurt_nobody(self) -> None:
        trio = Trio()
        trio.verify.send(Reserve(request_of(tokens=100), 10.0))
        trio.verify.turn()
        assert trio.verify.loop.role.next_poll_at() == 110.0
        trio.start_prefill("r")
        trio.prefill.drain()
        trio.verify.turn(advance_s=9.9)
        assert len(trio.verify.events("r")) == 1
        trio.verify.turn(advance_s=0.2)
        last = trio.verify.last("r")
        assert isinstance(last, Failed)
        assert last.failure is Failure.LEASE_EXPIRED
        assert trio.verify.metrics.value(metrics.LEASES, end="expired") == 1
        assert trio.verify.metrics.value(metrics.ERRORS, failure="lease_expired") == 1
        trio.carry_kv()
        trio.assert_empty()

    def test_a_link_that_breaks_costs_what_has_not_come_of_those_it_fed(self) -> None:
        """They go on from what came; others wait for theirs."""
        trio = Trio()
        for name in "ab":
            trio.verify.send(Reserve(request_of(name, 100 if name == "a" else 120), 10.0))
        trio.verify.turn()
        trio.start_prefill("a")
        trio.prefill.turn()
        assert trio.carry_kv() == 1
        trio.break_link()
        assert trio.verify.metrics.value(metrics.LEASES, end="cut") == 1
        rows = trio.verify.metrics.registry
        before = rows.get_sample_value("tidemill_worker_step_tokens_sum", {"role": "verify"}) or 0.0
        trio.verify.drain()
        assert trio.verify.tokens("a") == plain(request_of("a", 100))
        computed = (rows.get_sample_value("tidemill_worker_step_tokens_sum", {"role": "verify"}) or 0.0) - before
        assert computed < 100 - 16 + len(trio.verify.tokens("a")), "what came was computed again"
        assert isinstance(trio.verify.last("b"), LeaseGranted)
        trio.cancel_all(["a", "b"])
        trio.assert_empty()

    @pytest.mark.parametrize("blocks", [0, 1])
    def test_the_router_says_that_no_more_will_come(self, blocks: int) -> None:
        trio = Trio()
        request = request_of(tokens=100)
        trio.verify.send(Reserve(request, 10.0))
        trio.verify.turn()
        trio.start_prefill("r")
        trio.prefill.turn()
        trio.carry_kv(blocks)
        for _ in range(2):  # the second time there is nothing to say any more
            trio.verify.send(Proceed("r"))
            trio.verify.turn()
        trio.verify.send(Proceed("r"), router=2)
        trio.verify.drain()
        assert trio.verify.tokens("r") == plain(request)
        assert trio.verify.metrics.value(metrics.LEASES, end="cut") == 1
        trio.carry_kv()
        trio.cancel_all(["r"])
        trio.assert_empty()

    def test_the_end_of_an_older_link_does_not_hurt_what_a_newer_one_feeds(self, bench: Bench) -> None:
        bench.send(Reserve(request_of(tokens=100), 10.0))
        bench.turn()
        lease = bench.granted("r").lease
        bench.verify.on_kv(Arrival("new", "p@1", lease.id, 0, kv(2)), 100.0)
        bench.verify.on_kv(Arrival("old", "p@1", error="cut"), 100.0)
        bench.turn()
        assert isinstance(bench.last("r"), LeaseGranted)

    @pytest.mark.parametrize(
        ("first_block", "blocks"), [(1, 2), (0, 8), (6, 1)], ids=["a gap", "too many", "not the next"]
    )
    def test_blocks_that_do_not_fit_fail_the_request(self, bench: Bench, first_block: int, blocks: int) -> None:
        bench.send(Reserve(request_of(tokens=100), 10.0))
        bench.turn()
        done: list[bool] = []
        arrival = Arrival(
            "l", "p@1", bench.granted("r").lease.id, first_block, kv(blocks), done=lambda: done.append(True)
        )
        bench.verify.on_kv(arrival, 100.0)
        bench.turn()
        last = bench.last("r")
        assert isinstance(last, Failed)
        assert last.failure is Failure.KV_LINK
        assert done == [True], "the link's memory is given back"
        bench.assert_empty()

    def test_lease_numbers_of_another_epoch_are_unknown(self) -> None:
        benches = [Bench(Role.VERIFY) for _ in range(2)]
        for bench in benches:
            bench.send(Reserve(request_of(tokens=100), 10.0))
            bench.turn()
        first, second = (bench.granted("r").lease.id for bench in benches)
        if benches[0].me.id.epoch != benches[1].me.id.epoch:
            assert first != second


def test_a_loop_with_nothing_it_can_do_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that waits for blocks a lease holds must not make the thread spin."""
    bench = Bench(Role.VERIFY, settings_of(SMALL.model_copy(update={"kv_blocks": 8})))
    bench.send(Reserve(request_of("a", 100), 10.0))
    bench.send(Submit(request_of("b", 100)))
    bench.turn()
    assert bench.loop.wait_s(bench.clock.now) > 0.001
    bench.send(Cancel("a"))
    bench.turn()
    bench.drain()
    assert bench.tokens("b") == plain(request_of("b", 100))
    bench.assert_empty()


def test_a_worker_at_rest_wakes_for_its_heartbeat_and_its_deadlines_only(bench: Bench) -> None:
    bench.turn()
    assert bench.loop.wait_s(bench.clock.now) == pytest.approx(0.5)
    bench.send(Reserve(request_of(tokens=100), 0.2))
    bench.turn()
    assert bench.loop.wait_s(bench.clock.now) == pytest.approx(0.2)


def test_mixed_requests_in_one_batch_get_their_own_tokens(bench: Bench) -> None:
    requests = random_requests(seed=11)
    expected = one_by_one(EmulatedEngine(SMALL, VOCABULARY), requests)
    for request in requests:
        bench.send(Submit(request, Peer(WorkerId("draft-0", 1), "nowhere")))
    bench.drain()
    assert {request.id: bench.tokens(request.id) for request in requests} == expected
    bench.assert_empty()
