"""The real router and real worker loops in one event loop of virtual time; links and streams that can be cut.

Engines are without a model, so everything that happens between the parts is real but the wires.
"""

import asyncio
import itertools
import random
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace

from router.gate import Gate
from router.journey import Journey
from router.policy.admission import AdmissionLimits
from router.pools_view import PoolsView
from router.route import Router
from router.telemetry import Telemetry
from tests.support.benches import Bench, break_link, carry_kv
from tests.support.engines import SMALL
from tests.support.virtual_time import LoopClock
from tests.support.workers import settings_of
from tidemill.core import control_pb2 as pb
from tidemill.core import wire
from tidemill.core.messages import StepReport, Tokens
from tidemill.core.metrics import ROUTER_SERIES, Metrics
from tidemill.core.model import Member, Peer, Request, Role
from tidemill.core.settings import EngineSettings
from workers.role_switch import RoleSwitch

STEP_S = 0.02
LINK_S = 0.01  # one message's way


class WiredWorker(Bench):
    """Turns by itself, every step's time, unless it is frozen."""

    def __init__(self, name: str, role: Role, engine: EngineSettings, deadlines: dict[str, float]) -> None:
        super().__init__(role, settings_of(engine, **deadlines), name=name)
        self.loop.detach(1)
        self.clock = LoopClock()  # type: ignore[assignment]
        self.loop._clock = self.clock
        self.frozen_until = 0.0
        self._routers: dict[int, asyncio.Queue[StepReport | None]] = {}

    async def attach(self, commands: AsyncIterator[pb.Command]) -> AsyncGenerator[pb.StepReport, None]:
        queue: asyncio.Queue[StepReport | None] = asyncio.Queue()
        number = max(self._routers, default=1) + 1
        self._routers[number] = queue
        self.loop.attach(number)
        reader = asyncio.create_task(self._read(number, commands))
        try:
            for sequence in itertools.count():
                if (report := await queue.get()) is None:
                    break
                yield wire.report_to_pb(replace(report, sequence=sequence))
        finally:
            reader.cancel()
            del self._routers[number]
            self.mailbox.deliver(lambda: self.loop.detach(number))

    async def _read(self, number: int, commands: AsyncIterator[pb.Command]) -> None:
        async for message in commands:
            command = wire.command_from_pb(message)
            self.mailbox.post(lambda command=command: self.loop.handle(number, command))  # type: ignore[misc]

    def break_streams(self) -> None:
        for queue in self._routers.values():
            queue.put_nowait(None)

    def tick(self, now: float) -> None:
        if now < self.frozen_until:
            return
        self.turn()
        for router, report in self.sent:
            if router in self._routers:
                self._routers[router].put_nowait(report)
        self.sent.clear()

    def turn(self, turns: int = 1, advance_s: float = 0.0) -> None:
        for _ in range(turns):
            self.mailbox.run(0.0)
            self.loop.turn(self.clock.monotonic())
            self.engine.check()

    def begin_switch(self, to: Role, drain_s: float) -> RoleSwitch:
        wish = RoleSwitch(to, drain_s)
        self.mailbox.deliver(lambda: self.loop.begin_switch(wish))
        return wish


class Wired:
    """A router's insides and its workers."""

    def __init__(
        self, roles: list[Role], engine: EngineSettings = SMALL, max_retries: int = 1000, **deadlines: float
    ) -> None:
        self.workers = [WiredWorker(f"worker-{i}", role, engine, deadlines) for i, role in enumerate(roles)]
        self.by_name = {worker.me.id.name: worker for worker in self.workers}
        settings = settings_of(engine, **deadlines)
        settings = settings.model_copy(
            update={
                "router": settings.router.model_copy(update={"max_retries": max_retries}),
                "speculation": settings.speculation.model_copy(update={"enabled": False}),
            }
        )
        self.counters, clock, rng = Metrics(ROUTER_SERIES), LoopClock(), random.Random(0)
        telemetry = Telemetry((5.0,), clock.monotonic())
        self.pools = PoolsView(clock, self._attach, telemetry)
        self.gate = Gate(AdmissionLimits(64, 64), self.counters)
        self.router = Router(settings, self.pools, self.gate, telemetry, self.counters, clock, rng)
        self.lost_messages = 0

    async def _attach(self, address: str, commands: AsyncIterator[pb.Command]) -> AsyncGenerator[pb.StepReport, None]:
        async with aclosing(self.by_name[address].attach(commands)) as reports:
            async for report in reports:
                yield report

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Wired"]:
        """On the way out no worker may hold anything."""
        tasks = [asyncio.create_task(self._turn(worker)) for worker in self.workers]
        tasks.append(asyncio.create_task(self._carry()))
        try:
            members = [Member(Peer(w.me.id, w.me.id.name), w.loop.standing.role) for w in self.workers]
            await self.pools.set_members(members)
            while len(self.pools.snapshot().workers) < len(self.workers):  # noqa: ASYNC110 - virtual time
                await asyncio.sleep(STEP_S)
            yield self
            await self.check_nothing_is_held()
        finally:
            for task in tasks:
                task.cancel()
            done = await asyncio.gather(*tasks, return_exceptions=True)
            await self.router.close()
            await self.pools.close()
        for error in done:
            if isinstance(error, Exception):
                raise error

    async def _turn(self, worker: WiredWorker) -> None:
        while True:
            worker.tick(asyncio.get_running_loop().time())
            await asyncio.sleep(STEP_S)

    async def _carry(self) -> None:
        while True:
            for sender in self.workers:
                for receiver in self.workers:
                    if receiver.loop.role.role is Role.VERIFY and sender is not receiver:
                        carry_kv(sender, receiver, 1)
                for holder, feeder in sender.feeders.items():
                    if feeder.waiting and all(each.me.id != holder for each in self.workers):
                        feeder.break_link("the receiver is gone")
            await asyncio.sleep(LINK_S)

    # --- what goes wrong ----------------------------------------------------------------------------------------

    def break_links(self) -> None:
        for sender in self.workers:
            for receiver in self.workers:
                if receiver.loop.role.role is Role.VERIFY and sender is not receiver:
                    break_link(sender, receiver)

    def lose_messages(self) -> None:
        """What is on its way never comes, and nobody is told."""
        for sender in self.workers:
            for feeder in sender.feeders.values():
                feeder.waiting.clear()
                feeder.backlog_bytes = 0

    # --- requests -----------------------------------------------------------------------------------------------

    async def serve(self, request: Request) -> list[Tokens]:
        now = asyncio.get_running_loop().time()
        got: list[Tokens] = []
        async with aclosing(self.router.serve(Journey(request, now, now + 1e6))) as steps:
            async for some in steps:
                got += some
        return got

    async def check_nothing_is_held(self) -> None:
        for _ in range(2000):
            if all(worker.loop.holds_nothing for worker in self.workers):
                break
            await asyncio.sleep(STEP_S)
        for worker in self.workers:
            assert worker.loop.holds_nothing, (worker.me.id, worker.engine.load())
        assert not any(each._conversations for each in self.pools._workers.values())
        assert not self.router.decoding()
        assert self.gate.active == self.gate.queued == 0
