"""The router's live picture of the workers, and the streams to them.

One stream per worker carries all requests' commands and events. It is opened when the controller names the worker and
opened again, with growing pauses, for as long as it stays a member.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import grpc

from router.telemetry import Telemetry, count
from tidemill.core import control_pb2 as pb
from tidemill.core import wire
from tidemill.core.channels import NodeChannels
from tidemill.core.clock import Clock
from tidemill.core.control_pb2_grpc import WorkerStub
from tidemill.core.messages import Cancel, Command, Event, Failed, Failure, Prefill, Prefilled, Released, StepReport
from tidemill.core.model import Member, Peer, PoolSnapshot, Role, WorkerLoad, WorkerSnapshot
from tidemill.core.settings import DeadlineSettings
from tidemill.core.telemetry import STALE_AFTER_S

log = logging.getLogger(__name__)

RETRY_S, MAX_RETRY_S = 0.1, 2.0
STALL_TICKS = 20  # in the stall limit


class WorkerLost(Exception):
    """The stream to a worker ended, or the worker is another incarnation; what it held for this router is gone."""

    def __init__(self, detail: str, failure: Failure = Failure.STOPPING) -> None:
        super().__init__(detail)
        self.failure = failure


Attach = Callable[[str, AsyncIterator[pb.Command]], AsyncGenerator[pb.StepReport, None]]


def attach_over(channels: NodeChannels) -> Attach:
    """The stream to a worker, over a channel of its own; it raises AioRpcError when it breaks."""

    async def attach(address: str, commands: AsyncIterator[pb.Command]) -> AsyncGenerator[pb.StepReport, None]:
        async with channels.open(address) as channel:
            async for report in WorkerStub(channel).Attach(commands):
                yield report

    return attach


# How a request hears of its workers: (worker, event).
Hear = Callable[["WorkerConnection", Event], None]


@dataclass(slots=True, eq=False)
class Conversation:
    """One request with one worker. Belongs to the attempt that opened it, which closes it."""

    worker: "WorkerConnection"
    request_id: str  # as the worker knows it
    hear: Hear
    is_load: bool = True  # a prefill worker that has done its part is still heard, but carries nothing
    prompt_tokens: int = 0  # still to be computed

    def send(self, command: Command) -> None:
        """Never blocks. Raises WorkerLost."""
        if isinstance(command, Prefill):
            self.prompt_tokens = command.request.kv_tokens
        self.worker.send(command)

    def close(self, *, cancel: bool) -> None:
        """Hear no more; with `cancel` the worker drops what it holds."""
        self.worker.close_conversation(self, cancel=cancel)


class WorkerConnection:
    """One worker incarnation. All of this runs on the router's event loop."""

    def __init__(
        self,
        member: Member,
        clock: Clock,
        telemetry: Telemetry,
        on_cancelled: Callable[[float], None],
        on_draining: "Callable[[WorkerConnection], None]",
        attach: Attach,
        stall_s: float,
    ) -> None:
        """A worker that says nothing for `stall_s` is lost. `on_cancelled` hears how many seconds it took from a
        cancellation to the worker's `Released`; `on_draining` that the worker takes no more, while it still has
        requests.
        """
        self.peer = member.peer
        self.role = member.role
        self.accepting = False
        self.load = WorkerLoad()
        self.heard_at = float("-inf")
        self._clock = clock
        self._telemetry = telemetry
        self._on_cancelled = on_cancelled
        self._on_draining = on_draining
        self._attach = attach
        self._stall_s = stall_s
        self._silent_ticks = 0
        self._sequence: int | None = None  # of the last report of this stream
        self._conversations: dict[str, Conversation] = {}
        # None while there is no stream. Holds a few commands for each active request, whose number is bounded; None
        # ends it.
        self._commands: asyncio.Queue[Command | None] | None = None
        self._cancelled: dict[str, float] = {}  # when, until the worker says `Released` or its stream ends
        self._task = asyncio.create_task(self._keep_open(), name=f"worker-{member.peer.id}")

    @property
    def connected(self) -> bool:
        return self._commands is not None

    @property
    def draining(self) -> bool:
        """True if it takes no more, and still has requests of this router."""
        return self.connected and not self.accepting and bool(self._conversations)

    def snapshot(self) -> WorkerSnapshot:
        carried = [each for each in self._conversations.values() if each.is_load]
        tokens = sum(each.prompt_tokens for each in carried)
        return WorkerSnapshot(self.peer, self.role, self.load, len(carried), tokens)

    def usable(self, now: float) -> bool:
        """True if new requests may go there."""
        return self.connected and self.accepting and now - self.heard_at < STALE_AFTER_S

    def open(self, request_id: str, hear: Hear) -> Conversation:
        """Start to hear of a request; `hear` is called with everything about it."""
        conversation = Conversation(self, request_id, hear)
        self._conversations[request_id] = conversation
        return conversation

    def send(self, command: Command) -> None:
        if self._commands is None:
            raise WorkerLost(f"{self.peer.id} is not connected")
        self._commands.put_nowait(command)

    def close_conversation(self, conversation: Conversation, *, cancel: bool) -> None:
        if self._conversations.get(conversation.request_id) is conversation:
            del self._conversations[conversation.request_id]
            if cancel and self._commands is not None:  # a worker whose stream ended has dropped everything itself
                self._cancelled[conversation.request_id] = self._clock.monotonic()
                self.send(Cancel(conversation.request_id))

    async def close(self) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _keep_open(self) -> None:
        pause_s = RETRY_S
        while True:
            why = "its stream ended"
            try:
                self._commands, self._sequence = asyncio.Queue(), None
                async with (
                    self._unless_it_stalls(),
                    aclosing(self._attach(self.peer.address, self._outgoing(self._commands))) as reports,
                ):
                    async for message in reports:
                        self._silent_ticks = 0
                        self._take(wire.report_from_pb(message))
                        pause_s = RETRY_S
            except TimeoutError:
                why = f"it has said nothing for {self._stall_s:.1f} s"
            except grpc.aio.AioRpcError as error:
                why = f"{error.code().name}: {error.details()}"
            except ValueError as error:
                why = str(error)
            finally:
                self._lose(why)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, MAX_RETRY_S)

    @contextlib.asynccontextmanager
    async def _unless_it_stalls(self) -> AsyncIterator[None]:
        """Raises TimeoutError. Silence is counted in ticks of this loop: a router that stood still blames nobody."""

        async def watch(patience: asyncio.Timeout) -> None:
            self._silent_ticks = 0
            while self._silent_ticks < STALL_TICKS:
                await asyncio.sleep(self._stall_s / STALL_TICKS)
                self._silent_ticks += 1
            patience.reschedule(asyncio.get_running_loop().time())

        async with asyncio.timeout(None) as patience:
            watching = asyncio.create_task(watch(patience))
            try:
                yield
            finally:
                watching.cancel()

    async def _outgoing(self, commands: "asyncio.Queue[Command | None]") -> AsyncIterator[pb.Command]:
        while (command := await commands.get()) is not None:
            yield wire.command_to_pb(command)

    def _take(self, report: StepReport) -> None:
        if report.sequence == self._sequence:
            return  # it lives; only an engine that turns is heard of
        self._sequence = report.sequence
        self.heard_at = self._clock.monotonic()
        self.load, self.accepting = report.load, report.accepting
        if report.worker != self.peer.id or report.role is not self.role:
            self._become(report)
        prefilled_tokens = 0
        for event in report.events:
            if isinstance(event, Released) and event.request_id in self._cancelled:
                self._on_cancelled(self.heard_at - self._cancelled.pop(event.request_id))
            conversation = self._conversations.get(event.request_id)
            if conversation is not None:
                if isinstance(event, Prefilled):
                    conversation.is_load = False
                    prefilled_tokens += conversation.prompt_tokens
                conversation.hear(self, event)
        counted = count(report.events, prefilled_tokens)
        self._telemetry.reported(report.worker, report.role, report.accepting, report.load, counted, self.heard_at)
        if self.draining:
            self._on_draining(self)

    def _become(self, report: StepReport) -> None:
        """The worker changed its role, or is another incarnation behind the same address: all it held is gone.

        A prefill worker that had done its part held nothing; if its last blocks were lost their receiver says so.
        """
        log.info("%s is now %s, a %s worker", self.peer.id, report.worker, report.role)
        carried = [each for each in self._conversations.values() if each.is_load]
        self._fail(carried, Failure.ROLE_CHANGED, f"{self.peer.id} became {report.worker}")
        self.peer = Peer(report.worker, self.peer.address)
        self.role = report.role

    def _lose(self, why: str) -> None:
        if self._conversations:
            log.warning("worker %s is lost with %d requests: %s", self.peer.id, len(self._conversations), why)
        if self._commands is not None:
            self._commands.put_nowait(None)  # gRPC waits for the next one even when the stream has broken
        # It drops what it held of this router; of the rest nothing is known until its next report.
        self._commands, self.accepting, self.load = None, False, WorkerLoad()
        self._cancelled.clear()
        self._fail(list(self._conversations.values()), Failure.STOPPING, f"{self.peer.id} is lost: {why}")

    def _fail(self, conversations: list[Conversation], failure: Failure, detail: str) -> None:
        for conversation in conversations:
            conversation.hear(self, Failed(conversation.request_id, failure, detail))


