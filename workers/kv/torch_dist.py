"""Links over torch.distributed: one two-member group for each ordered pair of workers, gloo on CPUs, NCCL on GPUs.

There is no world. Both members meet at a store that the receiver hosts; the group's name carries both incarnations and
a serial, so neither a restarted peer nor a second attempt can inherit a dead link. A message is a header of fixed size
and the payload. When a member dies, the other's pending operation fails within milliseconds.
"""

import itertools
import threading
import time
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore  # type: ignore[attr-defined]

from tidemill.core.model import Peer, WorkerId
from workers.engine.base import KvLayout
from workers.kv.link import Arrival, KvMessage, LinkError, Receiver

SENDER, RECEIVER = 0, 1
HEADER_TAG, PAYLOAD_TAG = 0, 1
HEADER_WORDS = 4  # lease id, first block, blocks, protocol version
VERSION = 1
# A receiver waits for the next message as long as the link lives; the sender's end decides when that is over.
IDLE = timedelta(days=30)


def _group(store: TCPStore, name: str, rank: int, timeout: timedelta, device: torch.device) -> Any:
    """A group of two; returns when both members are there. Torch's group types are untyped."""
    prefixed = PrefixStore(f"{name}/", store)
    if device.type == "cuda":
        from torch.distributed import ProcessGroupNCCL  # noqa: PLC0415 - only CUDA builds have it

        return ProcessGroupNCCL(prefixed, rank, 2)  # type: ignore[call-arg]
    return ProcessGroupGloo(prefixed, rank, 2, timeout)


class LinkHost:
    """The receiving side of a worker: the store where senders meet it, and a thread for each open link."""

    def __init__(self, host: str, layout: KvLayout, device: torch.device, timeout_s: float, receiver: Receiver) -> None:
        """`receiver` is called on the links' threads; it may block, which slows the sender down."""
        self._layout = layout
        self._device = device
        self._timeout = timedelta(seconds=timeout_s)
        self._receiver = receiver
        self._serial = itertools.count(1)
        self._store = TCPStore(host, 0, None, True, self._timeout, wait_for_workers=False)
        self.rendezvous = f"{host}:{self._store.port}"

    def accept(self, me: WorkerId, sender: Peer) -> str:
        """Expect a sender; returns the name of the group to join at `rendezvous`."""
        name = f"{sender.id}>{me}#{next(self._serial)}"
        threading.Thread(target=self._serve, args=(name, str(sender.id)), name=f"kv-{name}", daemon=True).start()
        return name

    def _serve(self, name: str, sender: str) -> None:
        try:
            group = _group(self._store, name, RECEIVER, IDLE, self._device)
            while True:
                self._receiver(self._receive(group, sender))
        except Exception as error:  # gloo raises RuntimeError, the store its own types; all mean the link is over
            self._receiver(Arrival(sender, error=str(error).splitlines()[0][:200]))

    def _receive(self, group: Any, sender: str) -> Arrival:
        header = torch.zeros(HEADER_WORDS, dtype=torch.int64)
        group.recv([header], SENDER, HEADER_TAG).wait()
        started = time.perf_counter()
        lease_id, first_block, blocks, version = header.tolist()
        if version != VERSION:
            raise LinkError(f"message of protocol {version}, expected {VERSION}")
        layout = self._layout
        shape = (layout.layers, blocks, 2, layout.kv_heads, layout.block_size, layout.head_dim)
        kv = torch.empty(shape, dtype=getattr(torch, layout.dtype), device=self._device)
        group.recv([_as_bytes(kv)], SENDER, PAYLOAD_TAG).wait()
        return Arrival(sender, lease_id, first_block, kv, time.perf_counter() - started)


class TorchSendingEnd:
    """See SendingEnd."""

    def __init__(self, rendezvous: str, name: str, device: torch.device, timeout_s: float) -> None:
        """Joins the group; raises LinkError if the receiver does not within `timeout_s`."""
        timeout = timedelta(seconds=timeout_s)
        host, _, port = rendezvous.rpartition(":")
        try:
            self._store = TCPStore(host, int(port), None, False, timeout, wait_for_workers=False)
            self._group = _group(self._store, name, SENDER, timeout, device)
        except Exception as error:
            raise LinkError(f"link {name} could not be opened at {rendezvous}: {error}") from error

    def send(self, message: KvMessage) -> None:
        header = torch.tensor([message.lease_id, message.first_block, message.kv.shape[1], VERSION])
        try:
            self._group.send([header], RECEIVER, HEADER_TAG).wait()
            self._group.send([_as_bytes(message.kv)], RECEIVER, PAYLOAD_TAG).wait()
        except Exception as error:
            raise LinkError(str(error).splitlines()[0][:200]) from error

    def close(self) -> None:
        """Dropping the group closes its sockets, which is how the receiver's thread learns that it is over."""
        self._group = None


def _as_bytes(kv: Tensor) -> Tensor:
    return kv.view(-1).view(torch.uint8)
