"""Links carry KV blocks from the worker that computed them to the worker that holds their lease.

A link belongs to one ordered pair of worker incarnations. The sender opens it on its first message; both ends learn at
once when the other is gone. What arrives is handed over in order.
"""

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from tidemill.core.model import Peer


class LinkError(RuntimeError):
    """A link could not be opened, or broke, or timed out. The link is closed."""


@dataclass(frozen=True, slots=True)
class KvMessage:
    """Blocks [first_block, first_block + kv.shape[1]) of a lease. The message owns `kv`."""

    lease_id: int
    request_id: str  # the sender's; does not travel
    first_block: int
    kv: Tensor  # [layers, blocks, 2, kv_heads, block_size, head_dim], contiguous

    @property
    def nbytes(self) -> int:
        return self.kv.numel() * self.kv.element_size()


class SendingEnd(Protocol):
    """The sender's side of an open link; used by one thread."""

    def send(self, message: KvMessage) -> None:
        """Returns when the message's memory may be reused. Raises LinkError within the link's deadline."""
        ...

    def close(self) -> None:
        """Idempotent; the other end notices."""
        ...


@dataclass(frozen=True, slots=True)
class Arrival:
    """What a receiver hears of a link. `kv` is None in its last word, which says why the link ended."""

    sender: str  # the sending worker's name@epoch
    lease_id: int = 0
    first_block: int = 0
    kv: Tensor | None = None
    seconds: float = 0.0
    error: str = ""


Receiver = Callable[[Arrival], None]
Opener = Callable[[Peer], SendingEnd]


class Outgoing:
    """Queue and thread that feed one link, so that the engine computes the next chunk while this one travels.

    `sent` and `failed` are called on this thread. After a failure everything queued fails too, and the next message
    opens a new link.
    """

    def __init__(
        self,
        to: Peer,
        opener: Opener,
        sent: Callable[[KvMessage, float], None],
        failed: Callable[[KvMessage, str], None],
    ) -> None:
        self.to = to
        self._opener = opener
        self._sent = sent
        self._failed = failed
        self._queue: queue.SimpleQueue[KvMessage | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._backlog_bytes = 0  # bounded by the prefill role, which looks before it computes more
        self._end: SendingEnd | None = None
        self._thread = threading.Thread(target=self._run, name=f"kv-to-{to.id}", daemon=True)
        self._thread.start()

    @property
    def backlog_bytes(self) -> int:
        """Bytes accepted and not yet sent."""
        return self._backlog_bytes

    def put(self, message: KvMessage) -> None:
        """Accept a message; it belongs to this thread now."""
        with self._lock:
            self._backlog_bytes += message.nbytes
        self._queue.put(message)

    def close(self) -> None:
        """Stop after the message being sent; the rest is dropped."""
        self._queue.put(None)

    def _run(self) -> None:
        while (message := self._queue.get()) is not None:
            try:
                started = time.perf_counter()
                if self._end is None:
                    self._end = self._opener(self.to)
                self._end.send(message)
                self._sent(message, time.perf_counter() - started)
            except LinkError as error:
                self._drop_end()
                self._failed(message, str(error))
            finally:
                with self._lock:
                    self._backlog_bytes -= message.nbytes
        self._drop_end()

    def _drop_end(self) -> None:
        if self._end is not None:
            self._end.close()
            self._end = None
