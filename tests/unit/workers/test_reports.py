"""What routers hear of a worker, and when."""

import pytest

from tests.support.benches import Bench
from tests.support.requests import request_of
from tidemill.core import metrics
from tidemill.core.messages import Refusal, Refused, Submit
from tidemill.core.metrics import WORKER_SERIES, Metrics
from tidemill.core.model import Role, WorkerId, WorkerLoad
from workers.reports import HEARTBEAT_S, LOAD_PAUSE_S, Reports, Standing


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
