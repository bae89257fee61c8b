"""One try at serving a request: its conversations with the workers that were chosen for it."""

from dataclasses import replace
from typing import TypeVar

from router.inbox import Inbox
from router.move import Move
from router.pools_view import Conversation, PoolsView, WorkerConnection, WorkerLost
from tidemill.core.clock import Clock
from tidemill.core.messages import Command, Event, Failed, Failure, Refusal, Refused, Tokens
from tidemill.core.model import Request, WorkerId, WorkerSnapshot
from tidemill.types import FinishReason

Kind = TypeVar("Kind", bound=Event)
Heard = tuple[WorkerConnection, Event]
TIMEOUT = "timeout"


class AttemptFailed(Exception):
    """A worker failed the request, which goes on elsewhere if it may."""

    def __init__(self, worker: WorkerId, failure: Failure | str, detail: str) -> None:
        super().__init__(f"{worker}: {failure}: {detail}")
        self.worker = worker
        self.failure = str(failure)


class AttemptRefused(Exception):
    """A worker has no room for the request; nothing is held there."""

    def __init__(self, worker: WorkerId, reason: Refusal) -> None:
        super().__init__(f"{worker} refused: {reason}")
        self.worker = worker
        self.reason = reason


class Attempt:
    """Everything heard of the request, from all its workers, comes in one queue. `close` ends it everywhere at once.

    While it decodes it may move to another verify worker, and is the same attempt after it.
    """

    def __init__(self, request: Request, pools: PoolsView) -> None:
        self.request = request
        self.tokens: list[int] = []  # that have come, whether they were read or not
        self._pools = pools
        # Bounded by the request itself: one event a step, and no more steps than its context has tokens.
        self._heard: Inbox[Heard] = Inbox()
        self._open: list[Conversation] = []
        self._decodes_on: WorkerConnection | None = None
        self._move: Move | None = None

    def tell(self, worker: WorkerSnapshot, command: Command) -> None:
        """Open a conversation with a command. Raises AttemptFailed if the worker has gone meanwhile."""
        try:
            conversation = self._pools.connection(worker.peer).open(self.request.id, self._hear)
            self._open.append(conversation)
            conversation.send(command)
        except WorkerLost as error:
            raise AttemptFailed(worker.peer.id, error.failure, str(error)) from error

    def add(self, worker: WorkerSnapshot, command: Command) -> None:
        """Another command in an open conversation. Raises AttemptFailed if the worker has gone meanwhile."""
        for conversation in self._open:
            if conversation.worker.peer.id == worker.peer.id:
                try:
                    conversation.send(command)
                except WorkerLost as error:
                    raise AttemptFailed(worker.peer.id, error.failure, str(error)) from error

    async def next(self, timeout_s: float, blame: WorkerId) -> Event:
        """The next event. Raises AttemptRefused or AttemptFailed; `blame` is who failed if nothing comes in time."""
        return _checked(*await self._next(timeout_s, blame))

    async def expect(self, kind: type[Kind], timeout_s: float, blame: WorkerId) -> Kind:
        """The next event of a kind; others, which another worker was quicker with, are kept. Raises as `next` does."""
        early: list[Heard] = []
        while True:
            worker, event = await self._next(timeout_s, blame)
            if isinstance(event := _checked(worker, event), kind):
                for heard in reversed(early):
                    self._heard.put_back(heard)
                return event
            early.append((worker, event))

    async def _next(self, timeout_s: float, blame: WorkerId) -> Heard:
        try:
            return await self._heard.get(timeout_s)
        except TimeoutError:
            raise AttemptFailed(blame, TIMEOUT, f"nothing came within {timeout_s:.1f} s") from None

    def more_tokens(self) -> list[Tokens]:
        """Tokens that have come meanwhile, so that a slow client gets fewer and larger chunks.

        Whatever else comes behind them, a failure too, is left for `next`: it must not cost the tokens before it.
        """
        found: list[Tokens] = []
        while (heard := self._heard.take()) is not None:
            if not isinstance(heard[1], Tokens):
                self._heard.put_back(heard)
                break
            found.append(heard[1])
        return found

    def _hear(self, worker: WorkerConnection, event: Event) -> None:
        for heard in self._move.passes(worker, event) if self._move is not None else ((worker, event),):
            if isinstance(heard[1], Tokens):
                self.tokens += heard[1].tokens
                self._decodes_on = heard[0]
            self._heard.put(heard)

    # --- moves --------------------------------------------------------------------------------------------------

    @property
    def decodes_on(self) -> WorkerConnection | None:
        """The worker that the last tokens came from; None before the first."""
        return self._decodes_on

    @property
    def moving(self) -> bool:
        return self._move is not None

    def begin_move(self, target: WorkerConnection, request_id: str, clock: Clock) -> Move:
        """Whoever asks for it runs it, and ends it. The target will know the request as `request_id`."""
        source = next(each for each in self._open if each.worker is self._decodes_on)
        arriving = target.open(request_id, self._hear)
        self._open.append(arriving)
        request = replace(self.request.resumed(self.tokens), id=request_id)
        self._move = Move(source, arriving, request, clock)
        return self._move

    def end_move(self) -> None:
        move, self._move = self._move, None
        if move is not None:
            self._open = [each for each in self._open if each is not move.left_behind]
            if move.kept_back is not None and self._decodes_on is not None:
                self._heard.put((self._decodes_on, move.kept_back))

    def leave(self, worker: WorkerSnapshot | None, *, cancel: bool = False) -> None:
        """A worker that has done its part, or will not: what becomes of it does not matter to the request any more."""
        for conversation in [each for each in self._open if worker and each.worker.peer.id == worker.peer.id]:
            conversation.close(cancel=cancel)
            self._open.remove(conversation)

    def close(self, finish: FinishReason | None) -> None:
        """Hear no more. Unless the request finished, all its workers are told to drop what they may still hold."""
        if self._move is not None:
            self._move.end()
        for conversation in self._open:
            conversation.close(cancel=finish is None)
        self._open.clear()
        self._heard.close()


def _checked(worker: WorkerConnection, event: Event) -> Event:
    match event:
        case Failed(_, failure, detail):
            raise AttemptFailed(worker.peer.id, failure, detail)
        case Refused(_, reason):
            raise AttemptRefused(worker.peer.id, reason)
    return event
