"""An event loop whose clock jumps to the next timer instead of waiting for it: minutes of deadlines in milliseconds."""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


class _NeverWaits(selectors.SelectSelector):
    """Hands the time it was asked to wait to the loop."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            if timeout is None:
                raise RuntimeError("everything waits, and for nothing that a clock could bring")
            self.now += max(timeout, 0.0)
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """No sockets, no threads: whatever happens in it is made to happen by its own tasks and timers."""

    def __init__(self) -> None:
        self._selector_of_time = _NeverWaits()
        super().__init__(self._selector_of_time)

    def time(self) -> float:
        return self._selector_of_time.now


class LoopClock:
    """Clock of core/clock.py, for the loop that is running."""

    def monotonic(self) -> float:
        return asyncio.get_running_loop().time()


def run_virtual(main: Coroutine[Any, Any, Result]) -> Result:
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)
