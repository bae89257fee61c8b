"""The rebalancing policy: what it does where the outcome is plain, and what holds whatever happens."""

import math
import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.policy.loads import PrefillLoad
from cluster.policy.rebalance import URGENT, Memory, RebalanceConfig, RebalanceReason, RoleChange, Situation, rebalance
from cluster.policy.splits import NO_LIMITS, Bounds, Loads, splits
from tests.support.fluid import TICK_S, FluidCluster, Load, cluster_of
from tidemill.core.model import Role
from tidemill.core.telemetry import RouterTelemetry

PROMPTS, OUTPUTS = Load(30, 1800, 40), Load(60, 150, 250)
CONFIG = RebalanceConfig()


class Run:
    """A fluid cluster under the policy; changes take effect at once."""

    def __init__(self, cluster: FluidCluster, config: RebalanceConfig = CONFIG, *, drafts: bool = False) -> None:
        self.cluster, self.config, self.drafts = cluster, config, drafts
        self.memory = Memory()
        self.reasons: Counter[str] = Counter()
        self.changes: list[tuple[float, tuple[RoleChange, ...]]] = []

    def advance(self, load: Load, seconds: float) -> "Run":
        for _ in range(int(seconds / TICK_S)):
            self.cluster.advance(load)
            situation = Situation(self.cluster.picture(), drafts=self.drafts)
            decision, self.memory = rebalance(situation, self.memory, self.config, self.cluster.now)
            self.reasons[decision.reason] += 1
            self.cluster.apply(decision.choice)
            if decision.choice:
                self.changes.append((self.cluster.now, decision.choice))
        return self

    @property
    def split(self) -> tuple[int, int, int]:
        count = self.cluster.count
        return count(Role.PREFILL), count(Role.DRAFT), count(Role.VERIFY)


def test_roles_follow_the_traffic_within_seconds() -> None:
    run = Run(cluster_of(6, 0, 6)).advance(PROMPTS, 60)
    assert run.split[0] >= 7
    before = len(run.changes)
    run.advance(OUTPUTS, 60)
    assert run.split[2] >= 6
    back = run.cluster.now
    run.advance(PROMPTS, 60)
    assert len(run.changes) > before
    assert min(at for at, _ in run.changes if at > back) - back <= 3.0, "long prompts that queue are noticed at once"
    assert run.split[0] >= 7


def test_traffic_is_as_old_as_its_last_change_however_much_older_the_windows_are() -> None:
    run = Run(cluster_of(5, 0, 7)).advance(OUTPUTS, 60)
    assert run.memory.traffic_since <= 2.0
    changed = run.cluster.now
    run.advance(PROMPTS, 5)
    for _ in range(8):
        assert changed - 1.0 <= run.memory.traffic_since <= changed + 4.0
        run.advance(PROMPTS, 10)


def test_when_the_traffic_has_been_the_same_for_a_minute_a_change_must_relieve_more() -> None:
    """Whatever the load, it changes nothing else."""
    kept = 0
    for rate in (23.0 + 0.2 * step for step in range(20)):
        cluster, memory = cluster_of(6, 0, 6), Memory()
        for _ in range(30):
            cluster.advance(replace(PROMPTS, rate=rate))
            memory = rebalance(Situation(cluster.picture()), memory, RebalanceConfig(sustain_s=1e9), cluster.now)[1]
        eager = RebalanceConfig(sustain_s=0.0)
        long_since = replace(memory, traffic_since=cluster.now - 60.0)
        now, later = (rebalance(Situation(cluster.picture()), m, eager, cluster.now)[0] for m in (memory, long_since))
        assert later == now or (later.reason is RebalanceReason.NO_BETTER_SPLIT and now.choice)
        kept += later != now
    assert kept


