"""A router's side of the workers' streams, and workers around small engines: what the worker tests are driven with."""

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from tests.support.engines import SMALL, VOCABULARY
from tidemill.core import control_pb2 as pb
from tidemill.core import wire
from tidemill.core.control_pb2_grpc import WorkerStub
from tidemill.core.messages import (
    Cancel,
    Command,
    Event,
    Failed,
    LeaseGranted,
    Prefill,
    Prefilled,
    Refused,
    Reserve,
    StepReport,
    Submit,
    Tokens,
)
from tidemill.core.model import Peer, Request, Role
from tidemill.core.settings import DeadlineSettings, EngineSettings, ModelSettings, Settings, SpeculationSettings
from workers.engine.base import Engine
from workers.engine.emulated import EmulatedEngine
from workers.loop import EngineLoop
from workers.worker import Worker

PATIENCE_S = 20.0


def fixed_drafts(**changes: object) -> SpeculationSettings:
    """Drafts of one shape, whatever time steps take, so that a test sees the same each time."""
    return SpeculationSettings(**({"adaptive": False, "wait_s": 0.2} | changes))  # type: ignore[arg-type]


def settings_of(
    engine: EngineSettings = SMALL,
    speculation: SpeculationSettings | None = None,
    **deadlines: float,
) -> Settings:
    """For workers whose engines a test makes itself: the folders are never read."""
    return Settings(
        target=ModelSettings(path=Path("target")),
        draft=ModelSettings(path=Path("draft")),
        engine=engine,
        speculation=speculation or fixed_drafts(),
        deadlines=DeadlineSettings(**{"drain_s": 1.0, "link_s": 3.0} | deadlines),  # type: ignore[arg-type]
    )


def emulated(settings: Settings, role: Role) -> Engine:
    """Prefill, verify and draft agree on every token."""
    return EmulatedEngine(settings.engine, VOCABULARY)


@contextmanager
def running(*workers: Worker) -> Iterator[None]:
    """Start them; stop them whatever happens."""
    try:
        for worker in workers:
            worker.start()
        yield
    finally:
        for worker in workers:
            worker.stop()


class Lost(Exception):
    """The stream to the worker ended."""


@dataclass
class Stream:
    """Attached to one worker: everything it reports, and its events by request."""

    peer: Peer
    commands: "asyncio.Queue[Command | None]" = field(default_factory=asyncio.Queue)
    reports: list[StepReport] = field(default_factory=list)
    heard: "defaultdict[str, asyncio.Queue[Event | None]]" = field(default_factory=lambda: defaultdict(asyncio.Queue))
    ended: bool = False

    def send(self, command: Command) -> None:
        self.commands.put_nowait(command)

    async def event(self, request_id: str, timeout_s: float = PATIENCE_S) -> Event:
        """The next event of a request. Raises Lost, TimeoutError."""
        if self.ended and self.heard[request_id].empty():
            raise Lost(str(self.peer.id))
        async with asyncio.timeout(timeout_s):
            event = await self.heard[request_id].get()
        if event is None:
            raise Lost(str(self.peer.id))
        return event

    async def report(self, true: Callable[[StepReport], bool], timeout_s: float = PATIENCE_S) -> StepReport:
        """Wait until the latest report has what is looked for."""
        deadline = time.monotonic() + timeout_s
        while not (self.reports and true(self.reports[-1])):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.peer.id}: the last report is {self.reports[-1:]}")
            await asyncio.sleep(0.005)
        return self.reports[-1]

    async def released(self, timeout_s: float = PATIENCE_S) -> StepReport:
        """Wait until the worker says that it holds nothing."""

        def empty(report: StepReport) -> bool:
            load = report.load
            return not (load.kv_blocks_used or load.kv_blocks_leased or load.running_requests or load.queued_requests)

        return await self.report(empty, timeout_s)

    async def run(self, channel: grpc.aio.Channel) -> None:
        try:
            async for message in WorkerStub(channel).Attach(self._outgoing()):  # type: ignore[arg-type]
                report = wire.report_from_pb(message)
                self.reports.append(report)
                for event in report.events:
                    self.heard[event.request_id].put_nowait(event)
        except grpc.aio.AioRpcError:
            pass
        finally:
            self.ended = True
            for queue in self.heard.values():
                queue.put_nowait(None)

    async def _outgoing(self) -> AsyncIterator[pb.Command]:
        while (command := await self.commands.get()) is not None:
            yield wire.command_to_pb(command)


