"""The worker's control service: the gRPC surface of control.proto, transport only.

One event loop on a thread of its own does all network work; the engine's thread only leaves messages here, and what
comes in is left in the worker's mailbox.
"""

import asyncio
import contextlib
import itertools
import logging
import threading
from collections.abc import AsyncIterator, Coroutine
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import grpc

from tidemill.core import control_pb2 as pb
from tidemill.core import metrics, wire
from tidemill.core.channels import OPTIONS, NodeChannels
from tidemill.core.control_pb2_grpc import WorkerServicer, add_WorkerServicer_to_server
from tidemill.core.messages import DraftReply, Event, StepReport
from tidemill.core.model import Peer, Role
from workers.mailbox import MailboxFull
from workers.peers import DraftClient

if TYPE_CHECKING:
    from workers.worker import Worker

log = logging.getLogger(__name__)

MAX_UNREAD_EVENTS = 100_000  # of one router; seconds of steps with many requests
MAX_PENDING_REPLIES = 16  # a verify worker has fewer calls under way
ANSWER_S = 30.0
ALIVE_S = 1.0  # longest silence towards a router, whatever the engine's thread is at
GRACE_S = 0.2


class ControlService:
    """See control.proto."""

    def __init__(self, worker: "Worker", host: str, channels: NodeChannels) -> None:
        self._worker = worker
        self._host = host
        self._channels = channels
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="control", daemon=True)
        self._routers: dict[int, _RouterStream] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    # --- life ---------------------------------------------------------------------------------------------------

    def start(self) -> str:
        """Listen; returns host:port. Raises OSError if no port can be had."""
        self._thread.start()
        address: str = self._await(self._serve())
        return address

    def stop(self) -> None:
        """Close the server and every stream, end the loop and its thread."""
        self._await(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(ANSWER_S)

    def _run(self) -> None:
        self._loop.run_forever()
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    def _await(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(ANSWER_S)

    async def _serve(self) -> str:
        self._server = grpc.aio.server(options=[*OPTIONS, ("grpc.so_reuseport", 0)])
        add_WorkerServicer_to_server(_Servicer(self._worker, self._routers), self._server)
        port = self._channels.listen(self._server, self._host)
        await self._server.start()
        return f"{self._host}:{port}"

    async def _close(self) -> None:
        for stream in self._routers.values():
            stream.finish()
        await self._server.stop(GRACE_S)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    # --- called on the engine's thread ---------------------------------------------------------------------------

    def send_report(self, router: int, report: StepReport) -> None:
        """Never blocks."""
        with contextlib.suppress(RuntimeError):  # the loop has ended: so has the worker
            self._loop.call_soon_threadsafe(self._put_report, router, report)

    def _put_report(self, router: int, report: StepReport) -> None:
        stream = self._routers.get(router)
        if stream is not None and not stream.put(report):
            log.warning("a router does not read its reports: its stream is cut and its requests are cancelled")
            del self._routers[router]
            self._worker.router_left(router)
            self._spawn(stream.cut())

    def connect_drafter(self, peer: Peer) -> DraftClient:
        """See workers.speculation.pool.DraftConnect."""
        client = DraftClient(self._worker, peer, self._channels, self._loop)
        self._loop.call_soon_threadsafe(lambda: self._spawn(client.run()))
        return client

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)  # the loop itself holds no more than a weak reference
        task.add_done_callback(self._tasks.discard)


class _RouterStream:
    """What is on its way to one router. Reports it is too slow for become one. Belongs to the event loop."""

    def __init__(self, context: Any) -> None:
        """`context` is the gRPC call's."""
        self._context = context
        self._latest: StepReport | None = None
        self._events: list[Event] = []
        self._finished = False
        self._changed = asyncio.Event()

    def put(self, report: StepReport) -> bool:
        """False if the router does not read."""
        self._latest = report
        self._events += report.events
        self._changed.set()
        return len(self._events) <= MAX_UNREAD_EVENTS

    def finish(self) -> None:
        """End the stream after what is in it."""
        self._finished = True
        self._changed.set()

    async def cut(self) -> None:
        """End it without what is in it; the status is there when the router reads again."""
        self._latest, self._events = None, []
        self.finish()
        with contextlib.suppress(grpc.aio.AbortError):
            await self._context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "the reports were not read")

    async def reports(self) -> AsyncIterator[StepReport]:
        """While a long step keeps the engine's thread, the last is told again, under its number and without events."""
        report: StepReport | None = None
        for sequence in itertools.count():
            while self._latest is None:
                if self._finished:
                    return
                self._changed.clear()
                try:
                    async with asyncio.timeout(ALIVE_S):
                        await self._changed.wait()
                except TimeoutError:
                    if report is not None and self._latest is None:
                        yield replace(report, events=())
            report = replace(self._latest, sequence=sequence, events=tuple(self._events))
            self._latest, self._events = None, []
            yield report


