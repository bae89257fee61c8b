"""Requests of a verify worker that do not run to their end: cancelled, or given up."""

import pytest

from tests.support.benches import Bench
from tests.support.engines import SMALL
from tests.support.requests import plain, request_of
from tests.support.workers import settings_of
from tidemill.core import metrics
from tidemill.core.messages import Cancel, Failed, Failure, Refusal, Refused, Released, Reserve, Submit
from tidemill.core.model import Role


@pytest.fixture
def bench() -> Bench:
    return Bench(Role.VERIFY)


class TestCancelled:
    def test_while_waiting_for_blocks(self, bench: Bench) -> None:
        bench.send(Reserve(request_of(tokens=100), 10.0))
        bench.turn()
        bench.send(Cancel("r"))
        bench.assert_empty()
        assert bench.metrics.value(metrics.LEASES, end="aborted") == 1

    def test_in_the_queue(self) -> None:
        bench = Bench(Role.VERIFY, settings_of(SMALL.model_copy(update={"max_running": 1})))
        bench.send(Submit(request_of("a")))
        bench.send(Submit(request_of("b")))
        bench.turn()
        bench.send(Cancel("b"))
        bench.drain()
        assert bench.tokens("a") == plain(request_of())
        assert bench.events("b") == [Released("b")]
        bench.assert_empty()

    def test_in_its_prompt(self) -> None:
        bench = Bench(Role.VERIFY, settings_of(SMALL.model_copy(update={"max_batch_tokens": 16})))
        bench.send(Submit(request_of(tokens=50)))
        bench.turn()
        assert bench.engine.load().kv_blocks_used > 0
        bench.send(Cancel("r"))
        bench.assert_empty()
        assert bench.events("r") == [Released("r")]

    def test_while_decoding(self, bench: Bench) -> None:
        bench.send(Submit(request_of()))
        bench.turn(3)
        assert bench.tokens("r")
        bench.send(Cancel("r"))
        bench.assert_empty()
        assert not bench.over("r"), "a cancel is not answered"

    def test_by_the_end_of_the_routers_stream(self, bench: Bench) -> None:
        bench.loop.attach(2)
        bench.send(Submit(request_of("a", max_tokens=60)), router=1)
        bench.send(Submit(request_of("b", max_tokens=60)), router=2)
        bench.send(Reserve(request_of("c", 90), 10.0), router=2)
        bench.turn(2)
        bench.mailbox.deliver(lambda: bench.loop.detach(2))
        bench.drain()
        assert bench.tokens("a") == plain(request_of(max_tokens=60))
        bench.assert_empty()

    def test_only_by_its_own_router(self, bench: Bench) -> None:
        bench.loop.attach(2)
        bench.send(Submit(request_of()), router=1)
        bench.turn()
        bench.send(Cancel("r"), router=2)
        bench.drain()
        assert bench.tokens("r") == plain(request_of())

    def test_before_it_came(self, bench: Bench) -> None:
        bench.send(Cancel("r"))
        bench.assert_empty()


class TestGivenUp:
    def test_a_step_that_raises_costs_its_requests_and_not_the_worker(
        self, bench: Bench, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bench.send(Submit(request_of("a")))
        bench.send(Reserve(request_of("b", 100), 10.0))
        bench.turn(2)
        with monkeypatch.context() as patch:
            patch.setattr(bench.engine, "step", lambda: 1 / 0)
            bench.turn()
        for name in "ab":
            last = bench.last(name)
            assert isinstance(last, Failed)
            assert last.failure is Failure.ENGINE
            assert "ZeroDivisionError" in last.detail
        assert bench.metrics.value(metrics.ERRORS, failure="engine") == 2
        bench.turn(advance_s=1.1)
        bench.assert_empty()
        assert bench.loop.standing.accepting
        bench.send(Submit(request_of("c")))
        bench.drain()
        assert bench.tokens("c") == plain(request_of())

    def test_an_engine_that_stays_broken_takes_nothing(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        bench.send(Submit(request_of("a")))
        with monkeypatch.context() as patch:
            patch.setattr(bench.engine, "step", lambda: 1 / 0)
            bench.turn(2)
            assert not bench.loop.standing.accepting
            bench.send(Submit(request_of("b")))
            bench.turn(advance_s=1.1)
            assert bench.events("b") == [Refused("b", Refusal.DRAINING)]
            assert bench.loop.wait_s(bench.clock.now) > 0.4, "it does not spin meanwhile"
        bench.turn(advance_s=1.1)
        assert bench.loop.standing.accepting
        bench.assert_empty()

    def test_a_second_request_of_the_same_name(self, bench: Bench) -> None:
        bench.loop.attach(2)
        bench.send(Submit(request_of()), router=1)
        bench.send(Submit(request_of(tokens=60)), router=2)
        bench.drain()
        assert bench.tokens("r") == plain(request_of())
        assert [type(event) for event in bench.events("r", router=2)] == [Failed]
        bench.assert_empty()
