"""Pools of workers as fluids: no single requests, no noise. Makes the pictures the rebalancing policy decides on."""

from dataclasses import dataclass, field, fields
from typing import Any

from cluster.policy.rebalance import RoleChange
from tidemill.core.model import Role, WorkerId, WorkerLoad
from tidemill.core.telemetry import Progress, RouterTelemetry, Steps, Sums, Traffic, Waiting, Window, WorkerTelemetry

WINDOWS_S = (1.0, 3.0, 10.0, 30.0, 90.0)
TICK_S = 0.5
BLOCK, BLOCKS = 16, 4000
MOST_RUNNING, MOST_WAITING = 256, 512  # on each verify worker; in the routers, which turn others away


@dataclass(frozen=True)
class Load:
    """What arrives each second."""

    rate: float
    prompt: int
    output: int


@dataclass(frozen=True)
class Speed:
    """What one worker can do."""

    prompt_tokens_per_s: float = 8000.0
    step_s: float = 0.02
    request_s: float = 0.00004
    held_token_s: float = 6e-7


@dataclass(frozen=True, slots=True)
class Totals(Sums):
    """Everything since the beginning."""

    traffic: Traffic = field(default_factory=Traffic)
    prefill: Progress = field(default_factory=Progress)
    verify: Progress = field(default_factory=Progress)


def _between(total: Sums, before: Sums) -> Any:
    """What was added since."""
    found = []
    for each in fields(total):
        one, other = getattr(total, each.name), getattr(before, each.name)
        found.append(_between(one, other) if isinstance(one, Sums) else one - other)
    return type(total)(*found)


@dataclass
class FluidCluster:
    """Roles change at once; what a worker held is everybody's."""

    roles: dict[str, Role]
    speed: Speed = field(default_factory=Speed)
    ttft_s: float = 1.0
    tpot_s: float = 0.05
    now: float = 0.0
    running: float = 0.0
    context: float = 500.0  # tokens of a running request
    backlog: float = 0.0  # prompt tokens
    totals: list[Totals] = field(default_factory=lambda: [Totals()])  # after each tick
    step_s: float = 0.0

    def count(self, role: Role) -> int:
        return sum(each is role for each in self.roles.values())

    def advance(self, load: Load) -> None:
        """Half a second."""
        self.now += TICK_S
        prefill, verify = self.count(Role.PREFILL), max(self.count(Role.VERIFY), 1)
        came = load.rate * load.prompt * TICK_S
        room = max(MOST_RUNNING * verify - self.running, 0.0) * load.prompt
        done = min(self.backlog + came, prefill * self.speed.prompt_tokens_per_s * TICK_S, room)
        self.backlog = min(self.backlog + came - done, MOST_WAITING * load.prompt)
        held = self.running * self.context
        step_s = self.speed.step_s + (self.speed.request_s * self.running + self.speed.held_token_s * held) / verify
        begun = done / load.prompt
        ended = min(self.running * TICK_S / (load.output * step_s), self.running)
        if self.running + begun:
            mean = load.prompt + load.output / 2
            self.context += (mean - self.context) * begun / (self.running + begun)
        self.running += begun - ended
        ttft_s = load.prompt / self.speed.prompt_tokens_per_s + self.backlog / max(
            prefill * self.speed.prompt_tokens_per_s, 1.0
        )
        self._record(load, done, ended, step_s, ttft_s)

    def _record(self, load: Load, done: float, ended: float, step_s: float, ttft_s: float) -> None:
        arrived = load.rate * TICK_S
        verify = max(self.count(Role.VERIFY), 1)
        met = ttft_s <= self.ttft_s and step_s <= self.tpot_s
        traffic = Traffic(
            arrived=arrived,  # type: ignore[arg-type]  # fractions of requests
            prompt_tokens=arrived * load.prompt,  # type: ignore[arg-type]
            prompt_squares=arrived * load.prompt**2,  # type: ignore[arg-type]
            ttft_goal_s=arrived * self.ttft_s,
            tpot_goal_s=arrived * self.tpot_s,
            finished=ended,  # type: ignore[arg-type]
            met=ended * met,  # type: ignore[arg-type]
            known=arrived,  # type: ignore[arg-type]
            output_tokens=arrived * load.output,  # type: ignore[arg-type]
            attended_tokens=arrived * load.output * (load.prompt + load.output // 2),  # type: ignore[arg-type]
        )
        steps = Steps.of(round(self.running / verify), round(self.running * self.context / verify), step_s)
        prefill = Progress(busy_s=done / self.speed.prompt_tokens_per_s, prompt_tokens=round(done))
        self.step_s = step_s
        self.totals.append(self.totals[-1] + Totals(traffic, prefill, Progress(verifies=1, tokens=1, steps=steps)))

    def picture(self) -> RouterTelemetry:
        windows = []
        for span_s in WINDOWS_S:
            ticks = min(int(span_s / TICK_S), len(self.totals) - 1)
            seen: Totals = _between(self.totals[-1], self.totals[-1 - ticks])
            roles = ((Role.PREFILL, seen.prefill), (Role.VERIFY, seen.verify))
            windows.append(Window(max(ticks, 1) * TICK_S, (("default", seen.traffic),), roles))
        workers = tuple(self._worker(name, role) for name, role in self.roles.items())
        return RouterTelemetry(tuple(windows), Waiting(tokens=round(self.backlog)), workers)

    def _worker(self, name: str, role: Role) -> WorkerTelemetry:
        if role is Role.VERIFY:
            count = self.count(Role.VERIFY)
            used = min(round(self.running * self.context / count / BLOCK), BLOCKS)
            load = WorkerLoad(0, 0, round(self.running / count), BLOCKS, used, 0, BLOCK)
        else:
            queued = round(self.backlog / max(self.count(Role.PREFILL), 1)) if role is Role.PREFILL else 0
            load = WorkerLoad(0, queued, 0, BLOCKS, 0, 0, BLOCK)
        return WorkerTelemetry(WorkerId(name, 1), role, True, load, 0.0, 0.0)

    def apply(self, changes: tuple[RoleChange, ...]) -> None:
        for change in changes:
            self.roles[change.worker] = change.to


def cluster_of(prefill: int, draft: int, verify: int) -> FluidCluster:
    counts = {Role.PREFILL: prefill, Role.DRAFT: draft, Role.VERIFY: verify}
    return FluidCluster({f"{role}-{index}": role for role, count in counts.items() for index in range(count)})