@given(
    st.tuples(st.integers(1, 8), st.integers(1, 8)),
    st.builds(Load, st.floats(0.5, 80), st.integers(20, 3000), st.integers(2, 500)),
)
@settings(max_examples=15, deadline=None)
def test_constant_load_does_not_make_roles_flap(start: tuple[int, int], load: Load) -> None:
    """Whatever the load, be it more than the cluster can take: its queues may fill for minutes, and call for a change
    then, but none is taken back. Loads that the cluster can take settle within a minute: see tests/sim.
    """
    run = Run(cluster_of(start[0], 0, start[1])).advance(load, 300)
    late = [changes for at, changes in run.changes if at > 60]
    assert len(late) <= 2, f"from {start} under {load}: {run.changes}"
    assert len({(each.before, each.to) for changes in late for each in changes}) <= 1, f"{start}, {load}: {run.changes}"


def test_prompts_that_are_computed_where_they_are_decoded_call_for_no_prefill_worker() -> None:
    """There is none, and nothing is late; were there one, prompts would be no sooner done."""
    loads = Loads(PrefillLoad(busy=0.3, prompt_s=0.5, backlog_s=0.0, rest_s=0.1, goal_s=1.0), None, in_place=True)
    none, one = ({Role.PREFILL: n, Role.DRAFT: 1 - n, Role.VERIFY: 1} for n in (0, 1))
    assert loads.ratios(none) == loads.ratios(one)
    assert loads.ratios(none)[Role.PREFILL] < 1.0
    assert replace(loads, in_place=False).ratios(none)[Role.PREFILL] == math.inf


def test_bounds_hold_and_a_role_below_its_least_is_filled() -> None:
    limits = NO_LIMITS | {Role.PREFILL: Bounds(2, 7)}
    run = Run(cluster_of(6, 0, 6), RebalanceConfig(bounds=limits)).advance(PROMPTS, 60)
    assert run.split == (7, 0, 5), "no more than 7, however many would be better"
    run = Run(cluster_of(0, 0, 4), RebalanceConfig(bounds=limits)).advance(Load(1, 100, 10), 20)
    assert run.split[0] == 2
    assert run.reasons[RebalanceReason.BELOW_LEAST] >= 1


def test_without_a_verify_worker_another_becomes_one_whatever_the_dwell() -> None:
    run = Run(cluster_of(3, 1, 0), RebalanceConfig(dwell_s=1000), drafts=True).advance(Load(1, 100, 10), 6)
    assert run.split[2] >= 1
    [(_, changes)] = run.changes
    assert run.reasons[RebalanceReason.NO_VERIFY_LEFT] == 1
    assert {change.to for change in changes} == {Role.VERIFY}


def test_switched_off_roles_stay_until_no_verify_worker_is_left() -> None:
    off = RebalanceConfig(bounds=NO_LIMITS | {Role.PREFILL: Bounds(2, None)}, only_heal=True)
    run = Run(cluster_of(1, 0, 5), off).advance(PROMPTS, 60)
    assert (run.split, run.changes) == ((1, 0, 5), []), "neither a load nor a bound moves anyone"
    assert run.reasons[RebalanceReason.OFF] > 0
    run = Run(cluster_of(3, 0, 0), off).advance(Load(1, 100, 10), 10)
    assert run.split == (2, 0, 1)
    assert len(run.changes) == 1


def test_one_worker_takes_the_place_of_the_last_that_decoded_whatever_the_loads() -> None:
    """Its router has it for a while, and sees no prompt any more: by the loads everybody should decode."""
    run = Run(cluster_of(1, 1, 1), RebalanceConfig(only_heal=True), drafts=True).advance(Load(4, 100, 200), 30)
    run.advance(Load(0, 100, 200), 3)
    picture = run.cluster.picture()
    left = tuple(replace(each, accepting=each.role is not Role.VERIFY) for each in picture.workers)
    for _ in range(4):
        run.cluster.now += TICK_S
        situation = Situation(replace(picture, workers=left), drafts=True)
        decision, run.memory = rebalance(situation, run.memory, run.config, run.cluster.now)
        if decision.choice:
            break
    assert [change.to for change in decision.choice] == [Role.VERIFY]


