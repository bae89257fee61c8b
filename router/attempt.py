"""One try at serving a request: its conversations with the workers that were chosen for it."""

import asyncio
from collections import deque
from typing import TypeVar

from router.pools_view import Conversation, Heard, PoolsView, WorkerConnection, WorkerLost
from tidemill.core.messages import Command, Event, Failed, Failure, Refusal, Refused, Tokens
from tidemill.core.model import Request, WorkerId, WorkerSnapshot
from tidemill.types import FinishReason

Kind = TypeVar("Kind", bound=Event)
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
    """Everything heard of the request, from all its workers, comes in one queue. `close` ends it everywhere at once."""

    def __init__(self, request: Request, pools: PoolsView) -> None:
        self.request = request
        self._pools = pools
        # One event a step of one request, whose steps are bounded by its context.
        self._heard: asyncio.Queue[Heard] = asyncio.Queue()
        self._put_back: deque[Event] = deque()
        self._open: list[Conversation] = []

    def tell(self, worker: WorkerSnapshot, command: Command) -> None:
        """Open a conversation with a command. Raises AttemptFailed if the worker has gone meanwhile."""
        try:
            conversation = self._pools.connection(worker.peer).open(self.request.id, self._heard)
            self._open.append(conversation)
            conversation.send(command)
        except WorkerLost as error:
            raise AttemptFailed(worker.peer.id, Failure.STOPPING, str(error)) from error

    async def next(self, timeout_s: float, blame: WorkerSnapshot) -> Event:
        """The next event. Raises AttemptRefused or AttemptFailed; `blame` is who failed if nothing comes in time."""
        return self._put_back.popleft() if self._put_back else await self._hear(timeout_s, blame)

    async def expect(self, kind: type[Kind], timeout_s: float, blame: WorkerSnapshot) -> Kind:
        """The next event of a kind; others, which another worker was quicker with, are kept for `next`."""
        while not isinstance(event := await self._hear(timeout_s, blame), kind):
            self._put_back.append(event)
        return event

    async def _hear(self, timeout_s: float, blame: WorkerSnapshot) -> Event:
        try:
            async with asyncio.timeout(timeout_s):
                worker, event = await self._heard.get()
        except TimeoutError:
            raise AttemptFailed(blame.peer.id, TIMEOUT, f"nothing came within {timeout_s:.1f} s") from None
        return _checked(worker, event)

    def more_tokens(self) -> list[Tokens]:
        """Tokens that have come meanwhile, so that a slow client gets fewer and larger chunks."""
        found: list[Tokens] = []
        while not self._put_back and not self._heard.empty():
            event = _checked(*self._heard.get_nowait())
            if isinstance(event, Tokens):
                found.append(event)
        return found

    def leave(self, worker: WorkerSnapshot | None) -> None:
        """A worker that has done its part: what becomes of it does not matter to the request any more."""
        for conversation in [each for each in self._open if worker and each.worker.peer.id == worker.peer.id]:
            conversation.close(cancel=False)
            self._open.remove(conversation)

    def close(self, finish: FinishReason | None) -> None:
        """Tell every worker that may still hold something; after a regular finish none does but the prefill worker."""
        for conversation in self._open:
            conversation.close(cancel=finish is None)
        self._open.clear()


def _checked(worker: WorkerConnection, event: Event) -> Event:
    match event:
        case Failed(_, failure, detail):
            raise AttemptFailed(worker.peer.id, failure, detail)
        case Refused(_, reason):
            raise AttemptRefused(worker.peer.id, reason)
    return event
