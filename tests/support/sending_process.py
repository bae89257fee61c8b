"""The sending end of a KV link in a process of its own, which can be killed."""

import os
import signal
from multiprocessing.connection import Connection

import torch

from workers.kv.link import KvMessage
from workers.kv.torch_dist import HEADER_TAG, VERSION, TorchSendingEnd


def serve(rendezvous: str, what: str, connection: Connection) -> None:
    """Sends one message over the link that it is told the name of, says so, and goes on as `what` says: "one" and no
    more, "for ever", or "half" of another, and then it stands still.
    """
    connection.send("ready")
    end = TorchSendingEnd(rendezvous, connection.recv(), torch.device("cpu"), 30.0, 30.0)
    end.send(KvMessage(1, "r", 0, torch.ones(2, 1, 2, 2, 16, 16)))
    connection.send("sent")
    if what == "for ever":
        message = KvMessage(2, "r", 0, torch.ones(2, 1000, 2, 2, 16, 16))
        while True:
            end.send(message)
    if what == "half":
        end._pair.send(torch.tensor([3, 0, 1000, VERSION]), HEADER_TAG)
        os.kill(os.getpid(), signal.SIGSTOP)
    signal.pause()