def test_to_decode_comes_before_a_bound_that_is_out_of_reach() -> None:
    config = RebalanceConfig(bounds=NO_LIMITS | {Role.PREFILL: Bounds(2, None)}, only_heal=True)
    run = Run(cluster_of(1, 1, 0), config, drafts=True).advance(Load(50, 10, 500), 10)
    assert run.split[2] == 1
    assert len(run.changes) == 1


def test_draft_workers_are_lent_to_a_role_that_is_short_and_come_back() -> None:
    config = RebalanceConfig(drafters=2)
    run = Run(cluster_of(4, 2, 4), config, drafts=True).advance(replace(PROMPTS, rate=22), 60)
    lent = 2 - run.split[1]
    assert lent >= 1, "nothing is known to be gained from drafts yet"
    run.advance(Load(1, 200, 50), 240)
    assert run.split[1] == 2
    assert run.reasons[RebalanceReason.SPARE_FOR_DRAFTS] == lent


def test_without_traffic_or_workers_nothing_happens_and_the_reason_says_so() -> None:
    idle = cluster_of(1, 0, 1)
    decision, memory = rebalance(Situation(RouterTelemetry()), Memory(), CONFIG, 0.0)
    assert (decision.choice, decision.reason) == ((), RebalanceReason.TOO_EARLY)
    for _ in range(20):
        idle.advance(Load(0.001, 10, 2))
    picture = idle.picture()
    assert rebalance(Situation(picture), memory, CONFIG, 10.0)[0].reason is RebalanceReason.WITHIN_GOALS
    assert rebalance(Situation(replace(picture, workers=())), memory, CONFIG, 10.0)[0].reason is (
        RebalanceReason.NO_WORKERS
    )


def test_a_switch_that_takes_longer_than_it_brings_is_not_made() -> None:
    cluster = cluster_of(5, 0, 7)
    memory = Memory()
    reasons = set()
    for _ in range(100):
        cluster.advance(PROMPTS)
        situation = Situation(cluster.picture(), switch_s=600.0)
        decision, memory = rebalance(situation, memory, CONFIG, cluster.now)
        reasons.add(decision.reason)
        assert not decision.choice
    assert RebalanceReason.NOT_WORTH_IT in reasons


# --- whatever happens -------------------------------------------------------------------------------------------

loads = st.builds(Load, st.floats(0.1, 100), st.integers(1, 4000), st.integers(1, 600))
events = st.one_of(
    loads,
    st.tuples(st.just("dies"), st.integers(0, 11)),
    st.tuples(st.just("silent"), st.integers(0, 11)),
    st.tuples(st.just("switching"), st.integers(0, 11)),
    st.tuples(st.just("joins"), st.sampled_from(Role)),
    st.tuples(st.just("forgets"), st.none()),
)
limits = st.fixed_dictionaries(
    {
        Role.PREFILL: st.builds(Bounds, st.integers(0, 2), st.sampled_from([None, 3])),
        Role.DRAFT: st.builds(Bounds, st.integers(0, 1), st.sampled_from([None, 2])),
        Role.VERIFY: st.builds(Bounds, st.integers(1, 2)),
    }
)


