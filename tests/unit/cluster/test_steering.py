"""The controller without Ray: what it records and counts, how switches end, and who is a member."""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.controller import SILENT_ROUNDS, Membership, staff_of
from cluster.policy.rebalance import RebalanceReason
from cluster.policy.scaling import ScalingReason, plan
from cluster.pools import WorkerReport
from cluster.steering import KEPT_DECISIONS, Steering, describe_decisions
from tests.support.fluid import Load, cluster_of
from tests.support.scripted_worker import router_settings
from tidemill.core import metrics
from tidemill.core.metrics import CONTROLLER_SERIES, Metrics
from tidemill.core.model import Member, Peer, Role, WorkerId
from tidemill.core.settings import ControllerSettings, RoleBounds
from tidemill.core.telemetry import RouterTelemetry

PROMPTS = Load(30, 1800, 40)


def steering(**changes: object) -> tuple[Steering, Metrics]:
    counters = Metrics(CONTROLLER_SERIES)
    controller = ControllerSettings.model_validate(changes)
    return Steering(router_settings().model_copy(update={"controller": controller}), counters), counters


def test_a_decision_is_recorded_counted_and_under_way_until_it_ends() -> None:
    steers, counters = steering()
    cluster = cluster_of(4, 0, 8)
    begun: tuple[object, ...] = ()
    while not begun:
        cluster.advance(PROMPTS)
        begun = steers.decide(cluster.picture(), cluster.now, 1000.0 + cluster.now)
        assert cluster.now < 30
    assert set(steers.under_way) == {change.worker for change in begun}  # type: ignore[attr-defined]
    newest = describe_decisions(steers.recent)[0]
    assert newest["reason"] == RebalanceReason.PREFILL_SHORT
    assert newest["changes"][0].endswith("verify -> prefill")
    assert newest["loads"]["prefill"] > 1
    assert counters.value(metrics.CONTROLLER_DECISIONS, reason=RebalanceReason.PREFILL_SHORT) == 1
    assert counters.value(metrics.WORKERS, role=Role.VERIFY) == 8
    first, second, *_ = sorted(steers.under_way)
    steers.ended(first, None, cluster.now + 0.5)
    steers.ended(second, "its engine cannot prefill", cluster.now + 0.5)
    assert counters.value(metrics.ROLE_SWITCHES, role=Role.PREFILL, result="done") == 1
    assert counters.value(metrics.ROLE_SWITCHES, role=Role.PREFILL, result="failed") == 1
    assert counters.value(metrics.ROLE_SWITCH_TIME, role=Role.PREFILL) == 1


def test_workers_on_their_way_count_for_their_new_role_and_are_left_alone() -> None:
    steers, _ = steering(cooldown_s=0.0)
    cluster = cluster_of(4, 0, 8)
    begun: list[str] = []
    for _ in range(60):
        cluster.advance(PROMPTS)
        begun += [change.worker for change in steers.decide(cluster.picture(), cluster.now, 0.0)]
    assert len(begun) == len(set(begun)), "a worker is asked once"
    assert 1 <= len(begun) <= 5, "those under way are not replaced by others"
    late = cluster.now + ControllerSettings().switch_timeout_s + 1
    assert set(steers.overdue(late)) == set(begun)


def test_a_switch_that_another_began_is_not_made_up_for() -> None:
    """An operator, or the controller that this one replaces."""
    for becoming in ({}, {"prefill-0": Role.VERIFY}):
        steers, _ = steering()
        cluster = cluster_of(3, 0, 1)
        del cluster.roles["verify-0"]
        begun = 0
        for _ in range(20):
            cluster.advance(PROMPTS)
            begun += len(steers.decide(cluster.picture(), cluster.now, 0.0, becoming))
        assert bool(begun) is not bool(becoming)


def test_a_worker_that_says_nothing_counts_for_the_role_it_is_started_in() -> None:
    known = {"verify-0": report("verify-0", 1, Role.PREFILL), "verify-1": None, "prefill-0": report("prefill-0", 1)}
    workers = [staff_of(*each) for each in known.items()]
    assert [each.role for each in workers] == [Role.PREFILL, Role.VERIFY, Role.VERIFY]
    assert plan(workers, {Role.VERIFY: 2}).reason is ScalingReason.AS_ASKED
    assert plan(workers, {Role.VERIFY: 1}).choice.leave == ("prefill-0",), "who can be told goes first"
    going = replace(report("verify-2", 1), becoming=Role.DRAFT)
    assert staff_of("verify-2", going).role is Role.DRAFT