@asynccontextmanager
async def attached(*peers: Peer) -> AsyncIterator[list[Stream]]:
    """A stream to each worker, closed at the end."""
    streams = [Stream(peer) for peer in peers]
    channels = [grpc.aio.insecure_channel(peer.address) for peer in peers]
    tasks = [asyncio.create_task(s.run(c)) for s, c in zip(streams, channels, strict=True)]
    try:
        for stream in streams:
            await stream.report(lambda _: True)
        yield streams
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for channel in channels:
            await channel.close()


@dataclass
class Outcome:
    """What became of a request."""

    tokens: tuple[int, ...] = ()
    events: list[Event] = field(default_factory=list)

    @property
    def accepted(self) -> int:
        return sum(each.accepted for each in self.events if isinstance(each, Tokens))

    @property
    def last(self) -> Event:
        return self.events[-1]


async def decode(verify: Stream, request_id: str, outcome: Outcome) -> Outcome:
    """Collect tokens until the request finishes, fails or is refused."""
    while True:
        event = await verify.event(request_id)
        outcome.events.append(event)
        match event:
            case Tokens(tokens=tokens, finish=finish):
                outcome.tokens += tokens
                if finish is not None:
                    return outcome
            case Failed() | Refused():
                return outcome


async def submit(verify: Stream, request: Request, drafter: Peer | None = None) -> Outcome:
    """Prefill and decode on one worker."""
    verify.send(Submit(request, drafter))
    return await decode(verify, request.id, Outcome())


async def hand_over(
    prefill: Stream, verify: Stream, request: Request, drafter: Peer | None = None, ttl_s: float = 30.0
) -> Outcome:
    """Reserve, prefill elsewhere, decode."""
    verify.send(Reserve(request, ttl_s, drafter))
    granted = await verify.event(request.id)
    outcome = Outcome(events=[granted])
    if not isinstance(granted, LeaseGranted):
        return outcome
    if granted.lease.first_block < granted.lease.end_block:
        prefill.send(Prefill(request, granted.lease))
        done = await prefill.event(request.id)
        outcome.events.append(done)
        if not isinstance(done, Prefilled):
            verify.send(Cancel(request.id))
            return outcome
    return await decode(verify, request.id, outcome)


def worker(role: Role, settings: Settings | None = None, name: str = "") -> Worker:
    """Around an engine without a model."""
    return Worker(name or f"{role}-0", role, settings or settings_of(), engine_factory=emulated)


class LiveTrio:
    """A prefill, a verify and a draft worker, each attached."""

    def __init__(self, workers: tuple[Worker, Worker, Worker], streams: list[Stream]) -> None:
        self.prefill, self.verify, self.draft = workers
        self.to_prefill, self.to_verify, self.to_draft = streams

    async def hand_over(self, request: Request, drafter: Peer | None = None) -> Outcome:
        return await hand_over(self.to_prefill, self.to_verify, request, drafter)

    async def released(self) -> None:
        """All of them come to hold nothing, and say so."""
        deadline = time.monotonic() + 20

        def clean(loop: EngineLoop) -> bool:
            loop.engine.check()  # type: ignore[attr-defined]
            return loop.holds_nothing

        for each in (self.prefill, self.verify, self.draft):
            while not await asyncio.wrap_future(each.on_engine_thread(clean)):
                assert time.monotonic() < deadline, each.describe()
                await asyncio.sleep(0.005)
        for stream in (self.to_prefill, self.to_verify, self.to_draft):
            await stream.released()


@asynccontextmanager
async def live_trio(settings: Settings) -> AsyncIterator[LiveTrio]:
    workers = (worker(Role.PREFILL, settings), worker(Role.VERIFY, settings), worker(Role.DRAFT, settings))
    with running(*workers):
        async with attached(*(each.peer for each in workers)) as streams:
            yield LiveTrio(workers, streams)
