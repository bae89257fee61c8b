"""python -m tests.support.worker_process NAME ROLE SETTINGS: serve until standard input ends.

Lines of it trouble the KV links that come here: `cut`; `delay SECONDS`, of whatever is received; `heal`. Gloo's own
connections cannot be led through a proxy: both ends exchange their sockets' addresses themselves.
"""

import json
import logging
import sys
import threading

from torch import Tensor

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


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    import workers.kv.torch_dist

    workers.kv.torch_dist.Pair = TroubledPair  # type: ignore[misc]
    worker = Worker(sys.argv[1], Role(sys.argv[2]), Settings.model_validate_json(sys.argv[3]))
    peer = worker.start()
    print(json.dumps({"epoch": peer.id.epoch, "address": peer.address}), flush=True)
    for line in sys.stdin:
        obey(worker, line)
    worker.stop()
