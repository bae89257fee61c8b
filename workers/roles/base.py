"""What a role is: how a worker answers commands, and what it does around each step of its engine.

All methods run on the engine's thread. A role keeps no thread, socket or clock of its own: time comes in as an
argument, what it has to say goes out through `Outbox`.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Protocol

from tidemill.core.messages import Command, Event, Failed, Failure, Refusal, Refused
from tidemill.core.model import Role
from workers.engine.base import StepOutput

log = logging.getLogger(__name__)


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
        """Once a turn: deadlines, and what is idle for long."""
        ...

    def next_step_at(self, now: float) -> float | None:
        """When the engine should step: `now` or earlier means at once, None means nothing to do."""
        ...

    def next_poll_at(self) -> float | None:
        """The next deadline, if one is near enough to matter before the next heartbeat."""
        ...

    def before_step(self, now: float) -> None:
        """The engine is about to step."""
        ...

    def after_step(self, output: StepOutput, now: float) -> None:
        """Turn what the step did into events."""
        ...

    def drain(self) -> None:
        """No new work comes: hand back what has not begun."""
        ...

    def give_up(self, failure: Failure, detail: str) -> None:
        """Fail every request, release everything; the role is idle after it."""
        ...

    def close(self) -> None:
        """Close links and streams; the role is not used after it."""
        ...

    @property
    def idle(self) -> bool:
        """True if nothing would be lost by a change of role now."""
        ...

    def probe(self) -> None:
        """Prove on an idle engine that this role can do its work; raises if not."""
        ...


def refuse(outbox: Outbox, request_id: str, reason: Refusal) -> None:
    """Say no; nothing is held of the request."""
    outbox.emit(Refused(request_id, reason))
    outbox.forget(request_id)


def fail(outbox: Outbox, request_id: str, failure: Failure, detail: str) -> None:
    """Give a request up that is released, or never was held."""
    outbox.emit(Failed(request_id, failure, detail))
    outbox.forget(request_id)


def for_each(requests: Iterable[str], action: Callable[[str], None]) -> None:
    """Do something for all requests, even if it fails for one: after an engine's defect the others must not leak."""
    for request_id in list(requests):
        try:
            action(request_id)
        except Exception:
            log.exception("request %s could not be released", request_id)
