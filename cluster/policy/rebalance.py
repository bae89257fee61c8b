"""Which workers change their role now: a raw policy, and wrappers that keep it calm.

In order:
    urgent      a role that must have workers has too few: without cooldown and dwell, and with the fewest changes
    loads       how loaded each role is, as a ratio to the goals (loads.py)
    best split  the raw policy: the split whose most loaded role is the least loaded (splits.py)
    worthwhile  only if a role is near its limit, the new split relieves it by a margin, and the relief pays the switch
    sustained   only if that was so for a while: little if it is far over its limit, long if it is near it
    cooled      only so long after the last change
    moves       at most half of a role's workers at once, one when the traffic has been the same for a minute; those
                that have dwelt in it, the least busy first;
                a role that was given workers keeps them, and longer each time the last change was taken back
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from cluster.policy.loads import Seen, prefill_load, verify_load
from cluster.policy.splits import (
    NO_LIMITS,
    Bounds,
    Loads,
    Split,
    best_split,
    best_with_one_more,
    nearest_split,
    share_moved,
)
from tidemill.core.model import Decision, Role
from tidemill.core.telemetry import RouterTelemetry, WorkerTelemetry

EARLY_S = 3.0  # after a router's start
SILENT_S = 3.0  # a worker that has said nothing for so long is none
CALM_S, CALM = 50.0, 3  # traffic that has not changed for so long; times the margin then
MISSED, HOPELESS = 3, 5  # times the margin, for a split that misses the goals too, or by more than twice
SPARE = 0.5  # a load so low that a worker can be had for drafts
SPARE_PACE = 0.1  # such a chance must last for so many times as long: sustain_s / SPARE_PACE
MOST_DOUBLINGS = 6  # of the dwell


class RebalanceReason(StrEnum):
    """Why roles change, or do not."""

    TOO_EARLY = "too_early"  # the routers have seen too little to tell
    OFF = "off"  # the settings leave roles as they are, and something can be decoded
    NO_VERIFY_LEFT = "no_verify_left"  # nothing can be decoded
    BELOW_LEAST = "below_least"  # a role has fewer workers than it must have
    PREFILL_SHORT = "prefill_short"
    VERIFY_SHORT = "verify_short"
    SPARE_FOR_DRAFTS = "spare_for_drafts"
    NO_WORKERS = "no_workers"
    NO_SPLIT = "no_split"  # the bounds allow none with as many workers
    WITHIN_GOALS = "within_goals"  # no role is near its limit
    GOALS_MET = "goals_met"  # one is, but the traffic is what it was for long, and the goals are met
    NO_BETTER_SPLIT = "no_better_split"
    NOT_WORTH_IT = "not_worth_it"  # the switch costs more than it brings before roles may change again
    NOT_SUSTAINED = "not_sustained"
    COOLDOWN = "cooldown"
    DWELL = "dwell"  # all that could leave took their role, or were joined in it, too recently


URGENT = frozenset({RebalanceReason.NO_VERIFY_LEFT, RebalanceReason.BELOW_LEAST})
SHORT = {Role.PREFILL: RebalanceReason.PREFILL_SHORT, Role.VERIFY: RebalanceReason.VERIFY_SHORT}


@dataclass(frozen=True, slots=True)
class RebalanceConfig:
    """See ControllerSettings."""

    bounds: Mapping[Role, Bounds] = field(default_factory=lambda: NO_LIMITS)
    headroom: float = 0.85
    margin: float = 0.1
    sustain_s: float = 1.0
    cooldown_s: float = 3.0
    dwell_s: float = 10.0
    drafters: int = 0  # draft workers to have while nothing is short
    only_heal: bool = False  # nothing but a verify worker when there is none left


@dataclass(frozen=True, slots=True)
class RoleChange:
    """A worker, by name, and its roles."""

    worker: str
    before: Role
    to: Role


@dataclass(frozen=True, slots=True)
class Situation:
    """What is decided on. `changing`: workers on their way to another role, for which they count already."""

    telemetry: RouterTelemetry
    changing: tuple[tuple[str, Role], ...] = ()
    drafts: bool = False  # there is a draft model
    switch_s: float = 1.0  # how long a switch took lately


@dataclass(frozen=True, slots=True)
class Memory:
    """What must be known of the past. Lost with the controller: every dwell then counts from the first look on."""

    since: tuple[tuple[str, Role, float], ...] = ()  # worker, role, when it was first seen in it
    wanted: Role | None = None  # the role that should get workers
    excess_s: float = 0.0  # seconds it was so, weighted by how far over its limit it was
    looked_at: float = math.inf
    changed_at: float = -math.inf
    joined: tuple[tuple[Role, float], ...] = ()  # when a role was last given workers
    traffic_since: float = -math.inf  # it has been what it is
    reversals: int = 0  # changes that took back what the one before them gave, since the traffic last changed


@dataclass(frozen=True, slots=True)
class View:
    """The situation as the steps of the policy need it."""

    counts: Split
    serving: Split  # of these, at work in their role
    movable: tuple[WorkerTelemetry, ...]  # the least busy first
    resting: frozenset[str]  # of these, not before their dwell is over
    loads: Loads
    settled: bool
    calm: bool  # the traffic has been what it is for so long that roles have been chosen for it


Wanted = Decision[tuple[Split, Role] | None]  # the split to have, and the role that it is for


def rebalance(
    situation: Situation, memory: Memory, config: RebalanceConfig, now: float
) -> tuple[Decision[tuple[RoleChange, ...]], Memory]:
    """The changes to begin now, and what to remember for the next look. The order of workers does not matter."""
    seen = Seen.of(situation.telemetry, now - memory.traffic_since)
    memory = _remember(seen, memory, now)
    view = _view(situation, seen, memory, config, now)
    wanted = _wanted(view, situation, config)
    memory = _accumulate(memory, view, wanted, config, now)
    if wanted.choice is None:
        return Decision((), wanted.reason), memory
    urgent = wanted.reason in URGENT
    if memory.excess_s < config.sustain_s:
        return Decision((), RebalanceReason.NOT_SUSTAINED), memory
    if not urgent and now - memory.changed_at < config.cooldown_s:
        return Decision((), RebalanceReason.COOLDOWN), memory
    changes = _moves(view, wanted.choice[0], urgent=urgent)
    if not changes:
        return Decision((), RebalanceReason.DWELL), memory
    return Decision(changes, wanted.reason), _after(memory, changes, now)


def loads_of(telemetry: RouterTelemetry) -> Loads:
    """Of both roles with a goal."""
    prefill = sum(worker.role is Role.PREFILL for worker in telemetry.workers)
    return _loads(Seen.of(telemetry), prefill)


def _loads(seen: Seen, prefill_workers: int) -> Loads:
    return Loads(prefill_load(seen), verify_load(seen), in_place=not prefill_workers)


def _view(situation: Situation, seen: Seen, memory: Memory, config: RebalanceConfig, now: float) -> View:
    changing, since, joined = dict(situation.changing), {n: at for n, _, at in memory.since}, dict(memory.joined)
    role_dwell_s = config.dwell_s * 2 ** min(memory.reversals, MOST_DOUBLINGS)
    counts, serving = dict.fromkeys(Role, 0), dict.fromkeys(Role, 0)
    movable, resting = [], set()
    for worker in situation.telemetry.workers:
        name = worker.worker.name
        if name in changing:
            counts[changing[name]] += 1
        elif worker.accepting and worker.heard_s < SILENT_S:
            counts[worker.role] += 1
            serving[worker.role] += 1
            movable.append(worker)
            if now - since[name] < config.dwell_s or now - joined.get(worker.role, -math.inf) < role_dwell_s:
                resting.add(name)
    movable.sort(key=lambda each: (_residual(each), each.worker.name))
    calm = now - memory.traffic_since >= CALM_S
    loads = _loads(seen, counts[Role.PREFILL])
    return View(counts, serving, tuple(movable), frozenset(resting), loads, seen.settled, calm)


def _residual(worker: WorkerTelemetry) -> int:
    """Tokens of work that must be finished or moved before the worker is free."""
    load = worker.load
    return load.queued_tokens + (load.kv_blocks_used + load.kv_blocks_leased) * load.block_size


# --- what is wanted ---------------------------------------------------------------------------------------------


def _wanted(view: View, situation: Situation, config: RebalanceConfig) -> Wanted:
    urgent = _urgent(view, situation, config)
    if config.only_heal and (urgent is None or urgent.reason is RebalanceReason.BELOW_LEAST):
        return Decision(None, RebalanceReason.OFF)
    return urgent or _worthwhile(view, situation, config)


def _urgent(view: View, situation: Situation, config: RebalanceConfig) -> Wanted | None:
    """A role that must have workers has too few: it gets those, and who is best where comes later. What is measured
    while a role stands still says little of that.
    """
    windows = situation.telemetry.windows
    if not windows or windows[-1].seconds < EARLY_S:
        return Decision(None, RebalanceReason.TOO_EARLY)
    if not view.movable:
        return Decision(None, RebalanceReason.NO_WORKERS)
    short = [role for role in (Role.VERIFY, Role.PREFILL, Role.DRAFT) if view.counts[role] < config.bounds[role].least]
    if not short:
        return None
    none_left = short[0] is Role.VERIFY and not view.counts[Role.VERIFY]
    within = [config.bounds, NO_LIMITS] if none_left else [config.bounds]  # rather outside its bounds than no service
    found = (nearest_split(view.counts, view.loads, bounds, drafts=situation.drafts) for bounds in within)
    target = next((split for split in found if split is not None), None)
    if target is None:
        return Decision(None, RebalanceReason.NO_SPLIT)
    reason = RebalanceReason.NO_VERIFY_LEFT if none_left else RebalanceReason.BELOW_LEAST
    return Decision((target, short[0]), reason)


def _worthwhile(view: View, situation: Situation, config: RebalanceConfig) -> Wanted:
    ratios = view.loads.ratios(view.counts)
    short = max(ratios, key=lambda role: (ratios[role], role))
    if ratios[short] < config.headroom:
        return _spare(view, situation, config) or Decision(None, RebalanceReason.WITHIN_GOALS)
    if view.settled:
        return Decision(None, RebalanceReason.GOALS_MET)
    target = best_split(view.counts, view.loads, config.bounds, drafts=situation.drafts)
    if target is None:
        return Decision(None, RebalanceReason.NO_SPLIT)
    worst = view.loads.worst(target)
    relief = 1.0 - worst / ratios[short]
    times = 1 if worst <= 1.0 else MISSED if worst <= 2.0 else HOPELESS
    if relief < config.margin * (max(times, CALM) if view.calm else times):
        return Decision(None, RebalanceReason.NO_BETTER_SPLIT)
    if relief * config.dwell_s < share_moved(target, view.counts) * situation.switch_s:
        return Decision(None, RebalanceReason.NOT_WORTH_IT)
    return Decision((target, short), SHORT[short])


def _spare(view: View, situation: Situation, config: RebalanceConfig) -> Wanted | None:
    """Draft workers that were needed elsewhere come back one by one, while everybody has little to do."""
    if not situation.drafts or view.counts[Role.DRAFT] >= config.drafters:
        return None
    target = best_with_one_more(Role.DRAFT, view.counts, view.loads, config.bounds)
    if target is None or view.loads.worst(target) > SPARE:
        return None
    return Decision((target, Role.DRAFT), RebalanceReason.SPARE_FOR_DRAFTS)


# --- who moves --------------------------------------------------------------------------------------------------


def _moves(view: View, target: Split, *, urgent: bool) -> tuple[RoleChange, ...]:
    """From roles with too many to those with too few, the emptiest first: half of a role, or one by one in calm
    traffic. Who is needed where it is stays: one at work in each role that the target has.
    """
    give = {
        role: min(
            view.counts[role] - target[role],
            1 if view.calm and not urgent else max(view.counts[role] // 2, 1),
            view.serving[role] - (target[role] > 0),
        )
        for role in Role
    }
    take = [role for role in Role for _ in range(target[role] - view.counts[role])]
    take.sort(key=lambda role: view.counts[role])
    changes: list[RoleChange] = []
    for worker in view.movable:
        if not take:
            break
        if give[worker.role] > 0 and (urgent or worker.worker.name not in view.resting):
            give[worker.role] -= 1
            changes.append(RoleChange(worker.worker.name, worker.role, take.pop(0)))
    return tuple(changes)


# --- what is remembered -----------------------------------------------------------------------------------------


def _remember(seen: Seen, memory: Memory, now: float) -> Memory:
    before = {name: (role, at) for name, role, at in memory.since}
    since = []
    for worker in seen.telemetry.workers:
        role, at = before.get(worker.worker.name, (None, now))
        since.append((worker.worker.name, worker.role, at if role is worker.role else now))
    traffic_since = seen.since(memory.traffic_since, now)
    return replace(
        memory,
        since=tuple(sorted(since)),
        traffic_since=traffic_since,
        reversals=memory.reversals if traffic_since <= memory.changed_at else 0,
    )


def _accumulate(memory: Memory, view: View, wanted: Wanted, config: RebalanceConfig, now: float) -> Memory:
    """A running sum of by how much the load exceeds the headroom: a large excess needs little time, a small one much.

    One look counts as at most the time since the last, so a single odd measurement is never enough.
    """
    role = wanted.choice and wanted.choice[1]
    before = memory.excess_s if role is memory.wanted else 0.0
    excess = min(view.loads.worst(view.counts) / config.headroom - 1.0, 1.0)
    if wanted.reason in URGENT:
        excess = 1.0
    pace = SPARE_PACE if wanted.reason is RebalanceReason.SPARE_FOR_DRAFTS else excess
    elapsed = max(now - memory.looked_at, 0.0)
    return replace(memory, wanted=role, excess_s=max(before + pace * elapsed, 0.0), looked_at=now)


def _after(memory: Memory, changes: tuple[RoleChange, ...], now: float) -> Memory:
    given = {role for role, at in memory.joined if at == memory.changed_at}
    taken_back = any(change.before in given for change in changes)
    joined = dict(memory.joined) | {change.to: now for change in changes}
    return replace(
        memory,
        excess_s=0.0,
        changed_at=now,
        joined=tuple(sorted(joined.items())),
        reversals=memory.reversals + taken_back,
    )
