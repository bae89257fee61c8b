"""A change of role, step by step: load what the new role needs, drain, switch, prove, publish under a new epoch."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import StrEnum

from tidemill.core.model import Role
from workers.engines import Engines


class Move(StrEnum):
    """What the worker does about a switch in this turn."""

    WAIT = "wait"
    DRAIN = "drain"  # take no more
    SWITCH = "switch"
    ABANDON = "abandon"  # what the new role needs could not be loaded


@dataclass(slots=True, eq=False)
class RoleSwitch:
    """One wish for another role. `done` is resolved by whoever carries the moves out."""

    to: Role | None  # None: the worker leaves, once it has drained
    drain_s: float  # how long running requests may go on
    done: "Future[None]" = field(default_factory=Future)
    loaded: bool = False
    error: Exception | None = None
    deadline: float | None = None  # set when draining began

    def next_move(self, now: float, *, idle: bool) -> Move:
        """`idle`: nothing would be lost now."""
        if self.error is not None:
            return Move.ABANDON
        if not self.loaded:
            return Move.WAIT
        if self.deadline is None:
            return Move.DRAIN
        return Move.SWITCH if idle or now >= self.deadline else Move.WAIT

    def drain(self, now: float) -> None:
        self.deadline = now + self.drain_s

    def finish_loading(self, error: Exception | None) -> None:
        self.loaded, self.error = error is None, error


def load_beside(switch: RoleSwitch, engines: Engines, deliver: Callable[[Callable[[], None]], None]) -> None:
    """Load a model on a thread of its own while the old role serves on; the outcome is delivered to the engine's."""
    role = switch.to
    if role is None or engines.has(role):
        return switch.finish_loading(None)

    def run() -> None:
        error: Exception | None = None
        try:
            engines.of(role)
        except Exception as raised:
            error = raised
        deliver(lambda: switch.finish_loading(error))

    threading.Thread(target=run, name=f"load-{role}", daemon=True).start()
