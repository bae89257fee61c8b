"""What a worker tells its routers: at most one message to each in a turn, for all of its requests."""

from dataclasses import dataclass

from tidemill.core import metrics
from tidemill.core.messages import Event, Failed, StepReport
from tidemill.core.metrics import Metrics
from tidemill.core.model import Role, WorkerId, WorkerLoad

HEARTBEAT_S = 0.5
LOAD_PAUSE_S = 0.05  # a change of load alone is not told more often
LOAD_SHARE = 8  # a change of the used blocks by 1/8 of the pool is worth telling


@dataclass(frozen=True, slots=True)
class Standing:
    """What every report says of the worker."""

    worker: WorkerId
    role: Role
    accepting: bool
    load: WorkerLoad


class Reports:
    """Which router asked for what, and what each will hear at the end of this turn. Belongs to the engine's thread.

    It is the roles' Outbox.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._owners: dict[str, int] = {}  # request -> router stream
        self._streams: dict[int, list[Event]] = {}  # by router: what it has not heard yet
        self._told: Standing | None = None
        self._told_at = float("-inf")

    # --- routers and their requests -----------------------------------------------------------------------------

    def attach(self, router: int) -> None:
        """A new router hears of the load at once."""
        self._streams[router] = []
        self._told = None

    def detach(self, router: int) -> list[str]:
        """A router's stream is over; returns its requests, which are to be cancelled."""
        self._streams.pop(router, None)
        return [request_id for request_id, owner in self._owners.items() if owner == router]

    def attached(self, router: int) -> bool:
        return router in self._streams

    def take(self, request_id: str, router: int) -> bool:
        """From now on the request's events go to this router; False if it is somebody's already."""
        if request_id in self._owners:
            return False
        self._owners[request_id] = router
        return True

    def owner(self, request_id: str) -> int | None:
        return self._owners.get(request_id)

    @property
    def idle(self) -> bool:
        """True if no request is anybody's."""
        return not self._owners

    # --- Outbox -------------------------------------------------------------------------------------------------

    def emit(self, event: Event) -> None:
        """See workers.roles.base.Outbox."""
        router = self._owners.get(event.request_id)
        if isinstance(event, Failed):
            self._metrics.add(metrics.ERRORS, failure=event.failure)
        if router is not None:
            self.tell(router, event)

    def forget(self, request_id: str) -> None:
        """See workers.roles.base.Outbox."""
        self._owners.pop(request_id, None)

    def tell(self, router: int, event: Event) -> None:
        """For requests that are not, or not any more, this router's."""
        if router in self._streams:
            self._streams[router].append(event)

    # --- the end of a turn --------------------------------------------------------------------------------------

    def collect(self, standing: Standing, now: float) -> list[tuple[int, StepReport]]:
        """The turn's messages by router: its events, or the standing alone if that is new or was not told for long.

        They are numbered when they are sent: those a router is too slow for become one.
        """
        news = self._is_news(standing, now)
        if news:
            self._told, self._told_at = standing, now
        out = []
        for router, stream in self._streams.items():
            if stream or news:
                events = tuple(stream)
                out.append(
                    (router, StepReport(standing.worker, standing.role, standing.accepting, 0, standing.load, events))
                )
                stream.clear()
        return out

    def _is_news(self, standing: Standing, now: float) -> bool:
        told = self._told
        if told is None or now - self._told_at >= HEARTBEAT_S:
            return True
        if (told.worker, told.role, told.accepting) != (standing.worker, standing.role, standing.accepting):
            return True
        return now - self._told_at >= LOAD_PAUSE_S and _differs(told.load, standing.load)


def _differs(told: WorkerLoad, now: WorkerLoad) -> bool:
    """True if a router would place its next request otherwise."""
    blocks = abs(told.kv_blocks_used - now.kv_blocks_used)
    return blocks * LOAD_SHARE >= max(now.kv_blocks_total, 1) or bool(told.queued_requests) != bool(now.queued_requests)
