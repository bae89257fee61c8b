"""A worker in a process of its own.

What the other end of the connection says troubles the KV links that come here: `cut`; `delay SECONDS`, of whatever is
received; `heal`. Gloo's own connections cannot be led through a proxy: both ends exchange their sockets' addresses
themselves.
"""

import contextlib
import logging
import os
import threading
from multiprocessing.connection import Connection

from torch import Tensor

import workers.kv.torch_dist
from tidemill.core.model import Role
from tidemill.core.settings import Settings
from workers.kv.link import LinkError
from workers.kv.pair import Pair
from workers.worker import Worker


class TroubledPair(Pair):
    """What it receives comes late, or not at all: then it times out as it would have."""

    delay_s = 0.0
    healed = threading.Event()

    def receive(self, tensor: Tensor, tag: int, timeout_s: float) -> None:
        super().receive(tensor, tag, timeout_s)
        if TroubledPair.delay_s:
            TroubledPair.healed.wait(min(TroubledPair.delay_s, timeout_s))
        if TroubledPair.delay_s > timeout_s:
            raise LinkError(f"nothing came within {timeout_s} s")


def obey(worker: Worker, line: str) -> None:
    match line.split():
        case ["cut"] if worker._links is not None:
            worker._links.cut()
        case ["delay", seconds]:
            TroubledPair.healed.clear()
            TroubledPair.delay_s = float(seconds)
        case ["heal"]:
            TroubledPair.delay_s = 0.0
            TroubledPair.healed.set()


def serve(name: str, role: Role, settings: Settings, core: int | None, connection: Connection) -> None:
    """Until the other end of the connection, which hears where it serves, is gone. `core`: the only one it runs on."""
    logging.basicConfig(level=logging.WARNING)
    if core is not None:
        os.sched_setaffinity(0, {core})
    workers.kv.torch_dist.Pair = TroubledPair  # type: ignore[misc]
    worker = Worker(name, role, settings)
    connection.send(worker.start())
    with contextlib.suppress(EOFError):
        while True:
            obey(worker, connection.recv())
    worker.stop()
