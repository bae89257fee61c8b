"""Links over torch.distributed: one two-member group for each ordered pair of workers.

Both members meet at a store that the receiver hosts; the group's name carries both incarnations and a serial, so
neither a restarted peer nor a second attempt can inherit a dead link. A message is a header of fixed size and the
payload. The tokens that end a move are in the header, and only those that do not fit there follow: decoding waits for
this message, and each part of it wakes threads on both sides.
"""

import itertools
import math
import socket
import threading
import time
from datetime import timedelta

import torch
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from tidemill.core.model import Peer, WorkerId
from workers.engine.base import KvLayout
from workers.kv.link import Arrival, KvMessage, LinkError, Receiver
from workers.kv.pair import Pair, reason
from workers.kv.staging import Staging

SENDER, RECEIVER = 0, 1
HEADER_TAG, PAYLOAD_TAG, TOKENS_TAG = 0, 1, 2
FIELDS = 7  # lease id, first block, blocks, first layer, layers, tokens or NO_TOKENS, protocol version
INLINE_TOKENS = 57  # the first ones, behind the fields
NO_TOKENS = -1  # not the last message of a request that moves
VERSION = 4
IDLE_S = 600.0  # a receiver gives up a link that is silent for so long; senders close theirs long before
BUFFERS = 2  # of each link: one being received into, one being copied from
MAX_LINKS_PER_SENDER = 4  # more than one only while broken ones linger
JOIN_S = 1.0
MAX_BLOCKS, MAX_TOKENS = 1 << 20, 1 << 24  # of one message; a header that says more is not ours


class LinkHost:
    """The receiving side of a worker: the store where senders meet it, and a thread for each open link."""

    def __init__(
        self, host: str, layout: KvLayout, device: torch.device, timeout_s: float, stall_s: float, receiver: Receiver
    ) -> None:
        """`timeout_s`: opening a link; `stall_s`: the rest of a message that has begun. `receiver` is called on the
        links' threads and may not block. Raises OSError if no port can be had.
        """
        self.host = host
        self.layout = layout
        self.device = device
        self.timeout_s = timeout_s
        self.stall_s = stall_s
        self.receiver = receiver
        self._serial = itertools.count(1)
        self._lock = threading.Lock()
        self._links: list[_Incoming] = []
        with socket.create_server((host, 0)) as listening:  # the store itself would listen on every address
            port = listening.getsockname()[1]
            self._store: TCPStore | None = TCPStore(
                host, port, None, True, _seconds(timeout_s), wait_for_workers=False, master_listen_fd=listening.detach()
            )
        self.rendezvous = f"{host}:{port}"

    def accept(self, me: WorkerId, sender: Peer) -> str:
        """Expect a sender; returns the name of the group to join at `rendezvous`."""
        link = _Incoming(self, f"{sender.id}>{me}#{next(self._serial)}", sender.id)
        with self._lock:
            of_sender = [each for each in self._links if each.sender.name == sender.id.name]
            self._links.append(link)
        for surplus in of_sender[: 1 - MAX_LINKS_PER_SENDER]:
            surplus.close()
        link.start()
        return link.name

    def ended(self, link: "_Incoming") -> None:
        with self._lock:
            self._links.remove(link)

    def meet(self, name: str) -> Pair:
        """Wait for a sender at the store. Raises LinkError."""
        if self._store is None:
            raise LinkError("the worker has stopped")
        return Pair(self._store, name, RECEIVER, self.device, self.host, self.timeout_s)

    @property
    def open_links(self) -> int:
        return len(self._links)

    def cut(self) -> None:
        """End every link; each one's last arrival follows. New ones may be accepted after it."""
        with self._lock:
            links = list(self._links)
        for link in links:
            link.close()

    def close(self) -> None:
        """End every link and the store, and wait a moment for their threads; no sender finds it any more."""
        with self._lock:
            links = list(self._links)
        self.cut()
        self._store = None
        for link in links:
            link.join(JOIN_S)


