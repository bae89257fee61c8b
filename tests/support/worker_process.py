"""python -m tests.support.worker_process NAME ROLE SETTINGS: serve until standard input ends."""

import json
import logging
import sys

from tidemill.core.model import Role
from tidemill.core.settings import Settings
from workers.worker import Worker

if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    worker = Worker(sys.argv[1], Role(sys.argv[2]), Settings.model_validate_json(sys.argv[3]))
    peer = worker.start()
    print(json.dumps({"epoch": peer.id.epoch, "address": peer.address}), flush=True)
    sys.stdin.read()
    worker.stop()
