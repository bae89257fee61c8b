"""The cluster as people are shown it: one picture for the terminal, for scripts and for the web page.

Made of telemetry by one pure function; how it is drawn is decided elsewhere. Everything in it becomes JSON as it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tidemill.core.model import Role, WorkerLoad
from tidemill.core.telemetry import (
    STALE_AFTER_S,
    DecisionRecord,
    History,
    Progress,
    RouterTelemetry,
    Traffic,
    WorkerTelemetry,
)

STALLED_AFTER_S = 5.0
RATE_POINTS = 5  # of the history: what "now" means for a rate
Series = tuple[float | None, ...]  # None: nothing happened that could be measured


@dataclass(frozen=True, slots=True)
class FrontDoor:
    """What the router says of itself."""

    cluster: str
    address: str
    model: str
    active: int  # requests being served
    queued: int
    rebalances: bool  # the controller may change roles


@dataclass(frozen=True, slots=True)
class Outlook:
    """What one router has to show; a picture is made of it, or of several that were put together."""

    front: FrontDoor
    telemetry: RouterTelemetry  # its windows are not needed
    history: History
    decisions: tuple[DecisionRecord, ...]  # the newest last

    def picture(self, wall: float) -> "Picture":
        """`wall`: seconds of wall time."""
        return picture(self.front, self.telemetry, self.history, self.decisions, wall)


@dataclass(frozen=True, slots=True)
class WorkerLine:
    """One worker. Shares are from 0 to 1."""

    worker: str  # name@epoch
    role: str
    state: str  # serving, stalled, draining or unreachable
    running: int
    queued: int
    kv_share: float  # used and leased blocks
    kv_blocks: int
    kv_blocks_total: int
    step_s: float  # the last step
    busy_share: float
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class PoolLine:
    """All workers of a role."""

    role: str
    workers: int
    serving: int
    running: int
    queued: int
    kv_share: float
    busy_share: float
    rate: float  # a second: tokens of verify workers, prompt tokens of prefill workers, of draft workers none are known


@dataclass(frozen=True, slots=True)
class ClassLine:
    """One SLO class over the last minute."""

    name: str
    arrived: int
    finished: int
    failed: int
    attainment: float | None  # of both goals; None: no request ended
    ttft_met: float | None  # share of started requests
    tpot_met: float | None  # share of finished requests
    ttft_s: float | None  # means
    tpot_s: float | None
    series: Series  # attainment


@dataclass(frozen=True, slots=True)
class DecisionLine:
    at: float  # seconds of wall time
    reason: str
    changes: tuple[str, ...]
    loads: dict[str, float]


@dataclass(frozen=True, slots=True)
class Picture:
    at: float  # seconds of wall time
    front: FrontDoor
    waiting: int  # requests without a first token
    oldest_of_goal: float  # the longest of these waits, divided by its TTFT goal
    tokens_per_s: float
    arrivals_per_s: float
    step_s: float  # between two points of a series
    tokens: Series  # a second
    pools: tuple[PoolLine, ...]
    workers: tuple[WorkerLine, ...]
    classes: tuple[ClassLine, ...]
    decisions: tuple[DecisionLine, ...]  # the newest first


def picture(
    front: FrontDoor,
    telemetry: RouterTelemetry,
    history: History,
    decisions: Sequence[DecisionRecord],
    wall: float,
) -> Picture:
    """`decisions`: the newest last; `wall`: seconds of wall time."""
    order = {role: place for place, role in enumerate(Role)}
    known = sorted(telemetry.workers, key=lambda each: (order[each.role], *_numbered(each.worker.name)))
    rates = {role: _rates(points, history.step_s) for role, points in history.roles}
    arrivals = [sum(each) for each in zip(*([t.arrived for t in points] for _, points in history.classes), strict=True)]
    return Picture(
        wall,
        front,
        telemetry.waiting.requests,
        telemetry.waiting.oldest_of_goal,
        _now(rates.get(Role.VERIFY, ())),
        _now([count / history.step_s for count in arrivals]),
        history.step_s,
        tuple(rates.get(Role.VERIFY, ())),
        tuple(_pool(role, known, _now(rates.get(role, ()))) for role in Role),
        tuple(_worker(each) for each in known),
        tuple(_class(name, points) for name, points in history.classes),
        tuple(DecisionLine(each.at, each.reason, each.changes, dict(each.loads)) for each in reversed(decisions)),
    )


def _numbered(name: str) -> tuple[str, int]:
    """verify-2 comes before verify-10."""
    stem, _, number = name.rpartition("-")
    return (stem, int(number)) if number.isdecimal() else (name, 0)


def _rates(points: Sequence[Progress], step_s: float) -> list[float]:
    return [(each.tokens or each.prompt_tokens) / step_s for each in points]


def _now(rates: Sequence[float]) -> float:
    """Of the last full points: the one that is being filled would always look like a drop."""
    full = rates[-RATE_POINTS - 1 : -1]
    return sum(full) / len(full) if full else 0.0


def state_of(worker: WorkerTelemetry) -> str:
    if worker.heard_s > STALE_AFTER_S:
        return "unreachable"
    if worker.stalled_s > STALLED_AFTER_S:
        return "stalled"
    return "serving" if worker.accepting else "draining"


def _worker(worker: WorkerTelemetry) -> WorkerLine:
    load, progress = worker.load, worker.progress
    return WorkerLine(
        str(worker.worker),
        str(worker.role),
        state_of(worker),
        load.running_requests,
        load.queued_requests,
        _kv_share([load]),
        load.kv_blocks_used + load.kv_blocks_leased,
        load.kv_blocks_total,
        load.step_s,
        _busy_share([progress]),
        (progress.tokens or progress.prompt_tokens) / progress.seconds if progress.seconds else 0.0,
    )


def _pool(role: Role, workers: Sequence[WorkerTelemetry], rate: float) -> PoolLine:
    ours = [each for each in workers if each.role is role]
    loads = [each.load for each in ours]
    return PoolLine(
        str(role),
        len(ours),
        sum(state_of(each) == "serving" for each in ours),
        sum(load.running_requests for load in loads),
        sum(load.queued_requests for load in loads),
        _kv_share(loads),
        _busy_share([each.progress for each in ours]),
        rate,
    )


def _kv_share(loads: Sequence[WorkerLoad]) -> float:
    total = sum(load.kv_blocks_total for load in loads)
    return sum(load.kv_blocks_used + load.kv_blocks_leased for load in loads) / total if total else 0.0


def _busy_share(progress: Sequence[Progress]) -> float:
    seconds = sum(each.seconds for each in progress)
    return min(sum(each.busy_s for each in progress) / seconds, 1.0) if seconds else 0.0


def _class(name: str, points: Sequence[Traffic]) -> ClassLine:
    total = sum(points, Traffic())
    ttft_s = total.queue_s + total.prefill_s + total.transfer_s + total.first_decode_s
    return ClassLine(
        name,
        total.arrived,
        total.finished,
        total.failed,
        total.attainment,
        _share(total.ttft_met, total.started),
        _share(total.tpot_met, total.finished),
        _share(ttft_s, total.started),
        _share(total.tpot_s, total.paced),
        tuple(each.attainment for each in points),
    )


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole else None
