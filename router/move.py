"""One request's way from the verify worker it decodes on to another, while it decodes.

    1 reserve   the target holds blocks for the KV there is, and for what comes meanwhile
    2 copy      the source sends full blocks while it decodes on; when little is left it pauses and sends that too,
                with the tokens that came meanwhile
    3 go on     the target decodes the next
    4 release   with that token the request has moved, and the source drops what it held

Until then it can be called off at any moment, by whatever fails, and the source decodes on. The router alone decides
that: it listens to the source until it has paused and to the target after it, never to both.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from router.inbox import Inbox
from router.pools_view import Conversation, WorkerConnection, WorkerLost
from tidemill.core.clock import Clock
from tidemill.core.lifecycle import MOVE_MOVES, Lifecycle, MoveState
from tidemill.core.messages import (
    Command,
    Event,
    Failed,
    Lease,
    LeaseGranted,
    Migrate,
    Paused,
    Refused,
    Reserve,
    Resume,
    Staying,
    Tokens,
)
from tidemill.core.model import Peer, Request
from tidemill.core.settings import DeadlineSettings

Kind = TypeVar("Kind", bound=Event)


class MoveOutcome(StrEnum):
    """How a move ended; but for the first, and the last, the request decodes where it did."""

    MOVED = "moved"
    REFUSED = "refused"  # the target has no room, or takes no more
    STAYED = "stayed"  # the source could not send it; see Stay
    FAILED = "failed"  # the target, or what was sent to it, was lost
    TIMEOUT = "timeout"
    OVER = "over"  # the request ended first, or was given up


class _CalledOff(Exception):
    def __init__(self, outcome: MoveOutcome) -> None:
        super().__init__(outcome)
        self.outcome = outcome


@dataclass(frozen=True, slots=True)
class MoveTerms:
    """What a move may take."""

    deadlines: DeadlineSettings
    headroom_tokens: int  # that may come while it is copied
    drafter: Peer | None  # who drafts for it at the target


class Move:
    """See the module. Made by an attempt, which hands it every event first; run by whoever asked for it."""

    def __init__(self, source: Conversation, target: Conversation, request: Request, clock: Clock) -> None:
        """`request` is what the target shall know: with all tokens that have come."""
        self._source = source
        self._target = target
        self._request = request
        self._clock = clock
        self._lifecycle = Lifecycle(MoveState.RESERVING, MOVE_MOVES)
        self._inbox: Inbox[Event | None] = Inbox()  # a few answers; None: the attempt is over
        self._lease_id: int | None = None
        self._source_lost: Failed | None = None
        self._early: list[Tokens] = []  # of the target, before it was heard that the source has paused
        self._paused_at = 0.0
        self.pause_s: float | None = None  # from the source's pause to the target's first token

    # --- what the attempt hears, at once ------------------------------------------------------------------------

    def passes(self, worker: WorkerConnection, event: Event) -> Sequence[tuple[WorkerConnection, Event]]:
        """What the request is to hear now that this came: nothing, if it is about the move alone."""
        if not self._lifecycle.ended:
            if worker is self._target.worker:
                return self._heard_of_target(event)
            if worker is self._source.worker:
                return self._heard_of_source(event)
        return [(worker, event)]

    def _heard_of_target(self, event: Event) -> Sequence[tuple[WorkerConnection, Event]]:
        if not isinstance(event, Tokens):
            self._inbox.put(event)
            return []
        self._early.append(event)
        return self._arrive() if self._lifecycle.state is MoveState.RESUMING else []

    def _heard_of_source(self, event: Event) -> Sequence[tuple[WorkerConnection, Event]]:
        match event:
            case Paused(_, lease_id) | Staying(_, lease_id):
                if lease_id != self._lease_id or self._lifecycle.state is not MoveState.COPYING:
                    return []  # of an earlier move
                self._inbox.put(event)
                if isinstance(event, Staying):
                    return []
                self._paused_at = self._clock.monotonic()
                self._lifecycle.move(MoveState.RESUMING)
                return self._arrive() if self._early else []
            case Failed() if self._lifecycle.state is MoveState.RESUMING:
                self._source_lost = event  # the target may have all of it
                return []
            case Tokens(finish=finish) if finish is not None:
                self._inbox.put(event)
        return [(self._source.worker, event)]

    def _arrive(self) -> Sequence[tuple[WorkerConnection, Event]]:
        self._lifecycle.move(MoveState.MOVED)
        self.pause_s = self._clock.monotonic() - self._paused_at
        self._source.close(cancel=True)
        self._inbox.put(self._early[0])
        return [(self._target.worker, event) for event in self._early]

    def end(self) -> None:
        """The attempt is over, or the move."""
        if not self._lifecycle.ended:
            self._lifecycle.move(MoveState.CALLED_OFF)
            self._target.close(cancel=True)
            self._inbox.put(None)

    @property
    def left_behind(self) -> Conversation:
        """Once it has ended: the one that is of no more use to the attempt."""
        return self._source if self._lifecycle.state is MoveState.MOVED else self._target

    @property
    def kept_back(self) -> Failed | None:
        """Once it has ended: what the source said while the target might have gone on without it, and did not."""
        return None if self._lifecycle.state is MoveState.MOVED else self._source_lost

    # --- what it does -------------------------------------------------------------------------------------------

    async def run(self, terms: MoveTerms) -> MoveOutcome:
        """Carry it out, or call it off."""
        deadlines = terms.deadlines
        try:
            lease = await self._reserve(terms)
            await self._copy(lease, deadlines.move_s)
            await self._answer(Tokens, deadlines.resume_s)
            return MoveOutcome.MOVED
        except _CalledOff as reason:
            return reason.outcome
        finally:
            self._inbox.close()
            if not self._lifecycle.ended:
                self.end()
                self._decode_on()

    async def _reserve(self, terms: MoveTerms) -> Lease:
        deadlines = terms.deadlines
        self._tell(self._target, Reserve(self._request, deadlines.move_s, terms.drafter, terms.headroom_tokens))
        granted = await self._answer(LeaseGranted, deadlines.reserve_s)
        self._lifecycle.move(MoveState.COPYING)
        return granted.lease

    async def _copy(self, lease: Lease, timeout_s: float) -> None:
        self._lease_id = lease.id
        self._tell(self._source, Migrate(self._source.request_id, lease, len(self._request.tokens)))
        await self._answer(Paused, timeout_s)

    def _decode_on(self) -> None:
        """The source, as if nothing had been; it may not even have been asked."""
        with contextlib.suppress(WorkerLost):
            self._source.send(Resume(self._source.request_id))

    def _tell(self, conversation: Conversation, command: Command) -> None:
        try:
            conversation.send(command)
        except WorkerLost:
            raise _CalledOff(MoveOutcome.FAILED) from None

    async def _answer(self, kind: type[Kind], timeout_s: float) -> Kind:
        try:
            event = await self._inbox.get(timeout_s)
        except TimeoutError:
            raise _CalledOff(MoveOutcome.TIMEOUT) from None
        if self._lifecycle.state is MoveState.CALLED_OFF:  # since the answer came
            raise _CalledOff(MoveOutcome.OVER)
        if isinstance(event, kind):
            return event
        match event:
            case None | Tokens():
                raise _CalledOff(MoveOutcome.OVER)
            case Refused():
                raise _CalledOff(MoveOutcome.REFUSED)
            case Staying():
                raise _CalledOff(MoveOutcome.STAYED)
        raise _CalledOff(MoveOutcome.FAILED)
