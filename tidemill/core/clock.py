"""Time comes in from outside: policies and state machines take a number, shells take a `Clock`."""

import time
from typing import Protocol


class Clock(Protocol):
    """A source of seconds."""

    def monotonic(self) -> float:
        """Seconds that never go back; only differences mean anything."""
        ...


class SystemClock:
    """The machine's own clock."""

    def monotonic(self) -> float:
        return time.monotonic()


def new_epoch() -> int:
    """Number of a worker's incarnation: milliseconds of wall time, so that a restarted worker's is larger."""
    return time.time_ns() // 1_000_000
