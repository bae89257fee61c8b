"""Work for the engine's thread, from all the others."""

import logging
import queue
import threading
from collections.abc import Callable

log = logging.getLogger(__name__)

Task = Callable[[], None]
MAX_TASKS = 8192
MAX_ARRIVALS = 8


class MailboxFull(RuntimeError):
    """The engine's thread does not keep up; whoever posts has to be cut off."""


class Mailbox:
    """A bounded queue of calls. What may be refused is posted, what may be delayed waits for its turn."""

    def __init__(self) -> None:
        self._queue: queue.Queue[Task] = queue.Queue(MAX_TASKS)
        self._arrivals = threading.BoundedSemaphore(MAX_ARRIVALS)

    def post(self, task: Task) -> None:
        """Never blocks. Raises MailboxFull."""
        try:
            self._queue.put_nowait(task)
        except queue.Full:
            raise MailboxFull(f"{MAX_TASKS} messages wait for the engine") from None

    def post_arrival(self, task: Task) -> None:
        """For KV from links: blocks while too many wait, which slows the sender down."""
        self._arrivals.acquire()

        def once() -> None:
            self._arrivals.release()
            task()

        self._queue.put(once)

    def run(self, wait_s: float) -> int:
        """Run everything that is here, after waiting up to `wait_s` for the first; returns how many."""
        done = 0
        while True:
            try:
                task = self._queue.get(timeout=wait_s) if not done and wait_s > 0 else self._queue.get_nowait()
            except queue.Empty:
                return done
            done += 1
            try:
                task()
            except Exception:
                log.exception("a message to the engine's thread could not be handled")
