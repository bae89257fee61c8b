"""The lives of the requests that ended last, for `tidemill trace`."""

from collections.abc import Callable

from router.journey import Journey
from tidemill.core.trace import Trace

KEPT_TRACES = 256


class Traces:
    """Belongs to the router's event loop. Of requests with the same id the last one is kept."""

    def __init__(self, kept: int = KEPT_TRACES) -> None:
        self._kept = kept
        self.on_ended: Callable[[Trace], None] = lambda _: None  # hears of each as well
        self._traces: dict[str, Trace] = {}  # the newest last

    def ended(self, journey: Journey, outcome: str, now: float, wall: float) -> None:
        self._traces.pop(journey.request.id, None)
        trace = self._traces[journey.request.id] = journey.trace(outcome, now, wall)
        self.on_ended(trace)
        while len(self._traces) > self._kept:
            del self._traces[next(iter(self._traces))]

    def find(self, request_id: str) -> Trace | None:
        return self._traces.get(request_id)

    def latest(self) -> list[Trace]:
        """The newest first."""
        return list(reversed(self._traces.values()))
