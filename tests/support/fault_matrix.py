"""What can happen to whom at which stage, and what must hold then: a pure description of the matrix of faults."""

from dataclasses import dataclass
from enum import StrEnum
from itertools import product


class Target(StrEnum):
    PREFILL = "prefill"
    DRAFT = "draft"
    VERIFY = "verify"
    LINK = "KV link"
    ROUTER = "router"
    CONTROLLER = "controller"
    LAST_PREFILL = "last prefill"
    LAST_DRAFT = "last draft"
    LAST_VERIFY = "last verify"


LAST = frozenset({Target.LAST_PREFILL, Target.LAST_DRAFT, Target.LAST_VERIFY})
PLACE_S = 10.0  # as long a request waits for a place


class Fault(StrEnum):
    KILL = "SIGKILL"
    STOP = "SIGSTOP"
    CUT = "cut"
    SLOW = "slow"


class Stage(StrEnum):
    """Of the request that the fault is to strike."""

    QUEUED = "queued"
    PREFILLING = "prefilling"
    TRANSFERRING = "transferring"
    DECODING = "decoding"
    VERIFYING = "verifying"


@dataclass(frozen=True, slots=True)
class Cell:
    target: Target
    fault: Fault
    stage: Stage

    @property
    def not_applicable(self) -> str:
        """Why it makes no sense; empty if it does."""
        if self.target is Target.LINK and self.fault is Fault.KILL:
            return "a link is no process; its sudden end is `cut`"
        return ""

    def limit_s(self, stall_s: float) -> float | None:
        """Longest time without a token that the fault may cost; None where the fault itself lasts."""
        if self.fault is Fault.SLOW:
            return None
        if self.target is Target.LAST_VERIFY:  # another worker has to become one
            return PLACE_S
        return 2.0 + (stall_s if self.fault is Fault.STOP else 0.0)


@dataclass(frozen=True, slots=True)
class Found:
    """What a cell's run showed."""

    failed: int
    changed: int
    recovery_s: float
    leaked: int
    errors: tuple[str, ...] = ()

    def holds(self, cell: Cell, stall_s: float) -> bool:
        limit_s = cell.limit_s(stall_s)
        in_time = limit_s is None or self.recovery_s < limit_s
        return in_time and not (self.failed or self.changed or self.leaked)


MATRIX = tuple(
    Cell(*each)
    for each in product(Target, Fault, Stage)
    if each[0] not in LAST or each[1] in {Fault.KILL, Fault.STOP}  # cut or slow, it is still there
)


def row(cell: Cell, found: Found | None, stall_s: float) -> str:
    """Of the table."""
    where = f"| {cell.target} | {cell.fault} | {cell.stage} |"
    if found is None:
        return f"{where} | | | | n/a: {cell.not_applicable} |"
    verdict = "holds" if found.holds(cell, stall_s) else "**broken** " + "; ".join(found.errors)[:200]
    return f"{where} {found.failed} | {found.changed} | {found.recovery_s:.2f} | {found.leaked} | {verdict.strip()} |"