story = st.lists(
    st.one_of(
        st.builds(Load, st.floats(0.1, 80), st.integers(1, 3000), st.integers(1, 500)),
        st.sampled_from(["ends", "fails", "dies", "late"]),
    ),
    min_size=1,
    max_size=30,
)


@given(story, st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_whatever_becomes_of_switches_each_is_asked_for_once_and_somebody_decodes(
    events: list[Load | str], rng: random.Random
) -> None:
    """Switches end, fail, take for ever, and workers die of them, while the traffic jumps."""
    steers, _ = steering(cooldown_s=0.0, dwell_s=0.0)
    cluster, load = cluster_of(3, 0, 4), PROMPTS
    for event in events:
        under_way = sorted(steers.under_way)
        if isinstance(event, Load):
            load = event
        elif under_way:
            worker = rng.choice(under_way)
            to = steers.under_way[worker].change.to
            if event == "late":
                assert worker in steers.overdue(cluster.now + ControllerSettings().switch_timeout_s + 1)
                continue
            steers.ended(worker, None if event == "ends" else event, cluster.now)
            assert worker not in steers.under_way
            if event == "ends":
                cluster.roles[worker] = to
            elif event == "dies":
                del cluster.roles[worker]
        for _ in range(4):
            cluster.advance(load)
            busy = set(steers.under_way)
            begun = steers.decide(cluster.picture(), cluster.now, 0.0)
            assert not busy & {change.worker for change in begun}, "a worker is asked once"
            assert all(cluster.roles[change.worker] is change.before for change in begun)
            left = [
                name for name, role in cluster.roles.items() if role is Role.VERIFY and name not in steers.under_way
            ]
            had = [name for name, role in cluster.roles.items() if role is Role.VERIFY and name not in busy]
            assert left or not had, "nobody is left who decodes"


def test_memory_is_bounded_and_a_new_reason_is_kept() -> None:
    steers, _ = steering()
    cluster = cluster_of(1, 0, 1)
    for turn in range(3 * KEPT_DECISIONS):
        cluster.advance(Load(1, 100, 10))
        steers.decide(cluster.picture() if turn % 2 else RouterTelemetry(), cluster.now, 0.0)
    assert len(steers.recent) == KEPT_DECISIONS
    assert {each.reason for each in steers.recent} == {RebalanceReason.TOO_EARLY, RebalanceReason.WITHIN_GOALS}


def test_settings_are_the_policys() -> None:
    steers, _ = steering(prefill=RoleBounds(least=1, most=1))
    cluster = cluster_of(1, 0, 5)
    for _ in range(80):
        cluster.advance(PROMPTS)
        assert not steers.decide(cluster.picture(), cluster.now, 0.0), "prefill.most is 1"
    with pytest.raises(ValueError, match=r"verify\.least must be at least 1"):
        ControllerSettings(verify=RoleBounds(least=0))
    with pytest.raises(ValueError, match="the shortest first"):
        ControllerSettings(windows_s=(3.0, 1.0))


def report(name: str, epoch: int, role: Role = Role.VERIFY) -> WorkerReport:
    return WorkerReport(Peer(WorkerId(name, epoch), f"{name}:{epoch}"), role, 1, "", 0, False, False)


def test_members_are_those_that_answer_or_were_silent_for_a_moment_only() -> None:
    membership = Membership()
    one, two = report("a", 1), report("b", 1)
    assert membership.update({"a": one, "b": two}) == (Member(one.peer, one.role), Member(two.peer, two.role))
    for _ in range(SILENT_ROUNDS - 1):
        assert len(membership.update({"a": one, "b": None})) == 2
    assert membership.update({"a": one, "b": None}) == (Member(one.peer, one.role),)
    again = report("b", 2, Role.PREFILL)
    assert Member(again.peer, Role.PREFILL) in membership.update({"a": one, "b": again})
    assert membership.update({"a": one}) == (Member(one.peer, one.role),), "one that was ended is gone at once"
