"""Which workers to start and which to let go, for as many of each role as an operator asks for."""

import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from tidemill.core.model import Decision, Role

UNKNOWN = sys.maxsize  # residual of a worker that says nothing: others go first


class ScalingReason(StrEnum):
    """What a plan does."""

    AS_ASKED = "as_asked"  # there are as many already
    UP = "up"
    DOWN = "down"
    BOTH = "both"
    NO_VERIFY_LEFT = "no_verify_left"  # refused: nothing could be decoded


@dataclass(frozen=True, slots=True)
class Staff:
    """A worker as scaling sees it; `residual` is what must be finished or moved before it is free."""

    name: str
    role: Role
    residual: int = 0
    leaving: bool = False  # has been told to go


@dataclass(frozen=True, slots=True)
class Plan:
    """New workers by name and role, and the names of those that go."""

    start: tuple[tuple[str, Role], ...] = ()
    leave: tuple[str, ...] = ()


def plan(workers: Sequence[Staff], wanted: Mapping[Role, int]) -> Decision[Plan]:
    """Roles that are not named stay as they are. Who has the least to finish goes. Names are never used twice."""
    staying = [worker for worker in workers if not worker.leaving]
    counts = {role: sum(worker.role is role for worker in staying) for role in Role}
    if (counts | dict(wanted))[Role.VERIFY] < 1:
        return Decision(Plan(), ScalingReason.NO_VERIFY_LEFT)
    taken = {worker.name for worker in workers}
    start: list[tuple[str, Role]] = []
    leave: list[str] = []
    for role in Role:
        missing = wanted.get(role, counts[role]) - counts[role]
        free = (name for index in itertools.count() if (name := f"{role}-{index}") not in taken)
        start += [(next(free), role) for _ in range(missing)]
        pool = sorted((w for w in staying if w.role is role), key=lambda w: (w.residual, w.name))
        leave += [worker.name for worker in pool[: max(-missing, 0)]]
    reason = {
        (False, False): ScalingReason.AS_ASKED,
        (True, False): ScalingReason.UP,
        (False, True): ScalingReason.DOWN,
        (True, True): ScalingReason.BOTH,
    }[bool(start), bool(leave)]
    return Decision(Plan(tuple(start), tuple(leave)), reason)
