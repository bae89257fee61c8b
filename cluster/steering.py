"""What the controller decides and remembers, without Ray: telemetry in, changes of role out."""

import logging
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.policy.rebalance import Memory, RebalanceConfig, RoleChange, Situation, loads_of, rebalance
from cluster.policy.splits import Bounds
from tidemill.core import metrics
from tidemill.core.metrics import Metrics
from tidemill.core.model import Role
from tidemill.core.settings import RoleBounds, Settings
from tidemill.core.telemetry import DecisionRecord, RouterTelemetry

log = logging.getLogger(__name__)

KEPT_DECISIONS = 50
NOBODY: Mapping[str, Role] = {}
SWITCH_WEIGHT = 0.3  # of the newest switch in the mean of their durations


@dataclass(slots=True)
class Switch:
    """A change of role under way."""

    change: RoleChange
    started_at: float


def rebalance_config(settings: Settings) -> RebalanceConfig:
    """The policy's part of the settings."""
    ours = settings.controller
    bounds = {
        Role.PREFILL: _bounds(ours.prefill),
        Role.DRAFT: _bounds(ours.draft),
        Role.VERIFY: _bounds(ours.verify),
    }
    return RebalanceConfig(
        bounds, ours.headroom, ours.margin, ours.sustain_s, ours.cooldown_s, ours.dwell_s, settings.pools.draft,
        only_heal=not ours.rebalance,
    )  # fmt: skip


def _bounds(bounds: RoleBounds) -> Bounds:
    return Bounds(bounds.least, bounds.most)


class Steering:
    """Belongs to the controller's thread. What is lost with it is how long workers have had their roles."""

    def __init__(self, settings: Settings, counters: Metrics) -> None:
        self._config = rebalance_config(settings)
        self._drafts = settings.draft is not None and settings.speculation.enabled
        self._timeout_s = settings.controller.switch_timeout_s
        self._metrics = counters
        self._memory = Memory()
        self._under_way: dict[str, Switch] = {}
        self._switch_s = 1.0
        self.recent: deque[DecisionRecord] = deque(maxlen=KEPT_DECISIONS)

    @property
    def under_way(self) -> Mapping[str, Switch]:
        """By worker."""
        return self._under_way

    def decide(
        self, telemetry: RouterTelemetry, now: float, wall: float, becoming: Mapping[str, Role] = NOBODY
    ) -> tuple[RoleChange, ...]:
        """The changes to begin now; `now` is monotonic, `wall` is for people. `becoming`: workers that say themselves
        that they are on their way to another role: an operator's, or those of a controller that died.
        """
        changing = dict(becoming) | {name: each.change.to for name, each in self._under_way.items()}
        situation = Situation(telemetry, tuple(sorted(changing.items())), self._drafts, self._switch_s)
        decision, self._memory = rebalance(situation, self._memory, self._config, now)
        self._metrics.add(metrics.CONTROLLER_DECISIONS, reason=decision.reason)
        self._record(telemetry, decision.choice, str(decision.reason), wall)
        for change in decision.choice:
            self._under_way[change.worker] = Switch(change, now)
        return decision.choice

    def ended(self, worker: str, error: str | None, now: float) -> None:
        """A switch is over; with an error the worker has kept its role, or is gone."""
        switch = self._under_way.pop(worker)
        role, seconds = str(switch.change.to), now - switch.started_at
        self._metrics.add(metrics.ROLE_SWITCHES, role=role, result="failed" if error else "done")
        if error:
            log.warning("%s did not become a %s worker: %s", worker, role, error)
            return
        self._metrics.observe(metrics.ROLE_SWITCH_TIME, seconds, role=role)
        self._switch_s += SWITCH_WEIGHT * (seconds - self._switch_s)
        log.info("%s is a %s worker after %.2f s", worker, role, seconds)

    def overdue(self, now: float) -> list[str]:
        """Workers whose switch has taken too long to be waited for."""
        return [name for name, each in self._under_way.items() if now - each.started_at > self._timeout_s]

    def _record(self, telemetry: RouterTelemetry, changes: tuple[RoleChange, ...], reason: str, wall: float) -> None:
        counts = {role: sum(each.role is role and each.accepting for each in telemetry.workers) for role in Role}
        loads = loads_of(telemetry).ratios(counts)
        for role in Role:
            self._metrics.set(metrics.WORKERS, counts[role], role=role)
        for role, load in loads.items():
            self._metrics.set(metrics.ROLE_LOAD, load, role=role)
        for name, traffic in telemetry.windows[-2:][0].classes if telemetry.windows else ():
            if traffic.attainment is not None:
                self._metrics.set(metrics.ATTAINMENT, traffic.attainment, slo_class=name)
        if changes or not self.recent or self.recent[-1].reason != reason:
            said = tuple(f"{change.worker}: {change.before} -> {change.to}" for change in changes)
            rounded = tuple((str(role), round(load, 2)) for role, load in loads.items())
            self.recent.append(DecisionRecord(wall, reason, said, rounded))
            log.info("%s %s loads %s", reason, "; ".join(said) or "nothing changes", dict(rounded))


def describe_decisions(recent: deque[DecisionRecord]) -> list[dict[str, Any]]:
    """For `tidemill status`, the newest first."""
    return [
        {"at": each.at, "reason": each.reason, "changes": list(each.changes), "loads": dict(each.loads)}
        for each in reversed(recent)
    ]
