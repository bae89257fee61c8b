"""The engine loop: changes of role, and the end."""

import pytest
import torch

from tests.support.benches import Bench, Trio
from tests.support.engines import SMALL, VOCABULARY
from tests.support.requests import plain, request_of
from tests.support.workers import settings_of
from tidemill.core import metrics
from tidemill.core.messages import Failed, Failure, Refusal, Refused, Reserve, Submit
from tidemill.core.model import Role
from tidemill.core.settings import Settings
from workers.engine.base import Engine
from workers.engine.emulated import EmulatedEngine
from workers.engines import Engines
from workers.kv.link import Arrival
from workers.role_switch import Move, RoleSwitch


def switch(bench: Bench, to: Role, drain_s: float = 5.0) -> RoleSwitch:
    wish = RoleSwitch(to, drain_s)
    bench.mailbox.deliver(lambda: bench.loop.begin_switch(wish))
    return wish


def loaded(bench: Bench) -> None:
    """Wait for the thread that loads a model, and hear what it says."""
    assert bench.mailbox.run(10.0) == 1
    bench.loop.turn(bench.clock.now)


class TestRoleSwitch:
    def test_prefill_and_verify_share_an_engine(self) -> None:
        made: list[Role] = []

        def make(settings: Settings, role: Role) -> Engine:
            made.append(role)
            return EmulatedEngine(settings.engine, VOCABULARY)

        bench = Bench(Role.VERIFY, make_engine=make)
        before, engine = bench.me, bench.engine
        wish = switch(bench, Role.PREFILL)
        bench.turn()
        assert wish.done.result(0) is None
        assert bench.engine is engine
        assert made == [Role.VERIFY]
        assert bench.me.id.epoch > before.id.epoch
        assert bench.left == 1, "links carry the old epoch"
        _, report = bench.sent[-1]
        assert (report.worker, report.role, report.accepting) == (bench.me.id, Role.PREFILL, True)

    def test_round_all_roles_with_equal_tokens(self) -> None:
        trio = Trio()
        for index, to in enumerate((Role.PREFILL, Role.DRAFT, Role.VERIFY, Role.DRAFT, Role.VERIFY)):
            wish = switch(trio.verify, to)
            trio.verify.turn()
            if index == 1:
                assert not wish.done.done(), "the draft model is not there yet"
                assert trio.verify.loop.standing.accepting, "it serves on while it loads"
                loaded(trio.verify)
            trio.verify.turn()
            assert wish.done.result(0) is None
            assert trio.verify.loop.standing.role is to
            if to is Role.VERIFY:
                request = request_of(f"r{index}", tokens=60 + 20 * index)
                trio.verify.send(Reserve(request, 10.0))
                trio.verify.turn()
                assert trio.start_prefill(request.id)
                trio.prefill.drain()
                trio.carry_kv()
                trio.verify.drain()
                assert trio.verify.tokens(request.id) == plain(request)
        trio.assert_empty()

    def test_running_requests_are_waited_for_and_new_ones_refused(self) -> None:
        bench = Bench(Role.VERIFY)
        bench.send(Submit(request_of("a")))
        bench.turn(2)
        wish = switch(bench, Role.PREFILL)
        bench.turn()
        bench.send(Submit(request_of("b")))
        bench.turn()
        assert bench.events("b") == [Refused("b", Refusal.DRAINING)]
        assert not bench.sent[-1][1].accepting
        assert bench.loop.becoming is Role.PREFILL
        bench.drain()
        assert bench.tokens("a") == plain(request_of())
        assert wish.done.result(0) is None
        assert bench.loop.becoming is None

    def test_what_does_not_end_in_time_is_given_up_under_the_old_epoch(self) -> None:
        bench = Bench(Role.VERIFY)
        old = bench.me.id
        bench.send(Reserve(request_of("a", 100), 50.0))
        bench.send(Submit(request_of("b", max_tokens=200)))
        bench.turn(2)
        block = torch.zeros(1, 1, 2, 1, 16, 4)
        bench.verify.on_kv(Arrival("link", "p@1", bench.granted("a").lease.id, 0, block), bench.clock.now)
        wish = switch(bench, Role.PREFILL, drain_s=1.0)
        bench.turn(2)
        assert not wish.done.done()
        assert bench.loop.wait_s(bench.clock.now) <= 1.0
        bench.turn(advance_s=1.1)
        assert wish.done.result(0) is None
        for name in "ab":
            last = bench.last(name)
            assert isinstance(last, Failed)
            assert last.failure is Failure.ROLE_CHANGED
        telling = [report for _, report in bench.sent if any(isinstance(e, Failed) for e in report.events)]
        assert [report.worker for report in telling] == [old]
        assert bench.metrics.value(metrics.LEASES, end="aborted") == 1
        assert bench.metrics.value(metrics.KV_BLOCKS_LEASED, role="verify") == 0
        bench.assert_empty()

    def test_what_has_not_begun_is_handed_back_at_once(self) -> None:
        bench = Bench(Role.VERIFY, settings_of(SMALL.model_copy(update={"max_running": 1})))
        for command in (
            Submit(request_of("a")),
            Submit(request_of("queued")),
            Reserve(request_of("leased", 100), 50.0),
        ):
            bench.send(command)
        bench.turn(2)
        switch(bench, Role.PREFILL)
        bench.turn()
        assert bench.last("queued") == Refused("queued", Refusal.DRAINING)
        assert bench.last("leased") == Refused("leased", Refusal.DRAINING)
        assert bench.engine.load().kv_blocks_leased == 0
        bench.drain()
        assert bench.tokens("a") == plain(request_of())
        bench.assert_empty()

    def test_drafts_are_not_worth_waiting_for(self) -> None:
        bench = Bench(Role.DRAFT)
        wish = switch(bench, Role.VERIFY, drain_s=60.0)
        bench.turn()
        loaded(bench)
        bench.turn()
        assert wish.done.result(0) is None

    def test_a_model_that_cannot_be_loaded_changes_nothing(self) -> None:
        def make(settings: Settings, role: Role) -> Engine:
            if role is Role.DRAFT:
                raise ValueError("no such folder")
            return EmulatedEngine(settings.engine, VOCABULARY)

        bench = Bench(Role.VERIFY, make_engine=make)
        before = bench.me
        bench.send(Submit(request_of("a")))
        wish = switch(bench, Role.DRAFT)
        bench.turn()
        loaded(bench)
        with pytest.raises(ValueError, match="no such folder"):
            wish.done.result(0)
        assert bench.me == before
        bench.drain()
        assert bench.tokens("a") == plain(request_of())

    def test_a_role_that_does_not_answer_its_probe_is_not_taken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        bench = Bench(Role.VERIFY)
        before = bench.me.id
        with monkeypatch.context() as patch:
            patch.setattr(bench.engine, "prefill", lambda _: 1 / 0)
            wish = switch(bench, Role.PREFILL)
            bench.turn()
        with pytest.raises(ZeroDivisionError):
            wish.done.result(0)
        standing = bench.loop.standing
        assert (standing.role, standing.accepting) == (Role.VERIFY, True)
        assert standing.worker.epoch > before.epoch, "what it held before is gone, and peers must know"
        bench.send(Submit(request_of()))
        bench.drain()
        assert bench.tokens("r") == plain(request_of())

    def test_one_at_a_time_and_none_to_where_it_is(self) -> None:
        bench = Bench(Role.VERIFY)
        bench.send(Submit(request_of()))
        bench.turn(2)
        same = switch(bench, Role.VERIFY)
        first = switch(bench, Role.PREFILL)
        second = switch(bench, Role.PREFILL)
        bench.turn()
        assert same.done.result(0) is None
        assert not first.done.done()
        with pytest.raises(RuntimeError, match="changing its role"):
            second.done.result(0)

    def test_moves(self) -> None:
        wish = RoleSwitch(Role.DRAFT, drain_s=2.0)
        assert wish.next_move(0.0, idle=True) is Move.WAIT
        wish.finish_loading(None)
        assert wish.next_move(0.0, idle=True) is Move.DRAIN
        wish.drain(0.0)
        assert wish.next_move(1.9, idle=False) is Move.WAIT
        assert wish.next_move(1.9, idle=True) is Move.SWITCH
        assert wish.next_move(2.0, idle=False) is Move.SWITCH
        wish.finish_loading(ValueError())
        assert wish.next_move(2.0, idle=True) is Move.ABANDON


