"""What routers saw of requests and workers lately, as the controller is told it: frozen, standard library only.

Everything is a sum over a window, so that the pictures of several routers add up. Means, rates and fits are made of the
sums by whoever reads them. Seconds are durations or ages, never points in time: clocks of different machines differ.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self, TypeVar

from tidemill.core.model import Role, WorkerId, WorkerLoad

STALE_AFTER_S = 3.0  # workers report at least every half second; one silent for longer gets no new requests


@dataclass(frozen=True, slots=True)
class Sums:
    """Base of what can be added field by field."""

    def __add__(self, other: Self) -> Self:
        values = _values(type(self))
        return type(self)(*map(operator.add, values(self), values(other)))


Total = TypeVar("Total", bound=Sums)


def add_up(some: Sequence[Total]) -> Total:
    """Of one or more; costs a fraction of as many additions."""
    if len(some) == 1:
        return some[0]
    kind = type(some[0])
    return kind(*(functools.reduce(operator.add, column) for column in zip(*map(_values(kind), some), strict=True)))


def _values(kind: type[Sums]) -> Callable[[Sums], tuple[Any, ...]]:
    """All fields of a record, in their order; every kind has two or more."""
    found = _VALUES.get(kind)
    if found is None:
        found = _VALUES[kind] = operator.attrgetter(*(each.name for each in fields(kind)))
    return found


_VALUES: dict[type[Sums], Callable[[Sums], tuple[Any, ...]]] = {}


@dataclass(frozen=True, slots=True)
class Traffic(Sums):
    """Requests of one SLO class. A request counts when it arrives, when its first token leaves, and when it ends; what
    its output was like counts when it *arrived*, so that lengths belong to the traffic that brought them.
    """

    arrived: int = 0
    prompt_tokens: int = 0
    prompt_squares: int = 0  # sum of squared lengths: how far the mean may be off
    ttft_goal_s: float = 0.0  # sums over those that arrived; a class of requests' own goals has many
    tpot_goal_s: float = 0.0
    started: int = 0
    queue_s: float = 0.0
    prefill_s: float = 0.0
    transfer_s: float = 0.0
    first_decode_s: float = 0.0
    ttft_met: int = 0
    ttft_of_goal: float = 0.0  # sum of TTFT divided by its goal
    finished: int = 0
    paced: int = 0  # finished, with two tokens or more
    tpot_s: float = 0.0
    tpot_met: int = 0
    tpot_of_goal: float = 0.0
    met: int = 0  # finished within both goals
    failed: int = 0  # ended without finishing, not by their clients
    known: int = 0  # of those that arrived: finished by now
    output_tokens: int = 0  # theirs
    attended_tokens: int = 0  # sum over these tokens of the KV tokens each was computed with

    @property
    def attainment(self) -> float | None:
        """Share of ended requests that met both goals; None if none ended."""
        ended = self.finished + self.failed
        return self.met / ended if ended else None


@dataclass(frozen=True, slots=True)
class Waiting:
    """Requests without a first token, at this moment."""

    requests: int = 0
    tokens: int = 0  # of their prompts
    oldest_of_goal: float = 0.0  # the longest wait so far, divided by its TTFT goal


@dataclass(frozen=True, slots=True)
class Steps(Sums):
    """Samples of how long a decoding step took, with how many requests running and how many tokens of KV held.

    Sums, squares and products: enough for a plane through the samples. A step's time goes from the end of the one
    before it to its own, so it holds what was waited for as well.
    """

    samples: int = 0
    seconds: float = 0.0
    running: float = 0.0
    held: float = 0.0
    running_running: float = 0.0
    held_held: float = 0.0
    running_held: float = 0.0
    running_seconds: float = 0.0
    held_seconds: float = 0.0

    @staticmethod
    def of(running: int, held: int, seconds: float) -> "Steps":
        """One sample."""
        return Steps(
            1, seconds, running, held, running * running, held * held, running * held, running * seconds, held * seconds
        )


@dataclass(frozen=True, slots=True)
class Progress(Sums):
    """What one worker, or all of a role, did within a window."""

    seconds: float = 0.0  # of workers: two for one second are 2
    busy_s: float = 0.0  # of it in engine steps
    prompt_tokens: int = 0  # of prompts whose prefill ended, found in a prefix cache or not
    verifies: int = 0  # requests that got tokens from a step, one a step
    tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    steps: Steps = field(default_factory=Steps)

    def beside(self, other: "Progress") -> "Progress":
        """The same workers' progress as two routers saw it: each saw all of their time, but only its own requests."""
        total = self + other
        return Progress(
            max(self.seconds, other.seconds),
            max(self.busy_s, other.busy_s),
            *_values(Progress)(total)[2:],
        )

    @property
    def tokens_per_verify(self) -> float:
        return self.tokens / self.verifies if self.verifies else 1.0

    @property
    def acceptance(self) -> float | None:
        """Share of verified draft tokens that was accepted; None if nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else None


@dataclass(frozen=True, slots=True)
class Window:
    """The last `seconds`: requests by SLO class, and what all workers of a role did, while they had it."""

    seconds: float
    classes: tuple[tuple[str, Traffic], ...] = ()
    roles: tuple[tuple[Role, Progress], ...] = ()

    @property
    def all(self) -> Traffic:
        """All classes together."""
        return sum((traffic for _, traffic in self.classes), Traffic())

    def of(self, role: Role) -> Progress:
        return dict(self.roles).get(role, Progress())


@dataclass(frozen=True, slots=True)
class WorkerTelemetry:
    """One worker as a router knows it."""

    worker: WorkerId
    role: Role
    accepting: bool
    load: WorkerLoad
    heard_s: float  # since its last report
    stalled_s: float  # since it last made progress on what it has to do; 0 with nothing to do
    progress: Progress = field(default_factory=Progress)


@dataclass(frozen=True, slots=True)
class Decoding:
    """A request that could be moved to another verify worker now."""

    request_id: str
    worker: WorkerId
    tokens: int  # prompt and output so far


@dataclass(frozen=True, slots=True)
class RouterTelemetry:
    """One router's picture, or several merged. Windows are from the shortest to the longest."""

    windows: tuple[Window, ...] = ()
    waiting: Waiting = field(default_factory=Waiting)
    workers: tuple[WorkerTelemetry, ...] = ()


@dataclass(frozen=True, slots=True)
class History:
    """The last minute in points of `step_s`, the oldest first; the last point is still being filled."""

    step_s: float
    classes: tuple[tuple[str, tuple[Traffic, ...]], ...] = ()
    roles: tuple[tuple[Role, tuple[Progress, ...]], ...] = ()


@dataclass(frozen=True, slots=True)
class DecisionRecord:
    """A decision of the controller as people see it. Those that change nothing are kept when the reason is new."""

    at: float  # seconds of wall time
    reason: str
    changes: tuple[str, ...]
    loads: tuple[tuple[str, float], ...]
