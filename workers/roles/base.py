"""What a role is: how a worker answers commands, and what it does around each step of its engine.

All methods run on the engine's thread. A role keeps no thread, socket or clock of its own: time comes in as an
argument, what it has to say goes out through `Outbox`.
"""

from typing import Protocol

from tidemill.core.messages import Command, Event, Failure
from tidemill.core.model import Role
from workers.engine.base import StepOutput


class Outbox(Protocol):
    """Where a role's words go: each event to the router that sent the request."""

    def emit(self, event: Event) -> None: ...

    def forget(self, request_id: str) -> None:
        """Nothing more will be said of this request."""
        ...


class WorkerRole(Protocol):
    """One of prefill, draft, verify."""

    role: Role

    def handle(self, command: Command, now: float) -> None:
        """Take a command of a router; what is wrong with it is answered, never raised."""
        ...

    def cancel(self, request_id: str) -> None:
        """Release everything held for a request, at whatever stage; harmless if unknown."""
        ...

    def poll(self, now: float) -> None:
        """Deadlines."""
        ...

    def next_step_at(self, now: float) -> float | None:
        """When the engine should step: `now` or earlier means at once, None means nothing to do."""
        ...

    def before_step(self, now: float) -> None: ...

    def after_step(self, output: StepOutput, now: float) -> None: ...

    def engine_failed(self, detail: str) -> None:
        """A step raised: give up every request."""
        ...

    def give_up(self, failure: Failure, detail: str) -> None:
        """Fail every request, release everything; the role is idle after it."""
        ...

    def close(self) -> None:
        """Close links and streams; the role is not used after it."""
        ...

    @property
    def idle(self) -> bool:
        """True if no request is held at any stage."""
        ...

    def probe(self) -> None:
        """Prove that this role can do its work; raises RuntimeError if not."""
        ...
