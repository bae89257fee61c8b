"""The calls a worker makes to its peers: the stream to a draft worker, and the opening of KV links."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import grpc
import torch

from tidemill.core import control_pb2 as pb
from tidemill.core import wire
from tidemill.core.channels import NodeChannels
from tidemill.core.control_pb2_grpc import WorkerStub
from tidemill.core.messages import DraftCall
from tidemill.core.model import Peer
from tidemill.core.settings import Settings
from workers.engine.base import KvLayout
from workers.kv.link import LinkError, Opener, SendingEnd
from workers.kv.torch_dist import TorchSendingEnd

if TYPE_CHECKING:
    from workers.worker import Worker

log = logging.getLogger(__name__)


class DraftClient:
    """The stream to one draft worker; see workers.speculation.pool.DraftStream.

    The verify role has few calls under way at a time, so the queue stays short whatever the peer does.
    """

    def __init__(self, worker: "Worker", peer: Peer, channels: NodeChannels, loop: asyncio.AbstractEventLoop) -> None:
        """From the engine's thread; `run` is to be started on the loop."""
        self._worker = worker
        self._peer = peer
        self._channels = channels
        self._loop = loop
        self._calls: asyncio.Queue[DraftCall | None] = asyncio.Queue()

    def send(self, call: DraftCall) -> None:
        self._put(call)

    def close(self) -> None:
        self._put(None)

    def _put(self, call: DraftCall | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended: so has the worker
            self._loop.call_soon_threadsafe(self._calls.put_nowait, call)

    async def run(self) -> None:
        """Until either side ends the stream; the worker hears why."""
        why = "closed"
        try:
            async with self._channels.open(self._peer.address) as channel:
                async for reply in WorkerStub(channel).Drafts(self._outgoing()):
                    self._worker.drafts_came(self._peer, wire.draft_reply_from_pb(reply))
        except grpc.aio.AioRpcError as error:
            why = f"{error.code().name}: {error.details()}"
        finally:
            self._worker.drafter_lost(self._peer, why)

    async def _outgoing(self) -> AsyncIterator[pb.DraftCall]:
        while (call := await self._calls.get()) is not None:
            yield wire.draft_call_to_pb(call)


def link_opener(me: Peer, host: str, layout: KvLayout, channels: NodeChannels, settings: Settings) -> Opener:
    """Opens links from this worker, whose own address is `host`; used on the links' threads."""
    limits, device = settings.deadlines, torch.device(settings.engine.device)

    def open_link(to: Peer) -> SendingEnd:
        request = pb.OpenLinkRequest(
            sender=wire.peer_to_pb(me), receiver=wire.worker_id_to_pb(to.id), kv_layout=str(layout)
        )
        try:
            with channels.open_blocking(to.address) as channel:
                reply = WorkerStub(channel).OpenLink(request, timeout=limits.link_s)
        except grpc.RpcError as error:
            raise LinkError(f"{to.id} takes no link: {error.code().name}: {error.details()}") from error
        return TorchSendingEnd(reply.rendezvous, reply.group, device, limits.link_s, limits.stall_s, host)

    return open_link