class PoolsView:
    """All members."""

    def __init__(
        self,
        clock: Clock,
        attach: Attach,
        telemetry: Telemetry,
        on_cancelled: Callable[[float], None] = lambda _: None,
        *,
        stall_s: float = DeadlineSettings().stall_s,
    ) -> None:
        """See WorkerConnection, of `on_draining` too."""
        self._clock = clock
        self._telemetry = telemetry
        self._on_cancelled = on_cancelled
        self._attach = attach
        self._stall_s = stall_s
        self._workers: dict[str, WorkerConnection] = {}
        self.on_draining: Callable[[WorkerConnection], None] = lambda _: None

    async def set_members(self, members: Sequence[Member]) -> None:
        """Connect to new ones, leave those that are gone. An address is a member; epochs come with reports."""
        wanted = {member.peer.address: member for member in members}
        for address in [each for each in self._workers if each not in wanted]:
            await self._workers.pop(address).close()
        for address, member in wanted.items():
            if address not in self._workers:
                self._workers[address] = WorkerConnection(
                    member, self._clock, self._telemetry, self._on_cancelled, self._drains, self._attach, self._stall_s
                )

    def _drains(self, worker: WorkerConnection) -> None:
        self.on_draining(worker)

    def snapshot(self) -> PoolSnapshot:
        """The workers that can take requests now."""
        now = self._clock.monotonic()
        return PoolSnapshot(tuple(each.snapshot() for each in self._workers.values() if each.usable(now)))

    def connection(self, peer: Peer) -> WorkerConnection:
        """Raises WorkerLost if it is no member any more, or has changed its role."""
        worker = self._workers.get(peer.address)
        if worker is None:
            raise WorkerLost(f"{peer.id} is gone")
        if worker.peer.id != peer.id:
            raise WorkerLost(f"{peer.id} became {worker.peer.id}", Failure.ROLE_CHANGED)
        return worker

    def describe(self) -> list[dict[str, object]]:
        """All members, reachable or not."""
        now = self._clock.monotonic()
        return [
            {
                "worker": str(each.peer.id),
                "address": each.peer.address,
                "role": str(each.role),
                "state": "serving" if each.usable(now) else "draining" if each.connected else "unreachable",
                "running": each.load.running_requests,
                "queued": each.load.queued_requests,
                "kv_blocks_used": each.load.kv_blocks_used,
                "kv_blocks_leased": each.load.kv_blocks_leased,
                "kv_blocks_total": each.load.kv_blocks_total,
                "steps": each.load.steps,
            }
            for each in self._workers.values()
        ]

    def has(self, role: Role) -> bool:
        return bool(self.snapshot().of(role))

    async def close(self) -> None:
        await self.set_members(())
