"""From one router to another: which to call, for how long, and what a stream's next router must know.

    choose a router ── suspect? ask for its health ── call ── answered
          ^                                            │
          └── at once while some are untried; after a pause once all have failed; never past the deadline

Neither client's waiting is in here.
"""

import random
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from tidemill._call import CallOptions, chunk_from_pb
from tidemill.errors import Cancelled, TidemillError, Unavailable
from tidemill.proto import inference_pb2 as pb
from tidemill.types import Chunk

FIRST_REST_S, MAX_REST_S = 0.5, 8.0  # how long a router that failed is passed over
HEALTH_TIMEOUT_S = 1.0


class Routers:
    """Which router to call next: each in turn, and those that failed not for a while. Any thread may ask."""

    def __init__(self, count: int, clock: Callable[[], float] = time.monotonic, first: int | None = None) -> None:
        """`first`: called first; none: drawn, so that clients spread over the routers."""
        self.count = count
        self._clock = clock
        self._lock = threading.Lock()
        self._next = random.randrange(count) if first is None else first
        self._rest_s = [0.0] * count  # 0: it answered when it was last asked
        self._until = [0.0] * count

    def choose(self, tried: Iterable[int] = ()) -> int:
        """One that has not failed lately and is not among `tried`, if there is one; or the next that may be back."""
        with self._lock:
            now, tried = self._clock(), set(tried)
            order = [(self._next + step) % self.count for step in range(self.count)]
            chosen = min(order, key=lambda each: (each in tried, max(self._until[each] - now, 0.0)))
            self._next = (chosen + 1) % self.count
            return chosen

    def suspect(self, index: int) -> bool:
        """True if it failed when it was last asked, and another could be asked: see whether it serves first."""
        return self.count > 1 and self._rest_s[index] > 0.0

    def failed(self, index: int) -> None:
        """It could not be reached, or said that it cannot serve."""
        with self._lock:
            self._rest_s[index] = min(2 * self._rest_s[index] or FIRST_REST_S, MAX_REST_S)
            self._until[index] = self._clock() + self._rest_s[index]

    def answered(self, index: int) -> None:
        """It is all right."""
        with self._lock:
            self._rest_s[index] = self._until[index] = 0.0


class Tries:
    """One call's way from router to router, until one answers, patience ends or time is over.

        while True:
            index = tries.next_router()
            ... call it with timeout=tries.left_s, and leave; or, when that fails:
            sleep(tries.pause_after(index, error))

    Every router is tried at once; then, after a pause, all again. Belongs to the call.
    """

    def __init__(self, routers: Routers, options: CallOptions, timeout_s: float | None) -> None:
        self._routers = routers
        self._options = options
        self._pauses = options.pauses()
        self._tried: set[int] = set()
        self._answers = False
        self._ends_at = None if timeout_s is None else time.monotonic() + timeout_s

    @property
    def left_s(self) -> float | None:
        return None if self._ends_at is None else max(self._ends_at - time.monotonic(), 0.0)

    @property
    def health_timeout_s(self) -> float:
        return HEALTH_TIMEOUT_S if self.left_s is None else min(self.left_s, HEALTH_TIMEOUT_S)

    def next_router(self) -> int:
        return self._routers.choose(self._tried)

    def suspect(self, index: int) -> bool:
        """It failed lately: ask for its health before it is given the call."""
        return self._routers.suspect(index)

    def progressed(self, index: int) -> None:
        """It answers; should it fail later, patience begins anew."""
        if not self._answers:
            self._routers.answered(index)
            self._answers, self._pauses, self._tried = True, self._options.pauses(), set()

    def pause_after(self, index: int, error: TidemillError) -> float:
        """Seconds to wait before the next try. Raises `error` if there shall be none, or what it stands for."""
        self._answers = False
        if isinstance(error, Cancelled):  # not by us: the router is going down
            error = Unavailable(f"the router ended the call: {error}")
        if not error.retryable:
            raise error
        if isinstance(error, Unavailable):
            self._routers.failed(index)
        self._tried.add(index)
        pause = 0.0
        if len(self._tried) == self._routers.count:
            self._tried = set()
            chosen = next(self._pauses, None)
            if chosen is None:
                raise error
            pause = chosen
        if (left_s := self.left_s) is not None and left_s <= pause:
            raise error
        return pause


class Received:
    """What has come of one stream: with it the request can be sent to another router, which goes on after it."""

    def __init__(self, request: Any) -> None:
        """`request`: a GenerateRequest or ChatRequest of this call, whose seed is set if one is needed."""
        self.request = request
        self.complete = False

    def take(self, message: pb.GenerateChunk) -> Chunk:
        self.request.received.extend(message.tokens)
        self.complete = message.HasField("summary")
        return chunk_from_pb(message)