class TestRetirement:
    def test_what_runs_is_finished_and_nothing_new_is_taken(self) -> None:
        bench = Bench(Role.VERIFY)
        request = request_of("a", max_tokens=6)
        bench.send(Submit(request))
        bench.turn()
        leave = RoleSwitch(None, 60.0)
        bench.mailbox.deliver(lambda: bench.loop.begin_switch(leave))
        bench.turn()
        assert not leave.done.done()
        bench.send(Submit(request_of("late")))
        while not leave.done.done():
            bench.turn()
        assert bench.tokens("a") == plain(request)
        assert bench.events("late") == [Refused("late", Refusal.DRAINING)]
        assert bench.loop.standing.accepting is False
        bench.assert_empty()
        again = switch(bench, Role.PREFILL)
        bench.turn()
        with pytest.raises(RuntimeError, match="or stopping"):
            again.done.result(0)

    def test_what_has_not_ended_in_time_goes_elsewhere(self) -> None:
        bench = Bench(Role.VERIFY)
        bench.send(Submit(request_of("a", max_tokens=400)))
        bench.turn()
        leave = RoleSwitch(None, 1.0)
        bench.mailbox.deliver(lambda: bench.loop.begin_switch(leave))
        bench.turn()
        bench.turn(advance_s=1.1)
        assert leave.done.result(0) is None
        last = bench.last("a")
        assert isinstance(last, Failed)
        assert last.failure is Failure.STOPPING
        bench.assert_empty()


class TestEnd:
    def test_everything_is_given_up_and_said(self) -> None:
        bench = Bench(Role.VERIFY)
        bench.send(Submit(request_of("a")))
        bench.turn(2)
        wish = switch(bench, Role.PREFILL)
        bench.turn()
        bench.loop._stopping.set()
        bench.send(Submit(request_of("c")))
        bench.loop.end()
        last = bench.last("a")
        assert isinstance(last, Failed)
        assert last.failure is Failure.STOPPING
        assert bench.events("c") == [Refused("c", Refusal.DRAINING)]
        assert bench.left == 1
        assert bench.engine.load().kv_blocks_used == 0
        with pytest.raises(RuntimeError, match="stopping"):
            wish.done.result(0)


def test_engines_are_loaded_once() -> None:
    made: list[Role] = []

    def make(settings: Settings, role: Role) -> Engine:
        made.append(role)
        return EmulatedEngine(settings.engine, VOCABULARY)

    engines = Engines(settings_of(), make)
    assert engines.of(Role.VERIFY) is engines.of(Role.PREFILL)
    assert not engines.has(Role.DRAFT)
    assert engines.of(Role.DRAFT) is engines.of(Role.DRAFT) is not engines.of(Role.VERIFY)
    assert made == [Role.VERIFY, Role.DRAFT]
