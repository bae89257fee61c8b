"""Which workers change their role now: a raw policy, and wrappers that keep it calm.

    loads       how loaded each role is, as a ratio to the goals (loads.py)
    split       the raw policy: the split of all workers whose most loaded role is the least loaded
    worthwhile  only if a role is near its limit, the new split relieves it by a margin, and the relief pays the switch
    sustained   only if that was so for a while
    cooled      only so long after the last change
    moves       at most half of a role's workers at once, those that have dwelt in it, the least busy first
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from cluster.policy.loads import PrefillLoad, VerifyLoad, prefill_load, settled, traffic_window, verify_load
from tidemill.core.model import Decision, Role
from tidemill.core.telemetry import RouterTelemetry, WorkerTelemetry

Split = Mapping[Role, int]


class RebalanceReason(StrEnum):
    """Why roles change, or do not."""

    NO_WORKERS = "no_workers"
    NO_VERIFY_LEFT = "no_verify_left"  # nothing can be decoded: at once, whatever else holds
    BELOW_LEAST = "below_least"  # a role has fewer workers than it must have
    WITHIN_GOALS = "within_goals"  # no role is near its limit
    GOALS_MET = "goals_met"  # one is, but the traffic is what it was for long, and the goals are met
    NO_BETTER_SPLIT = "no_better_split"
    NOT_WORTH_IT = "not_worth_it"  # the switch costs more than it brings before roles may change again
    NOT_SUSTAINED = "not_sustained"
    COOLDOWN = "cooldown"
    DWELL = "dwell"  # all that could leave took their role too recently
    PREFILL_SHORT = "prefill_short"
    DRAFT_SHORT = "draft_short"
    VERIFY_SHORT = "verify_short"


HOPELESS = 3  # times the margin, for a split that misses the goals too
MOST_DOUBLINGS = 6  # of the dwell, after so many reversals
URGENT = (RebalanceReason.NO_VERIFY_LEFT, RebalanceReason.BELOW_LEAST)
SHORT = {
    Role.PREFILL: RebalanceReason.PREFILL_SHORT,
    Role.DRAFT: RebalanceReason.DRAFT_SHORT,
    Role.VERIFY: RebalanceReason.VERIFY_SHORT,
}


@dataclass(frozen=True, slots=True)
class Bounds:
    """Workers of a role; `most` None: no limit."""

    least: int = 0
    most: int | None = None

    def __contains__(self, count: int) -> bool:
        return self.least <= count and (self.most is None or count <= self.most)


@dataclass(frozen=True, slots=True)
class RebalanceConfig:
    """See ControllerSettings."""

    prefill: Bounds = Bounds()
    draft: Bounds = Bounds()
    verify: Bounds = Bounds(1)
    headroom: float = 0.85
    margin: float = 0.1
    sustain_s: float = 1.0
    cooldown_s: float = 3.0
    dwell_s: float = 10.0

    def bounds(self, role: Role) -> Bounds:
        return {Role.PREFILL: self.prefill, Role.DRAFT: self.draft, Role.VERIFY: self.verify}[role]


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
    """What must be known of the past. Lost with the controller: everything then counts from the first look on."""

    since: tuple[tuple[str, Role, float], ...] = ()  # worker, role, when it was first seen in it
    wanted: Role | None = None  # the role that is short
    excess_s: float = 0.0  # seconds it has been so, weighted by how short it is
    looked_at: float = math.inf
    changed_at: float = -math.inf
    joined: tuple[tuple[Role, float], ...] = ()  # when a role was last given workers
    reversals: int = 0  # changes that took back what the one before them gave, since the traffic last changed


@dataclass(frozen=True, slots=True)
class View:
    """The situation as the steps of the policy need it."""

    counts: dict[Role, int]
    movable: tuple[WorkerTelemetry, ...]  # take work, and have dwelt in their role
    stayers: frozenset[str]  # would be movable, but for the dwell: their own, or of whoever joined their role last
    prefill: PrefillLoad | None
    verify: VerifyLoad | None
    settled: bool  # the traffic is what it was for long, and the goals are met
    drafts: bool
    switch_s: float


def rebalance(
    situation: Situation, memory: Memory, config: RebalanceConfig, now: float
) -> tuple[Decision[tuple[RoleChange, ...]], Memory]:
    """The changes to begin now, and what to remember for the next look. Order of workers does not matter."""
    memory = _remember(situation, memory, now)
    view = _view(situation, memory, config, now)
    wanted = _urgent(view, config) or _worthwhile(view, config)
    short = wanted.choice
    memory = _accumulate(memory, view, short and short[1], config, now)
    if short is None:
        return Decision((), wanted.reason), memory
    target, _ = short
    if wanted.reason not in URGENT:
        if memory.excess_s < config.sustain_s:
            return Decision((), RebalanceReason.NOT_SUSTAINED), memory
        if now - memory.changed_at < config.cooldown_s:
            return Decision((), RebalanceReason.COOLDOWN), memory
    changes = _moves(view, target, urgent=wanted.reason is RebalanceReason.NO_VERIFY_LEFT)
    if not changes:
        return Decision((), RebalanceReason.DWELL), memory
    return Decision(changes, wanted.reason), _changed(memory, changes, now)


def _changed(memory: Memory, changes: tuple[RoleChange, ...], now: float) -> Memory:
    taken = {change.before for change in changes}
    given = [role for role, at in memory.joined if at == memory.changed_at]
    joined = dict(memory.joined) | {change.to: now for change in changes}
    reversals = memory.reversals + any(role in taken for role in given)
    return replace(
        memory, excess_s=0.0, changed_at=now, joined=tuple(sorted(joined.items())), reversals=reversals
    )


def _remember(situation: Situation, memory: Memory, now: float) -> Memory:
    before = {name: (role, at) for name, role, at in memory.since}
    since = []
    for worker in situation.telemetry.workers:
        role, at = before.get(worker.worker.name, (None, now))
        since.append((worker.worker.name, worker.role, at if role is worker.role else now))
    windows = situation.telemetry.windows
    lasts_s = windows[traffic_window(windows)].seconds if windows else 0.0
    reversals = memory.reversals if lasts_s >= min(now - memory.changed_at, windows[-1].seconds if windows else 0.0) else 0
    return replace(memory, since=tuple(sorted(since)), reversals=reversals)


def _accumulate(memory: Memory, view: View, short: Role | None, config: RebalanceConfig, now: float) -> Memory:
    """A running sum of by how much the load exceeds the headroom: a large excess needs little time, a small one much.

    One look counts as at most the time since the last, so a single odd measurement is never enough.
    """
    elapsed = max(now - memory.looked_at, 0.0)
    before = memory.excess_s if short is memory.wanted else 0.0
    loads = ratios(view, view.counts)
    excess = min(max(loads.values()) / config.headroom - 1.0, 1.0)
    return replace(memory, wanted=short, excess_s=max(before + excess * elapsed, 0.0), looked_at=now)


def _view(situation: Situation, memory: Memory, config: RebalanceConfig, now: float) -> View:
    changing = dict(situation.changing)
    since = {name: at for name, _, at in memory.since}
    joined = dict(memory.joined)
    role_dwell_s = config.dwell_s * 2 ** min(memory.reversals, MOST_DOUBLINGS)
    counts = dict.fromkeys(Role, 0)
    movable, stayers = [], set()
    for worker in situation.telemetry.workers:
        name = worker.worker.name
        if name in changing:
            counts[changing[name]] += 1
        elif worker.accepting:
            counts[worker.role] += 1
            if now - since[name] < config.dwell_s or now - joined.get(worker.role, -math.inf) < role_dwell_s:
                stayers.add(name)
            movable.append(worker)
    movable.sort(key=lambda each: (_residual(each), each.worker.name))
    telemetry = situation.telemetry
    return View(
        counts,
        tuple(movable),
        frozenset(stayers),
        prefill_load(telemetry) if telemetry.windows else None,
        verify_load(telemetry) if telemetry.windows else None,
        settled(telemetry.windows),
        situation.drafts,
        situation.switch_s,
    )


def _residual(worker: WorkerTelemetry) -> int:
    """Tokens of work that must be finished or moved before the worker is free."""
    load = worker.load
    return load.queued_tokens + (load.kv_blocks_used + load.kv_blocks_leased) * load.block_size


# --- the raw policy ---------------------------------------------------------------------------------------------

Wanted = Decision[tuple[Split, Role] | None]  # the split to have, and the role that is short now


def ratios(view: View, split: Split) -> dict[Role, float]:
    """Of each role with a goal, to that goal; infinite for one that has work and no worker."""
    return {
        Role.PREFILL: view.prefill.ratio(split[Role.PREFILL]) if view.prefill else 0.0,
        Role.VERIFY: view.verify.ratio(split[Role.VERIFY], split[Role.DRAFT]) if view.verify else 0.0,
    }


def splits(view: View, config: RebalanceConfig) -> Iterator[Split]:
    """Every split of the workers there are that the bounds allow."""
    total = sum(view.counts.values())
    for prefill, draft in itertools.product(range(total + 1), range(total + 1)):
        split = {Role.PREFILL: prefill, Role.DRAFT: draft, Role.VERIFY: total - prefill - draft}
        if (view.drafts or not draft) and all(split[role] in config.bounds(role) for role in Role):
            yield split


def best_split(view: View, config: RebalanceConfig) -> Split | None:
    """The one whose most loaded role is the least loaded; of equals the nearest."""
    return min(
        splits(view, config),
        key=lambda split: (
            round(_worst(view, split), 3),
            _distance(split, view.counts),
            *split.values(),
        ),
        default=None,
    )


def _distance(a: Split, b: Split) -> int:
    return sum(abs(a[role] - b[role]) for role in Role) // 2


def _urgent(view: View, config: RebalanceConfig) -> Wanted | None:
    """A role that must have workers has too few."""
    if not view.movable:
        return Decision(None, RebalanceReason.NO_WORKERS)
    for role in (Role.VERIFY, Role.PREFILL, Role.DRAFT):
        if view.counts[role] < config.bounds(role).least:
            target = best_split(view, config)
            if target is None:
                return None
            empty = role is Role.VERIFY and not view.counts[role]
            return Decision((target, role), RebalanceReason.NO_VERIFY_LEFT if empty else RebalanceReason.BELOW_LEAST)
    return None


def _worthwhile(view: View, config: RebalanceConfig) -> Wanted:
    now = ratios(view, view.counts)
    short = max(now, key=lambda role: (now[role], role))
    if now[short] < config.headroom:
        return Decision(None, RebalanceReason.WITHIN_GOALS)
    if view.settled:
        return Decision(None, RebalanceReason.GOALS_MET)
    target = best_split(view, config)
    if target is None:
        return Decision(None, RebalanceReason.NO_BETTER_SPLIT)
    worst = _worst(view, target)
    relief = 1.0 - worst / now[short]
    if relief < config.margin * (1 if worst <= 1.0 else HOPELESS):
        return Decision(None, RebalanceReason.NO_BETTER_SPLIT)
    moved = _distance(target, view.counts) / sum(view.counts.values())
    if relief * config.dwell_s < moved * view.switch_s:
        return Decision(None, RebalanceReason.NOT_WORTH_IT)
    return Decision((target, short), SHORT[short])


def _worst(view: View, split: Split) -> float:
    return max(ratios(view, split).values())


# --- who moves --------------------------------------------------------------------------------------------------


def _moves(view: View, target: Split, *, urgent: bool) -> tuple[RoleChange, ...]:
    """From roles with too many to roles with too few, at most half of a role at once; the least busy first."""
    give = {role: min(view.counts[role] - target[role], max(view.counts[role] // 2, 1)) for role in Role}
    take = [role for role in Role for _ in range(target[role] - view.counts[role])]
    take.sort(key=lambda role: view.counts[role])
    changes: list[RoleChange] = []
    for worker in view.movable:
        if not take:
            break
        if give[worker.role] > 0 and (urgent or worker.worker.name not in view.stayers):
            give[worker.role] -= 1
            changes.append(RoleChange(worker.worker.name, worker.role, take.pop(0)))
    return tuple(changes)


__all__ = [
    "Bounds", "Memory", "RebalanceConfig", "RebalanceReason", "RoleChange", "Situation", "best_split", "ratios",
    "rebalance",
]  # fmt: skip
