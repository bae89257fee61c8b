"""A worker that does exactly what a test tells it to: a small server that speaks control.proto, without an engine.

Tests read the commands that came (`await worker.heard(Reserve)`) and answer with events (`worker.say(...)`), or install
`worker.on`, which answers each command. Heartbeats go out unless the worker is `silent`.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import grpc

from tidemill.core import control_pb2 as pb
from tidemill.core import wire
from tidemill.core.control_pb2_grpc import WorkerServicer, add_WorkerServicer_to_server
from tidemill.core.messages import (
    Cancel,
    Command,
    Event,
    FirstToken,
    Lease,
    LeaseGranted,
    Prefill,
    Prefilled,
    Refusal,
    Refused,
    Released,
    Reserve,
    StepReport,
    Submit,
    Tokens,
)
from tidemill.core.model import Member, Peer, Request, Role, WorkerId, WorkerLoad
from tidemill.core.settings import DeadlineSettings, ModelSettings, PoolSettings, RouterSettings, Settings
from tidemill.types import FinishReason

MODELS = Path(__file__).parents[2] / "models"
Kind = TypeVar("Kind", bound=Command)
Behaviour = Callable[[Command], Iterable[Event]]


class ScriptedWorker(WorkerServicer):
    """One worker. Not thread-safe: lives on the test's event loop."""

    heartbeat_s = 0.1

    def __init__(self, name: str, role: Role, on: Behaviour | None = None) -> None:
        self.id = WorkerId(name, 1)
        self.role = role
        self.on = on
        self.load = WorkerLoad(kv_blocks_total=100)
        self.accepting = True
        self.silent = False
        self.commands: list[Command] = []
        self.messages = 0  # reports sent
        self.streams = 0  # routers attached now
        self._came = asyncio.Condition()
        self._reports: dict[int, asyncio.Queue[StepReport | None]] = {}
        self._port = 0

    async def start(self) -> Member:
        """Listen; a stopped worker starts again on its old port."""
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        add_WorkerServicer_to_server(self, self._server)
        self._port = self._server.add_insecure_port(f"127.0.0.1:{self._port}")
        await self._server.start()
        return self.member

    @property
    def member(self) -> Member:
        return Member(Peer(self.id, f"127.0.0.1:{self._port}"), self.role)

    async def stop(self) -> None:
        """As if killed: streams break."""
        self.break_streams()
        await self._server.stop(0)

    def break_streams(self) -> None:
        for queue in self._reports.values():
            queue.put_nowait(None)

    def become(self, role: Role, epoch: int) -> None:
        """A role switch: the next report comes from a new incarnation."""
        self.id, self.role = WorkerId(self.id.name, epoch), role
        self.say()

    def say(self, *events: Event) -> None:
        """One report to every router."""
        for queue in self._reports.values():
            queue.put_nowait(StepReport(self.id, self.role, self.accepting, self.messages, self.load, events))
            self.messages += 1

    async def heard(self, kind: type[Kind], nth: int = 1, timeout_s: float = 15.0) -> Kind:
        """The nth command of a kind, waited for."""

        def found() -> list[Kind]:
            return [each for each in self.commands if isinstance(each, kind)]

        async with asyncio.timeout(timeout_s), self._came:
            await self._came.wait_for(lambda: len(found()) >= nth)
        return found()[nth - 1]

    def count(self, kind: type[Command]) -> int:
        return sum(isinstance(each, kind) for each in self.commands)

    async def Attach(self, requests: AsyncIterator[pb.Command], context: Any) -> AsyncIterator[pb.StepReport]:
        queue: asyncio.Queue[StepReport | None] = asyncio.Queue()
        self._reports[id(queue)] = queue
        self.streams += 1
        reader = asyncio.create_task(self._read(requests))
        heart = asyncio.create_task(self._beat())
        try:
            self.say()
            for sequence in itertools.count():
                if (report := await queue.get()) is None:
                    break
                yield wire.report_to_pb(replace(report, sequence=sequence))
        finally:
            reader.cancel()
            heart.cancel()
            del self._reports[id(queue)]
            self.streams -= 1
            self.detached()

    def detached(self) -> None:
        """A router's stream ended, and with it whatever is held for that router."""

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self.heartbeat_s)
            if not self.silent:
                self.say()

    async def _read(self, requests: AsyncIterator[pb.Command]) -> None:
        async for message in requests:
            command = wire.command_from_pb(message)
            self.commands.append(command)
            self.take(command)
            async with self._came:
                self._came.notify_all()

    def take(self, command: Command) -> None:
        """Answer a command as `on` says, unless silent."""
        events = tuple(self.on(command)) if self.on and not self.silent else ()
        if isinstance(command, Cancel) and not self.silent:
            events += (Released(command.request_id),)
        if events:
            self.say(*events)


def router_settings(*, router: dict[str, object] | None = None, deadlines: dict[str, float] | None = None) -> Settings:
    """Of a router on a free port that serves the bundled target as `tiny`; the engine is nobody's here."""
    return Settings(
        target=ModelSettings(path=MODELS / "target", name="tiny"),
        pools=PoolSettings(draft=0),
        router=RouterSettings.model_validate({"port": 0} | (router or {})),
        deadlines=DeadlineSettings.model_validate(deadlines or {}),
    )


def expected_tokens(request: Request, count: int, first: int = 0) -> tuple[int, ...]:
    """Tokens first..first+count of a request, as every scripted worker makes them: position by position."""
    seed = sum(request.prompt) + (request.sampling.seed or 0)
    return tuple(300 + (seed + 7 * at) % 500 for at in range(first, first + count))


def step(request: Request, count: int = 1, at: int = 0, *, end: bool = False, **more: Any) -> Tokens:
    """A step's tokens, from the `at`-th output token on."""
    if at == len(request.output):
        more.setdefault("first", FirstToken(0.0, 0.0, 0.0))
    finish = FinishReason.LENGTH if end else None
    return Tokens(request.id, expected_tokens(request, count, at), finish=finish, **more)


def whole(request: Request) -> tuple[Tokens, ...]:
    """All that is left of a request, a token a step."""
    first, last = len(request.output), request.sampling.max_tokens
    return tuple(step(request, 1, at, end=at == last - 1) for at in range(first, last))


def lease_for(worker: ScriptedWorker, request: Request, blocks: int = 4) -> LeaseGranted:
    return LeaseGranted(request.id, Lease(1, request.id, worker.member.peer, 0, blocks, 9.0))


def obliging_verify(worker: ScriptedWorker) -> Behaviour:
    """Grants every lease; decodes what is submitted. Reserved requests wait for `whole`, said by the prefill worker."""

    def on(command: Command) -> Iterable[Event]:
        match command:
            case Submit(request, _):
                return whole(request)
            case Reserve(request, _, _):
                return (lease_for(worker, request),)
        return ()

    return on


def obliging_prefill(verify: ScriptedWorker) -> Behaviour:
    """Is done at once, and then the verify worker decodes."""

    def on(command: Command) -> Iterable[Event]:
        if isinstance(command, Prefill):
            asyncio.get_running_loop().call_soon(verify.say, *whole(command.request))
            return (Prefilled(command.request.id, 0.0, 0.001),)
        return ()

    return on


def refusing(reason: Refusal) -> Behaviour:
    def on(command: Command) -> Iterable[Event]:
        return () if isinstance(command, Cancel) else (Refused(command.request.id, reason),)

    return on
