"""A queue with one reader that waits only so long: what a request hears from its workers."""

import asyncio
from collections import deque
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Inbox(Generic[Item]):
    """Items in the order they came.

    Every token of every request passes through one of these, so a wait arms no timer of its own: one timer a request
    stays armed and is moved on when it rings too early. Whoever reads closes it, which disarms the timer.
    """

    def __init__(self) -> None:
        self._items: deque[Item] = deque()
        self._waiting: asyncio.Future[bool] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0  # loop time at which the reader has waited long enough

    def put(self, item: Item) -> None:
        self._items.append(item)
        self._wake(came=True)

    def put_back(self, item: Item) -> None:
        """It will be the next one read."""
        self._items.appendleft(item)

    def take(self) -> Item | None:
        """The next item if there is one."""
        return self._items.popleft() if self._items else None

    async def get(self, timeout_s: float) -> Item:
        """The next item. Raises TimeoutError."""
        if not self._items and not await self._wait(timeout_s):
            raise TimeoutError
        return self._items.popleft()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def _wait(self, timeout_s: float) -> bool:
        """True if an item came."""
        loop = asyncio.get_running_loop()
        self._due = loop.time() + timeout_s
        if self._timer is not None and self._timer.when() > self._due:
            self.close()
        if self._timer is None:
            self._timer = loop.call_at(self._due, self._ring)
        self._waiting = loop.create_future()
        try:
            return await self._waiting
        finally:
            self._waiting = None

    def _ring(self) -> None:
        self._timer = None
        if self._waiting is None:
            return  # the next wait arms it again
        loop = asyncio.get_running_loop()
        if loop.time() < self._due:
            self._timer = loop.call_at(self._due, self._ring)
        else:
            self._wake(came=False)

    def _wake(self, *, came: bool) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(came)
