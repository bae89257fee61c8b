"""Work for the engine's thread, from all the others."""

import logging
import queue
from collections.abc import Callable

log = logging.getLogger(__name__)

Task = Callable[[], None]
MAX_TASKS = 8192


class MailboxFull(RuntimeError):
    """The engine's thread does not keep up; whoever posts has to be cut off."""


class Mailbox:
    """A queue of calls with a bound for what asks for something; what ends or frees something always gets in."""

    def __init__(self, limit: int = MAX_TASKS) -> None:
        self._queue: queue.SimpleQueue[Task] = queue.SimpleQueue()
        self._limit = limit

    def post(self, task: Task) -> None:
        """For requests. Never blocks. Raises MailboxFull."""
        if self._queue.qsize() >= self._limit:
            raise MailboxFull(f"{self._limit} messages wait for the engine")
        self._queue.put(task)

    def deliver(self, task: Task) -> None:
        """For ends, answers and KV: never refused, since their number is bounded by what was asked for or is held."""
        self._queue.put(task)

    def run(self, wait_s: float) -> int:
        """Wait up to `wait_s` for the first task, run it and those behind it; returns how many.

        Tasks that come meanwhile wait for the next turn, so a flood of them cannot keep the engine from its step.
        """
        try:
            task = self._queue.get(timeout=wait_s) if wait_s > 0 else self._queue.get_nowait()
        except queue.Empty:
            return 0
        behind = self._queue.qsize()
        _run(task)
        for _ in range(behind):
            _run(self._queue.get_nowait())
        return 1 + behind


def _run(task: Task) -> None:
    try:
        task()
    except Exception:
        log.exception("a message to the engine's thread could not be handled")
