"""The bounded number of requests being served, and the bounded queue before it."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from router.policy.admission import Admission, AdmissionLimits, admit
from tidemill.core import metrics
from tidemill.core.metrics import Metrics
from tidemill.errors import Overloaded


class Gate:
    """First come, first served."""

    def __init__(self, limits: AdmissionLimits, counters: Metrics) -> None:
        self._limits = limits
        self._metrics = counters
        self._active = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def active(self) -> int:
        return self._active

    @property
    def queued(self) -> int:
        return len(self._waiting)

    @asynccontextmanager
    async def admitted(self) -> AsyncIterator[None]:
        """Inside, the request is one of those being served. Raises Overloaded; cancelling leaves the queue."""
        decision = admit(self._active, len(self._waiting), self._limits)
        self._metrics.add(metrics.DECISIONS, policy="admission", reason=decision.reason)
        if decision.choice is Admission.REJECT:
            raise Overloaded(
                f"{self._active} requests are being served and {len(self._waiting)} wait, which is the limit; "
                "try again after a pause"
            )
        if decision.choice is Admission.WAIT:
            await self._wait()
        else:
            self._active += 1
        self._count()
        try:
            yield
        finally:
            self._active -= 1
            self._wake()
            self._count()

    async def _wait(self) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        self._count()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # woken and cancelled in the same moment: pass the turn on
                self._active -= 1
                self._wake()
            elif turn in self._waiting:  # `_wake` may have dropped it already
                self._waiting.remove(turn)
            self._count()
            raise

    def _wake(self) -> None:
        """Whoever is woken counts as active from now on."""
        while self._waiting and self._active < self._limits.max_active:
            turn = self._waiting.popleft()
            if not turn.done():
                self._active += 1
                turn.set_result(None)

    def _count(self) -> None:
        self._metrics.set(metrics.ROUTER_ACTIVE, self._active)
        self._metrics.set(metrics.ROUTER_QUEUED, len(self._waiting))