@given(st.lists(events, min_size=1, max_size=25), limits, st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_whatever_happens(story: list[object], bounds: dict[Role, Bounds], seed: int) -> None:
    """Workers die, fall silent, switch and come; traffic jumps; the controller forgets. Then still:

    no needed pool is emptied, bounds are kept, dwell and cooldown are respected, and order does not matter.
    """
    rng = random.Random(seed)
    cluster = cluster_of(3, 2, 4)
    config = RebalanceConfig(bounds=bounds, drafters=2)
    memory, load = Memory(), Load(10, 500, 100)
    silent: set[str] = set()
    changing: dict[str, Role] = {}
    taken: dict[str, float] = {}  # when a worker was given its role
    changed_at = float("-inf")
    for event in story:
        match event:
            case Load():
                load = event
            case ("dies", int(index)) if len(cluster.roles) > 1:
                name = sorted(cluster.roles)[index % len(cluster.roles)]
                del cluster.roles[name]
                changing.pop(name, None)
                silent.discard(name)
            case ("silent", int(index)):
                silent ^= {sorted(cluster.roles)[index % len(cluster.roles)]}
            case ("switching", int(index)):
                cluster.roles |= changing
                taken |= dict.fromkeys(changing, cluster.now)
                name = sorted(cluster.roles)[index % len(cluster.roles)]
                changing = {name: rng.choice([role for role in Role if role is not cluster.roles[name]])}
            case ("joins", Role() as role):
                cluster.roles[f"new-{len(cluster.roles)}-{rng.random():.3f}"] = role
            case ("forgets", None):
                memory, taken, changed_at = Memory(), dict.fromkeys(cluster.roles, cluster.now), float("-inf")
        for _ in range(rng.randint(1, 12)):
            cluster.advance(load)
            picture = _told(cluster, silent, changing)
            situation = Situation(picture, tuple(sorted(changing.items())), drafts=True)
            shuffled = replace(picture, workers=tuple(rng.sample(picture.workers, len(picture.workers))))
            decision, after = rebalance(situation, memory, config, cluster.now)
            assert rebalance(replace(situation, telemetry=shuffled), memory, config, cluster.now) == (decision, after)
            memory = after
            if not decision.choice:
                continue
            _check(decision.choice, cluster, silent, changing, bounds)
            if decision.reason not in URGENT:
                assert cluster.now - changed_at >= config.cooldown_s
                rested = [cluster.now - taken.get(each.worker, 0.0) for each in decision.choice]
                assert all(seconds >= config.dwell_s - TICK_S for seconds in rested)
            changed_at = cluster.now
            cluster.apply(decision.choice)
            taken |= {change.worker: cluster.now for change in decision.choice}


def _told(cluster: FluidCluster, silent: set[str], changing: dict[str, Role]) -> RouterTelemetry:
    picture = cluster.picture()
    workers = tuple(
        replace(
            each,
            heard_s=60.0 if each.worker.name in silent else 0.0,
            accepting=each.worker.name not in changing,
        )
        for each in picture.workers
    )
    return replace(picture, workers=workers)


def _check(
    changes: tuple[RoleChange, ...],
    cluster: FluidCluster,
    silent: set[str],
    changing: dict[str, Role],
    bounds: dict[Role, Bounds],
) -> None:
    assert len({each.worker for each in changes}) == len(changes)
    at_work = {name: role for name, role in cluster.roles.items() if name not in silent and name not in changing}
    for change in changes:
        assert at_work[change.worker] is change.before is not change.to
    before = Counter(at_work.values())
    after = Counter((at_work | {each.worker: each.to for each in changes}).values())
    counted = Counter(at_work.values()) + Counter(changing.values())
    if before[Role.VERIFY]:
        left = sum(role is Role.VERIFY for name, role in at_work.items() if name not in {c.worker for c in changes})
        assert left >= 1, "somebody decodes at every moment"
    for role in Role:
        moved_in = sum(each.to is role for each in changes) - sum(each.before is role for each in changes)
        total = counted[role] + moved_in
        if moved_in < 0:
            assert total >= bounds[role].least
        limit = bounds[role].most
        assert moved_in <= 0 or limit is None or total <= limit
    assert after[Role.VERIFY] + sum(role is Role.VERIFY for role in changing.values()) >= 1


@pytest.mark.parametrize("drafts", [False, True])
def test_every_split_there_is_is_looked_at_once(drafts: bool) -> None:
    found = [tuple(split[role] for role in Role) for split in splits(5, NO_LIMITS, drafts=drafts)]
    assert len(found) == len(set(found)) == (15 if drafts else 5)
    assert all(sum(split) == 5 and split[list(Role).index(Role.VERIFY)] >= 1 for split in found)
