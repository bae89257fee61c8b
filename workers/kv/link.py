"""Links carry KV blocks from the worker that computed them to the worker that holds their lease.

A link belongs to one ordered pair of worker incarnations. Both ends learn at once when the other is gone. What arrives
is handed over in order.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from tidemill.core.model import Peer

log = logging.getLogger(__name__)


class LinkError(RuntimeError):
    """A link could not be opened, or broke, or timed out, or was closed. It is of no more use."""


@dataclass(frozen=True, slots=True)
class KvMessage:
    """Blocks [first_block, first_block + kv.shape[1]) of a lease, all layers of them or some. It owns `kv`."""

    lease_id: int
    request_id: str  # the sender's; does not travel
    first_block: int
    kv: Tensor  # [layers, blocks, 2, kv_heads, block_size, head_dim], contiguous
    first_layer: int = 0
    # With the last blocks of a request that moves: the tokens it got since they were reserved. It goes on there.
    output: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        return self.kv.numel() * self.kv.element_size()


class SendingEnd(Protocol):
    """The sender's side of an open link; one thread sends."""

    def send(self, message: KvMessage) -> None:
        """Returns when the message's memory may be reused. Raises LinkError within the link's deadline."""
        ...

    def close(self) -> None:
        """From any thread, more than once; a send under way raises, and the other end notices."""
        ...


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True)
class Arrival:
    """What a receiver hears of a link. `kv` is None in its last word, which says why the link ended.

    `kv` lies in the link's own memory: whoever takes the arrival copies it and then calls `done`.
    """

    link: str  # a second link of the same pair has another name
    sender: str  # the sending worker's name@epoch
    lease_id: int = 0
    first_block: int = 0
    kv: Tensor | None = None
    first_layer: int = 0
    output: tuple[int, ...] | None = None  # see KvMessage
    seconds: float = 0.0
    error: str = ""
    done: Callable[[], None] = _nothing


Receiver = Callable[[Arrival], None]
Opener = Callable[[Peer], SendingEnd]
Sent = Callable[[KvMessage, float], None]
NotSent = Callable[[KvMessage, str], None]


class Feeder(Protocol):
    """Takes messages for one peer and sends them beside the engine's work; see Outgoing."""

    @property
    def backlog_bytes(self) -> int: ...

    @property
    def connected(self) -> bool: ...

    def prepare(self) -> None: ...

    def put(self, message: KvMessage) -> None: ...

    def drop(self, lease_id: int) -> None: ...

    def close(self) -> None: ...


FeederFactory = Callable[[Peer, Sent, NotSent], Feeder]


class Outgoing:
    """Queue and thread that feed one peer, so that the engine computes the next chunk while this one travels.

    Every message accepted ends in one call of `sent` or `failed`, on this thread, unless it is dropped. When the link
    breaks everything queued fails with it; the next message opens another.
    """

    def __init__(self, to: Peer, sent: Sent, failed: NotSent, opener: Opener) -> None:
        self.to = to
        self._opener = opener
        self._sent = sent
        self._failed = failed
        self._changed = threading.Condition()  # guards all below
        self._queue: deque[KvMessage] = deque()
        self._sending: KvMessage | None = None
        self._backlog_bytes = 0  # bounded by the roles, which look before it adds more
        self._end: SendingEnd | None = None
        self._open_now = False
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"kv-to-{to.id}", daemon=True)
        self._thread.start()

    @property
    def backlog_bytes(self) -> int:
        """Bytes accepted and not yet sent."""
        return self._backlog_bytes

    @property
    def connected(self) -> bool:
        """True if the next message need not wait for the link to be opened."""
        return self._end is not None

    def prepare(self) -> None:
        """Open the link now, so that the first message does not wait for it."""
        with self._changed:
            self._open_now = self._end is None
            self._changed.notify()

    def put(self, message: KvMessage) -> None:
        """Accept a message; it belongs to this thread now."""
        with self._changed:
            if not self._closed:
                self._queue.append(message)
                self._backlog_bytes += message.nbytes
                self._changed.notify()

    def drop(self, lease_id: int) -> None:
        """Forget the lease's messages but the one being sent."""
        with self._changed:
            kept = deque(each for each in self._queue if each.lease_id != lease_id)
            self._backlog_bytes -= sum(each.nbytes for each in self._queue if each.lease_id == lease_id)
            self._queue = kept

    def close(self) -> None:
        """Drop everything, cut off what is being sent, end the thread. No callback follows for what is dropped."""
        with self._changed:
            self._closed = True
            self._queue.clear()
            self._backlog_bytes = 0
            end = self._end if self._sending is not None else None
            self._changed.notify()
        if end is not None:
            end.close()

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread of a closed link; False if it is still there."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # --- the link's own thread ----------------------------------------------------------------------------------

    def _run(self) -> None:
        while self._wait_for_work():
            try:
                self._connect()
                self._send_one()
            except LinkError as error:
                self._break(str(error))
            except Exception as error:
                log.exception("the KV link to %s failed", self.to.id)
                self._break(repr(error))
        self._drop_end()

    def _wait_for_work(self) -> bool:
        """False once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._open_now or self._queue)
            return not self._closed

    def _connect(self) -> None:
        if self._end is None:
            end = self._opener(self.to)
            with self._changed:
                self._end = end
                self._open_now = False

    def _send_one(self) -> None:
        with self._changed:
            if not self._queue or self._closed:
                return
            message = self._sending = self._queue.popleft()
        assert self._end is not None
        started = time.perf_counter()
        self._end.send(message)
        with self._changed:
            if self._closed:
                return
            self._sending = None
            self._backlog_bytes -= message.nbytes
        self._sent(message, time.perf_counter() - started)

    def _break(self, why: str) -> None:
        self._drop_end()
        with self._changed:
            self._open_now = False
            lost = [*([self._sending] if self._sending else []), *self._queue]
            self._queue.clear()
            self._sending = None
            self._backlog_bytes = 0
            if self._closed:
                return
        log.warning("the KV link to %s broke with %d messages: %s", self.to.id, len(lost), why)
        for message in lost:
            self._failed(message, why)

    def _drop_end(self) -> None:
        with self._changed:
            end, self._end = self._end, None
        if end is not None:
            end.close()
