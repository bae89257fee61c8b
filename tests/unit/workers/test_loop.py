"""The engine loop: changes of role, what routers hear, and the end."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.benches import Bench, Trio
from tests.support.engines import SMALL, VOCABULARY, one_by_one
from tests.support.workers import settings_of
from tidemill.core import metrics
from tidemill.core.lifecycle import LEASE_MOVES, LeaseState
from tidemill.core.messages import Failed, Failure, Refusal, Refused, Reserve, Submit
from tidemill.core.metrics import WORKER_SERIES, Metrics
from tidemill.core.model import Peer, Request, Role, WorkerId, WorkerLoad
from tidemill.core.settings import Settings
from tidemill.types import SamplingParams
from workers.engine.base import Engine, Reservation
from workers.engine.emulated import EmulatedEngine
from workers.engines import Engines
from workers.kv.lease import LeaseTable
from workers.kv.link import Arrival
from workers.mailbox import Mailbox, MailboxFull
from workers.reports import HEARTBEAT_S, LOAD_PAUSE_S, Reports, Standing
from workers.role_switch import Move, RoleSwitch


def request_of(name: str = "r", tokens: int = 20, max_tokens: int = 24) -> Request:
    prompt = tuple(2 + i * 7 % (VOCABULARY - 2) for i in range(tokens))
    return Request(name, prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=1))


def plain(request: Request) -> tuple[int, ...]:
    return one_by_one(EmulatedEngine(SMALL, VOCABULARY), [request])[request.id]


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


class TestReports:
    """At most one message to each router and turn."""

    STANDING = Standing(WorkerId("w", 1), Role.VERIFY, True, WorkerLoad(kv_blocks_total=80))

    @pytest.fixture
    def reports(self) -> Reports:
        reports = Reports(Metrics(WORKER_SERIES))
        reports.attach(1)
        reports.attach(2)
        reports.collect(self.STANDING, 0.0)
        return reports

    def test_each_event_goes_to_the_router_that_asked(self, reports: Reports) -> None:
        for index in range(6):
            reports.take(f"r{index}", 1 + index % 2)
            reports.emit(Refused(f"r{index}", Refusal.NO_BLOCKS))
        sent = dict(reports.collect(self.STANDING, 0.01))
        assert [event.request_id for event in sent[1].events] == ["r0", "r2", "r4"]
        assert [event.request_id for event in sent[2].events] == ["r1", "r3", "r5"]
        assert reports.collect(self.STANDING, 0.02) == [], "nothing new, nothing said"

    def test_a_router_hears_nothing_of_the_others_turns(self, reports: Reports) -> None:
        reports.take("r", 2)
        reports.emit(Refused("r", Refusal.NO_BLOCKS))
        assert [router for router, _ in reports.collect(self.STANDING, 0.01)] == [2]

    def test_heartbeats(self, reports: Reports) -> None:
        assert not reports.collect(self.STANDING, HEARTBEAT_S - 0.01)
        assert len(reports.collect(self.STANDING, HEARTBEAT_S)) == 2
        assert not reports.collect(self.STANDING, HEARTBEAT_S + 0.01)

    def test_a_change_of_standing_is_told_at_once_and_one_of_load_soon(self, reports: Reports) -> None:
        closed = Standing(WorkerId("w", 1), Role.VERIFY, False, self.STANDING.load)
        assert len(reports.collect(closed, 0.001)) == 2
        fuller = Standing(WorkerId("w", 1), Role.VERIFY, False, WorkerLoad(kv_blocks_total=80, kv_blocks_used=10))
        assert not reports.collect(fuller, 0.002)
        assert len(reports.collect(fuller, 0.002 + LOAD_PAUSE_S)) == 2
        alike = Standing(WorkerId("w", 1), Role.VERIFY, False, WorkerLoad(kv_blocks_total=80, kv_blocks_used=11))
        assert not reports.collect(alike, 0.2)

    def test_a_new_router_hears_of_the_load_at_once(self, reports: Reports) -> None:
        reports.attach(3)
        assert 3 in dict(reports.collect(self.STANDING, 0.01))

    def test_what_a_router_leaves_behind(self, reports: Reports) -> None:
        reports.take("a", 1)
        reports.take("b", 2)
        assert reports.detach(1) == ["a"]
        reports.emit(Refused("a", Refusal.NO_BLOCKS))
        assert not reports.collect(self.STANDING, 0.01)
        assert not reports.take("b", 3)

    def test_a_step_with_many_requests_is_one_message(self) -> None:
        bench = Bench(Role.VERIFY)
        for index in range(10):
            bench.send(Submit(request_of(f"r{index}", max_tokens=12)))
        turns = 0
        while not all(bench.over(f"r{index}") for index in range(10)):
            bench.turn()
            turns += 1
        assert len(bench.sent) <= turns
        assert max(len(report.events) for _, report in bench.sent) == 10
        assert turns <= bench.metrics.value(metrics.STEPS, role="verify") + 1


class TestMailbox:
    def test_requests_are_bounded_and_ends_are_not(self) -> None:
        mailbox, done = Mailbox(limit=2), []
        mailbox.post(lambda: done.append(1))
        mailbox.post(lambda: done.append(2))
        with pytest.raises(MailboxFull):
            mailbox.post(lambda: done.append(3))
        mailbox.deliver(lambda: done.append(4))
        assert mailbox.run(0.0) == 3
        assert done == [1, 2, 4]

    def test_what_comes_meanwhile_waits_for_the_next_turn(self) -> None:
        mailbox, done = Mailbox(), []

        def again() -> None:
            done.append(1)
            mailbox.deliver(again)

        mailbox.deliver(again)
        assert mailbox.run(0.0) == 1
        assert mailbox.run(0.0) == 1
        assert done == [1, 1]

    def test_a_task_that_raises_does_not_stop_the_others(self) -> None:
        mailbox, done = Mailbox(), []
        mailbox.deliver(lambda: 1 / 0)
        mailbox.deliver(lambda: done.append(1))
        mailbox.run(0.0)
        assert done == [1]


class TestLeaseTable:
    HOLDER = Peer(WorkerId("v", 5), "here")

    def test_a_lease_ends_once(self) -> None:
        table = LeaseTable(self.HOLDER)
        for state in LEASE_MOVES[LeaseState.GRANTED]:
            entry = table.grant(request_of(), Reservation(1, 3), 10.0, 100.0)
            assert table.find(entry.lease.id) is table.of_request("r") is entry
            assert table.next_deadline() == 110.0
            table.end(entry, state)
            assert len(table) == 0
            assert table.find(entry.lease.id) is table.of_request("r") is None
            with pytest.raises(RuntimeError):
                table.end(entry, LeaseState.ABORTED)

    def test_numbers_are_of_their_epoch(self) -> None:
        first = LeaseTable(self.HOLDER)
        second = LeaseTable(Peer(WorkerId("v", 6), "here"))
        ids = [
            t.grant(request_of(str(i)), Reservation(0, 1), 1.0, 0.0).lease.id for t in (first, second) for i in range(9)
        ]
        assert len(set(ids)) == 18
        assert (
            max(
                LeaseTable(Peer(WorkerId("v", 1 << 42), "")).grant(request_of(), Reservation(0, 1), 1.0, 0.0).lease.id,
                0,
            )
            < 1 << 63
        )

    def test_expired(self) -> None:
        table = LeaseTable(self.HOLDER)
        entries = [table.grant(request_of(str(i)), Reservation(0, 1), float(i), 0.0) for i in range(1, 4)]
        assert table.expired(2.0) == entries[:2]


LEASE_EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("grant"), st.integers(0, 5)),
        st.tuples(st.just("blocks"), st.integers(0, 5)),
        st.tuples(st.sampled_from(sorted(LEASE_MOVES[LeaseState.GRANTED])), st.integers(0, 5)),
        st.tuples(st.just("time"), st.integers(1, 8)),
    ),
    max_size=60,
)


@given(LEASE_EVENTS)
def test_whatever_happens_to_leases_each_block_has_one_owner_and_each_lease_one_end(
    events: list[tuple[str, int]],
) -> None:
    """Against a plain picture of what is open: request -> its lease's (number, deadline, blocks that came)."""
    table, now, size = LeaseTable(TestLeaseTable.HOLDER), 0.0, 4
    model: dict[str, tuple[int, float, int]] = {}
    numbers: set[int] = set()
    for what, which in events:
        request, entry = request_of(str(which)), table.of_request(str(which))
        match what:
            case "grant" if entry is None:
                lease = table.grant(request, Reservation(0, size), 10.0, now).lease
                assert lease.id not in numbers, "a number is used once"
                numbers.add(lease.id)
                model[request.id] = (lease.id, now + 10.0, 0)
            case "blocks" if entry is not None and not entry.filled:
                entry.take(1, 0, 2, 2)
                number, deadline, came = model[request.id]
                model[request.id] = (number, deadline, came + 1)
            case "time":
                now += which
                for late in table.expired(now):
                    table.end(late, LeaseState.EXPIRED)
                    assert model.pop(late.lease.request_id)[1] <= now
            case LeaseState() as end if entry is not None:
                table.end(entry, end)
                with pytest.raises(RuntimeError):
                    table.end(entry, LeaseState.ABORTED)
                del model[request.id]
        found = {each.lease.request_id: (each.lease.id, each.deadline, each.next_block) for each in table}
        assert found == model
        assert all(each.filled == (each.next_block == size) for each in table)
        assert table.next_deadline() == min((deadline for _, deadline, _ in model.values()), default=None)


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