class _Servicer(WorkerServicer):
    def __init__(self, worker: "Worker", routers: dict[int, _RouterStream]) -> None:
        self._worker = worker
        self._routers = routers
        self._streams = itertools.count(1)

    async def Attach(self, requests: AsyncIterator[pb.Command], context: Any) -> AsyncIterator[pb.StepReport]:
        router = next(self._streams)
        stream = self._routers[router] = _RouterStream(context)
        self._worker.router_attached(router)
        reader = asyncio.create_task(self._read_commands(router, requests))
        try:
            async for report in stream.reports():
                self._worker.metrics.add(metrics.REPORTS)
                yield wire.report_to_pb(report)
        finally:
            self._leave(router)
            reader.cancel()

    async def _read_commands(self, router: int, requests: AsyncIterator[pb.Command]) -> None:
        """The end of a router's commands is the end of its requests, whatever becomes of the other direction."""
        try:
            async for message in requests:
                self._worker.post_command(router, wire.command_from_pb(message))
        except (MailboxFull, ValueError) as error:
            log.warning("a router's stream is closed: %s", error)
        finally:
            self._leave(router)

    def _leave(self, router: int) -> None:
        stream = self._routers.pop(router, None)
        if stream is not None:
            self._worker.router_left(router)
            stream.finish()

    async def Drafts(self, requests: AsyncIterator[pb.DraftCall], context: Any) -> AsyncIterator[pb.DraftReply]:
        stream = next(self._streams)
        loop = asyncio.get_running_loop()
        replies: asyncio.Queue[DraftReply | None] = asyncio.Queue()

        def reply(drafts: DraftReply | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended: so has the worker
                loop.call_soon_threadsafe(replies.put_nowait, drafts)

        async def read() -> None:
            try:
                async for message in requests:
                    if replies.qsize() >= MAX_PENDING_REPLIES:
                        raise MailboxFull("a verify worker does not read its drafts")
                    self._worker.post_draft_call(stream, wire.draft_call_from_pb(message), reply)
            except MailboxFull as error:
                log.warning("a verify worker's stream is closed: %s", error)
            finally:
                replies.put_nowait(None)

        reader = asyncio.create_task(read())
        try:
            while (drafts := await replies.get()) is not None:
                yield wire.draft_reply_to_pb(drafts)
        finally:
            reader.cancel()
            self._worker.draft_stream_closed(stream)

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
            role = Role(request.role)
        except ValueError:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT, f"no role {request.role!r}; there are {', '.join(Role)}"
            )
        try:
            await asyncio.wrap_future(self._worker.set_role(role, request.drain_s))
        except Exception as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        return self._describe()

    def _describe(self) -> pb.Description:
        said = self._worker.describe()
        return pb.Description(
            peer=wire.peer_to_pb(said.peer),
            role=said.role,
            accepting=said.accepting,
            load=wire.load_to_pb(said.load),
            metrics_address=said.metrics_address,
            model=said.model,
            engine=said.engine,
        )
