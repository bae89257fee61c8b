"""Memory a link receives into."""

import threading

import torch
from torch import Tensor

from workers.kv.link import LinkError


class Staging:
    """A few buffers, taken in turn and used again: a fresh one for each message would cost more than its copy.

    The link's thread takes them, the engine's thread gives them back; when all are out the link waits, which slows its
    sender down and bounds the bytes that wait for the engine.
    """

    def __init__(self, count: int, *, pinned: bool = False) -> None:
        self._pinned = pinned
        self._changed = threading.Condition()
        self._free = [self._new(0) for _ in range(count)]
        self._closed = False

    def _new(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._pinned)

    def take(self, nbytes: int) -> Tensor:
        """A buffer of at least `nbytes`; blocks until one is free. Raises LinkError once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._free or self._closed)
            if self._closed:
                raise LinkError("the link was closed")
            buffer = self._free.pop()
        return buffer if buffer.numel() >= nbytes else self._new(nbytes)

    def give_back(self, buffer: Tensor) -> None:
        with self._changed:
            self._free.append(buffer)
            self._changed.notify()

    def close(self) -> None:
        """Whoever waits for a buffer gets an error."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
