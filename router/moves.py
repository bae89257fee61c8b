"""Which requests may move now, who asks for it, and the emptying of workers that drain."""

import asyncio
import contextlib
import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from router.attempt import Attempt
from router.journey import Journey
from router.move import MoveOutcome, MoveTerms
from router.policy.placement import place
from router.pools_view import PoolsView, WorkerConnection, WorkerLost
from tidemill.core import metrics
from tidemill.core.clock import Clock
from tidemill.core.metrics import Metrics
from tidemill.core.model import Peer, Role, WorkerId
from tidemill.core.settings import Settings
from tidemill.core.telemetry import Decoding

log = logging.getLogger(__name__)

MOVES_AT_ONCE = 8  # away from one worker: each holds blocks on two
DRAIN_PERIOD_S = 0.01  # between looks at a draining worker
REST_S = 0.05  # after a move that came to nothing


class MoveReason(StrEnum):
    """Why a request is moved; metric label."""

    DRAIN = "drain"  # its worker takes no more
    LEVEL = "level"  # its worker is short of KV blocks, and another is not
    ASKED = "asked"


@dataclass(frozen=True, slots=True)
class _Movable:
    journey: Journey
    attempt: Attempt
    drafter: Peer | None


class Moves:
    """Belongs to the router; runs on its event loop."""

    def __init__(
        self, settings: Settings, pools: PoolsView, counters: Metrics, clock: Clock, rng: random.Random
    ) -> None:
        self._settings = settings
        self._pools = pools
        self._metrics = counters
        self._clock = clock
        self._rng = rng
        self._movable: dict[str, _Movable] = {}
        self._drains: dict[WorkerConnection, asyncio.Task[None]] = {}
        pools.on_draining = self._start_drain

    @contextlib.contextmanager
    def open_to(self, journey: Journey, attempt: Attempt, drafter: Peer | None) -> Iterator[None]:
        """Inside, the request may be moved from its first token on."""
        self._movable[journey.request.id] = _Movable(journey, attempt, drafter)
        try:
            yield
        finally:
            del self._movable[journey.request.id]

    def decoding(self) -> dict[str, WorkerId]:
        """The requests that could be moved now, and where they are."""
        return {
            request_id: each.attempt.decodes_on.peer.id
            for request_id, each in self._movable.items()
            if each.attempt.decodes_on is not None and not each.attempt.moving
        }

    def held(self) -> list[Decoding]:
        """`decoding`, with what each holds."""
        journeys = {request_id: each.journey for request_id, each in self._movable.items()}
        return [
            Decoding(request_id, worker, len(journeys[request_id].request.tokens) + len(journeys[request_id].sent))
            for request_id, worker in self.decoding().items()
        ]

    async def move(self, request_id: str, to: WorkerId, reason: StrEnum) -> MoveOutcome:
        """Have a request decode on another verify worker. Returns when it does, or when that has come to nothing."""
        outcome = await self._move(request_id, to)
        self._metrics.add(metrics.MIGRATIONS, outcome=outcome, reason=reason)
        if outcome not in {MoveOutcome.MOVED, MoveOutcome.OVER}:
            log.info("request %s was not moved to %s: %s", request_id, to, outcome)
        return outcome

    async def _move(self, request_id: str, to: WorkerId) -> MoveOutcome:
        movable = self._movable.get(request_id)
        if movable is None or movable.attempt.decodes_on is None:
            return MoveOutcome.OVER
        if movable.attempt.moving or movable.attempt.decodes_on.peer.id == to:
            return MoveOutcome.STAYED
        target = next((each for each in self._pools.snapshot().of(Role.VERIFY) if each.peer.id == to), None)
        if target is None:
            return MoveOutcome.REFUSED
        return await self._run(movable, target.peer)

    async def _run(self, movable: _Movable, target: Peer) -> MoveOutcome:
        attempt, journey = movable.attempt, movable.journey
        terms = MoveTerms(self._settings.deadlines, self._settings.router.move_headroom_tokens, movable.drafter)
        try:
            move = attempt.begin_move(self._pools.connection(target), journey.next_id(), self._clock)
        except WorkerLost:
            return MoveOutcome.FAILED
        try:
            outcome = await move.run(terms)
        finally:
            attempt.end_move()
        if move.pause_s is not None:
            journey.verify_worker = str(target.id)
            self._metrics.observe(metrics.MIGRATION_PAUSE, move.pause_s)
        return outcome

    # --- drains -------------------------------------------------------------------------------------------------

    def _start_drain(self, worker: WorkerConnection) -> None:
        if worker not in self._drains:
            task = self._drains[worker] = asyncio.create_task(self._drain(worker), name=f"drain-{worker.peer.id}")
            task.add_done_callback(lambda _: self._drains.pop(worker))

    async def _drain(self, worker: WorkerConnection) -> None:
        """Move what decodes there, and what comes to decode there, until nothing is left or it serves again."""
        async with asyncio.TaskGroup() as moves:
            away: dict[str, asyncio.Task[None]] = {}
            while worker.draining:
                away = {request_id: task for request_id, task in away.items() if not task.done()}
                here = [each for each, at in self.decoding().items() if at == worker.peer.id and each not in away]
                for request_id in here[: MOVES_AT_ONCE - len(away)]:
                    away[request_id] = moves.create_task(self._move_away(request_id, worker))
                await asyncio.sleep(DRAIN_PERIOD_S)

    async def _move_away(self, request_id: str, worker: WorkerConnection) -> None:
        target = place(self._pools.snapshot(), Role.VERIFY, {worker.peer.id}, self._rng).choice
        if target is None or await self.move(request_id, target.peer.id, MoveReason.DRAIN) is not MoveOutcome.MOVED:
            await asyncio.sleep(REST_S)

    async def close(self) -> None:
        for task in list(self._drains.values()):
            task.cancel()
        await asyncio.gather(*self._drains.values(), return_exceptions=True)