class _Incoming:
    """One link's thread at the receiver."""

    def __init__(self, host: LinkHost, name: str, sender: WorkerId) -> None:
        self.name = name
        self.sender = sender
        self._host = host
        self._staging = Staging(BUFFERS, pinned=host.device.type == "cuda")
        self._lock = threading.Lock()
        self._pair: Pair | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=f"kv-{name}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def close(self) -> None:
        """From any thread."""
        with self._lock:
            self._closed = True
            pair = self._pair
        self._staging.close()
        if pair is not None:
            pair.close()

    def _run(self) -> None:
        host = self._host
        try:
            pair = host.meet(self.name)
            with self._lock:
                self._pair = pair
            while not self._closed:
                host.receiver(self._receive(pair))
            why = "the link was closed"
        except Exception as error:  # whatever it is, the link is over, and only the link
            why = reason(error)
        self.close()
        with self._lock:
            self._pair = None
        host.ended(self)
        host.receiver(Arrival(self.name, str(self.sender), error=why))

    def _receive(self, pair: Pair) -> Arrival:
        header = torch.zeros(FIELDS + INLINE_TOKENS, dtype=torch.int64, device=pair.device)
        pair.receive(header, HEADER_TAG, IDLE_S)
        words = header.tolist()
        lease_id, first_block, blocks, first_layer, layers, tokens, version = words[:FIELDS]
        layout = self._host.layout
        fits = 0 < blocks <= MAX_BLOCKS and 0 <= first_layer < first_layer + layers <= layout.layers
        if version != VERSION or not fits or not NO_TOKENS <= tokens <= MAX_TOKENS:
            raise LinkError(f"header {words[:FIELDS]} is not of protocol {VERSION}")
        shape = (layers, blocks, 2, layout.kv_heads, layout.block_size, layout.head_dim)
        dtype: torch.dtype = getattr(torch, layout.dtype)
        nbytes = math.prod(shape) * dtype.itemsize
        if pair.is_nccl:
            buffer, done = torch.empty(nbytes, dtype=torch.uint8, device=pair.device), _nothing
        else:
            staged = buffer = self._staging.take(nbytes)

            def done() -> None:
                self._staging.give_back(staged)

        started = time.perf_counter()
        pair.receive(buffer[:nbytes], PAYLOAD_TAG, self._host.stall_s)
        output = None if tokens == NO_TOKENS else self._receive_tokens(pair, words[FIELDS:], tokens)
        seconds = time.perf_counter() - started
        kv = buffer[:nbytes].view(dtype).view(shape)
        return Arrival(self.name, str(self.sender), lease_id, first_block, kv, first_layer, output, seconds, done=done)

    def _receive_tokens(self, pair: Pair, inline: list[int], count: int) -> tuple[int, ...]:
        if count <= INLINE_TOKENS:
            return tuple(inline[:count])
        rest = torch.zeros(count - INLINE_TOKENS, dtype=torch.int64, device=pair.device)
        pair.receive(rest, TOKENS_TAG, self._host.stall_s)
        return (*inline, *rest.tolist())


class TorchSendingEnd:
    """See SendingEnd."""

    def __init__(
        self,
        rendezvous: str,
        name: str,
        device: torch.device,
        timeout_s: float,
        stall_s: float,
        host: str = "127.0.0.1",
    ) -> None:
        """Joins the group; raises LinkError if the receiver does not within `timeout_s`. A message that has not left
        within `stall_s` breaks the link. `host`: the sender's own.
        """
        store_host, _, port = rendezvous.rpartition(":")
        try:
            store = TCPStore(store_host, int(port), None, False, _seconds(timeout_s), wait_for_workers=False)
        except Exception as error:  # torch raises types of its own
            raise LinkError(f"no store answers at {rendezvous}: {reason(error)}") from error
        self._pair = Pair(store, name, SENDER, device, host, timeout_s)
        self._stall_s = stall_s

    def send(self, message: KvMessage) -> None:
        device = self._pair.device
        layers, blocks = message.kv.shape[:2]
        output = message.output or ()
        tokens = NO_TOKENS if message.output is None else len(output)
        fields = [message.lease_id, message.first_block, blocks, message.first_layer, layers, tokens, VERSION]
        inline, rest = output[:INLINE_TOKENS], output[INLINE_TOKENS:]
        words = [*fields, *inline, *(0 for _ in range(INLINE_TOKENS - len(inline)))]
        self._pair.send(torch.tensor(words, device=device), HEADER_TAG, self._stall_s)
        self._pair.send(_as_bytes(message.kv.to(device)), PAYLOAD_TAG, self._stall_s)
        if rest:
            self._pair.send(torch.tensor(rest, device=device), TOKENS_TAG, self._stall_s)

    def close(self) -> None:
        self._pair.close()


def _nothing() -> None:
    pass


def _seconds(seconds: float) -> timedelta:
    return timedelta(seconds=seconds)


def _as_bytes(kv: Tensor) -> Tensor:
    return kv.contiguous().view(-1).view(torch.uint8)
