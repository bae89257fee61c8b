"""The worker's gRPC: the control service it serves, and the streams and calls it makes to its peers.

One event loop on a thread of its own does all network work; the engine's thread only leaves messages here.
"""

import asyncio
import contextlib
import itertools
import logging
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import TYPE_CHECKING, Any

import grpc
import torch

from tidemill.core import control_pb2 as pb
from tidemill.core import wire
from tidemill.core.control_pb2_grpc import WorkerServicer, WorkerStub, add_WorkerServicer_to_server
from tidemill.core.messages import DraftCall, DraftReply, StepReport
from tidemill.core.model import Peer, Role
from tidemill.core.settings import Settings
from workers.engine.base import KvLayout
from workers.kv.link import LinkError, SendingEnd
from workers.kv.torch_dist import TorchSendingEnd
from workers.mailbox import MailboxFull

if TYPE_CHECKING:
    from workers.worker import Worker

log = logging.getLogger(__name__)

MAX_PENDING_REPORTS = 1024  # a router that reads no faster than this is cut off
MAX_MESSAGE_BYTES = 64 * 1024 * 1024
OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
]


class ControlService:
    """See control.proto."""

    def __init__(self, worker: "Worker", host: str) -> None:
        self._worker = worker
        self._host = host
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="control", daemon=True)
        self._reports: dict[int, asyncio.Queue[StepReport | None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> str:
        """Listen; returns host:port. Raises OSError if no port can be had."""
        self._thread.start()
        return self._await(self._serve())

    def stop(self) -> None:
        """Close the server and every stream, end the loop."""
        self._await(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(2.0)

    def _await(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30.0)

    async def _serve(self) -> str:
        self._server = grpc.aio.server(options=OPTIONS)
        add_WorkerServicer_to_server(_Servicer(self._worker, self._reports), self._server)
        try:
            port = self._server.add_insecure_port(f"{self._host}:0")
        except RuntimeError as error:
            raise OSError(f"no port to listen on at {self._host}: {error}") from error
        await self._server.start()
        return f"{self._host}:{port}"

    async def _close(self) -> None:
        for queue in self._reports.values():
            with contextlib.suppress(asyncio.QueueFull):
                queue.put_nowait(None)
        await self._server.stop(0.2)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    # --- called on the engine's thread ---------------------------------------------------------------------------

    def send_report(self, router: int, report: StepReport) -> None:
        """Never blocks."""
        self._loop.call_soon_threadsafe(self._put_report, router, report)

    def _put_report(self, router: int, report: StepReport) -> None:
        queue = self._reports.get(router)
        if queue is None:
            return
        try:
            queue.put_nowait(report)
        except asyncio.QueueFull:
            log.warning("a router does not read its reports; its stream is closed")
            self._reports.pop(router)
            queue.get_nowait()
            queue.put_nowait(None)

    def connect_drafter(self, peer: Peer) -> "_DraftClient":
        """See workers.speculation.pool.DraftConnect."""
        client = _DraftClient(self._worker, peer, self._loop)
        self._loop.call_soon_threadsafe(self._spawn, client)
        return client

    def _spawn(self, client: "_DraftClient") -> None:
        client.task = self._loop.create_task(client.run())
        self._tasks.add(client.task)
        client.task.add_done_callback(self._tasks.discard)

    def link_opener(self, me: Peer, layout: KvLayout, settings: Settings) -> Callable[[Peer], SendingEnd]:
        """Opens links from this worker; used on the links' threads."""
        timeout_s, device = settings.deadlines.link_s, torch.device(settings.engine.device)

        def open_link(to: Peer) -> SendingEnd:
            request = pb.OpenLinkRequest(
                sender=wire.peer_to_pb(me), receiver=wire.worker_id_to_pb(to.id), kv_layout=str(layout)
            )
            try:
                with grpc.insecure_channel(to.address, options=OPTIONS) as channel:
                    reply = WorkerStub(channel).OpenLink(request, timeout=timeout_s)
            except grpc.RpcError as error:
                raise LinkError(f"{to.id} does not take a link: {error.details()}") from error
            return TorchSendingEnd(reply.rendezvous, reply.group, device, timeout_s)

        return open_link


class _DraftClient:
    """The stream to one draft worker. Calls wait in a queue that holds few: at most one awaits an answer."""

    def __init__(self, worker: "Worker", peer: Peer, loop: asyncio.AbstractEventLoop) -> None:
        self._worker = worker
        self._peer = peer
        self._loop = loop
        self._calls: asyncio.Queue[DraftCall | None] = asyncio.Queue()
        self.task: asyncio.Task[None] | None = None

    def send(self, call: DraftCall) -> None:
        self._loop.call_soon_threadsafe(self._calls.put_nowait, call)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._calls.put_nowait, None)

    async def run(self) -> None:
        why = "closed"
        try:
            async with grpc.aio.insecure_channel(self._peer.address, options=OPTIONS) as channel:
                async for reply in WorkerStub(channel).Drafts(self._outgoing()):
                    self._worker.post_drafts(self._peer, wire.draft_reply_from_pb(reply))
        except grpc.aio.AioRpcError as error:
            why = f"{error.code().name}: {error.details()}"
        except MailboxFull as error:
            why = str(error)
        finally:
            with contextlib.suppress(MailboxFull):
                self._worker.post_drafter_lost(self._peer, why)

    async def _outgoing(self) -> AsyncIterator[pb.DraftCall]:
        while (call := await self._calls.get()) is not None:
            yield wire.draft_call_to_pb(call)


class _Servicer(WorkerServicer):
    def __init__(self, worker: "Worker", reports: dict[int, "asyncio.Queue[StepReport | None]"]) -> None:
        self._worker = worker
        self._reports = reports
        self._streams = itertools.count(1)

    async def Attach(self, requests: AsyncIterator[pb.Command], context: Any) -> AsyncIterator[pb.StepReport]:
        router = next(self._streams)
        queue: asyncio.Queue[StepReport | None] = asyncio.Queue(MAX_PENDING_REPORTS)
        self._reports[router] = queue
        self._worker.post_router(router, attached=True)
        reader = asyncio.create_task(self._read_commands(router, requests, queue))
        try:
            while (report := await queue.get()) is not None:
                yield wire.report_to_pb(report)
        finally:
            reader.cancel()
            self._reports.pop(router, None)
            self._worker.post_router(router, attached=False)

    async def _read_commands(
        self, router: int, requests: AsyncIterator[pb.Command], queue: "asyncio.Queue[StepReport | None]"
    ) -> None:
        try:
            async for message in requests:
                self._worker.post_command(router, wire.command_from_pb(message))
        except (MailboxFull, ValueError) as error:
            log.warning("a router's stream is closed: %s", error)
        finally:
            with contextlib.suppress(asyncio.QueueFull):
                queue.put_nowait(None)

    async def Drafts(self, requests: AsyncIterator[pb.DraftCall], context: Any) -> AsyncIterator[pb.DraftReply]:
        stream = next(self._streams)
        loop = asyncio.get_running_loop()
        replies: asyncio.Queue[pb.DraftReply | None] = asyncio.Queue()  # at most one call awaits its reply

        def answer(reply: DraftReply) -> None:
            loop.call_soon_threadsafe(replies.put_nowait, wire.draft_reply_to_pb(reply))

        async def read() -> None:
            try:
                async for message in requests:
                    self._worker.post_draft_call(
                        stream,
                        wire.draft_call_from_pb(message),
                        answer,
                    )
            except MailboxFull as error:
                log.warning("a verify worker's stream is closed: %s", error)
            finally:
                replies.put_nowait(None)

        reader = asyncio.create_task(read())
        try:
            while (reply := await replies.get()) is not None:
                yield reply
        finally:
            reader.cancel()
            self._worker.post_draft_stream_closed(stream)

    async def OpenLink(self, request: pb.OpenLinkRequest, context: Any) -> pb.OpenLinkReply:
        try:
            rendezvous, group = self._worker.accept_link(
                wire.peer_from_pb(request.sender), wire.worker_id_from_pb(request.receiver), request.kv_layout
            )
        except ValueError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        return pb.OpenLinkReply(rendezvous=rendezvous, group=group)

    async def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.Description:
        return self._describe()

    async def SetRole(self, request: pb.SetRoleRequest, context: Any) -> pb.Description:
        try:
            await asyncio.wrap_future(self._worker.set_role(Role(request.role), request.drain_s))
        except ValueError:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT, f"no role {request.role!r}; there are {', '.join(Role)}"
            )
        except Exception as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        return self._describe()

    def _describe(self) -> pb.Description:
        worker = self._worker
        model = worker.settings.draft if worker.role is Role.DRAFT else worker.settings.target
        return pb.Description(
            peer=wire.peer_to_pb(worker.peer),
            role=worker.role,
            accepting=worker.accepting,
            load=wire.load_to_pb(worker.load()),
            metrics_address=worker.metrics_address,
            model=model.served_name if model else "",
            engine=worker.engine_kind,
        )
