"""Processes that faults are put to: two workers of each needed role behind proxies that can be cut and slowed.

What a fault ended is replaced before the next.
"""

import asyncio
import contextlib
import itertools
import signal
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass

from benchmarks.delay import DelayedLink
from router.journey import Journey
from router.server import RouterServer
from tests.support.fault_matrix import Cell, Fault, Found, Stage, Target
from tests.support.fault_streams import ACTIVE, STREAMS, Streams, Watch, leaked_by, until
from tests.support.local import ProcessWorker, RouterProcess, member_names, settings_for
from tidemill import AsyncClient
from tidemill.core.messages import Tokens
from tidemill.core.model import Member, Peer, Role
from tidemill.core.settings import EmulatedSettings, LatencySettings, Settings
from tidemill.core.trace import Stage as At

STALL_S = 2.0
ROLES = tuple(role for role in (Role.PREFILL, Role.DRAFT, Role.VERIFY) for _ in range(2))
SLOW_S = 0.1  # each way
LINK_SLOW_S, LINK_SILENT_S = 0.02, 3600.0
WIDEN_S = 0.01  # what comes over a KV link is late by so much, so that a transfer can be struck

SETTINGS = settings_for(
    "emulated",
    max_batch_tokens=16,
    prefix_cache=False,
    router={"max_active": ACTIVE},
    deadlines={"stall_s": STALL_S},
    emulated=EmulatedSettings(target=LatencySettings(step_s=0.01), draft=LatencySettings(step_s=0.002)),
)


def _router_settings(active: int) -> Settings:
    return SETTINGS.model_copy(update={"router": SETTINGS.router.model_copy(update={"max_active": active})})


@dataclass
class Placed:
    """A worker and the way to it."""

    worker: ProcessWorker
    way: DelayedLink
    peer: Peer  # its own address

    @property
    def member(self) -> Member:
        return Member(self.peer, self.worker.role)


class Stand:
    """The cluster that the faults are put to."""

    def __init__(self) -> None:
        self.router = RouterServer(SETTINGS)
        self.places: dict[str, Placed] = {}
        self._numbers = itertools.count(len(ROLES))  # of workers that take a killed one's place
        self._journeys: list[Journey] = []

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["Stand"]:
        address = await self.router.start()
        self._watch_journeys()
        try:
            started = [ProcessWorker(name, role, SETTINGS) for name, role in member_names(ROLES)]
            for worker in started:
                await self._place(worker)
            await self._complete()
            async with AsyncClient(address, retries=0) as self._client:
                self._plain = await Streams.undisturbed(self._client)
                yield self
        finally:
            await self.router.stop(0.1)
            for each in self.places.values():
                each.worker.end()
                await each.way.stop()

    def _watch_journeys(self) -> None:
        serve = self.router._router.serve

        def watched(journey: Journey) -> AsyncGenerator[list[Tokens], None]:
            self._journeys.append(journey)
            return serve(journey)

        self.router._router.serve = watched  # type: ignore[method-assign]

    @property
    def members(self) -> list[Member]:
        return [each.member for each in self.places.values()]

    async def _place(self, worker: ProcessWorker) -> None:
        member = await asyncio.to_thread(worker.wait)
        way = await DelayedLink(member.peer.address, 0.0).start()
        self.places[worker.name] = Placed(worker, way, member.peer)

    async def _complete(self) -> None:
        """Until the router has all of them."""
        places = self.places.values()
        await self.router.set_members([Member(Peer(p.peer.id, p.way.address), p.worker.role) for p in places])
        await until(lambda: len(self.router._pools.snapshot().workers) == len(ROLES), 60)

    # --- a cell -------------------------------------------------------------------------------------------------

    async def run(self, cell: Cell) -> Found:
        if cell.target is Target.ROUTER:
            return await self._run_at_routers(cell)
        self._journeys.clear()
        if cell.stage is Stage.TRANSFERRING:
            self._links(f"delay {WIDEN_S}")
        if cell.fault is Fault.KILL:  # it takes a while to start
            self._spare = ProcessWorker(f"{cell.target}-{next(self._numbers)}", Role(cell.target), SETTINGS)
        streams = Streams(self._client)
        victim = await self._chosen(cell)
        struck_at = time.monotonic()
        self._links("heal")  # nothing but the fault is to cost time
        self._strike(cell, victim)
        await streams.ended()
        await self._heal(cell, victim)
        return streams.found(self._plain, struck_at, await leaked_by(self.members))

    async def _run_at_routers(self, cell: Cell) -> Found:
        """Two routers of their own serve every other stream each; the one that is struck can serve two at once."""
        routers = [RouterProcess(_router_settings(active), self.members) for active in (ACTIVE // 2, STREAMS)]
        first, other = [await each.address() for each in routers]
        way = await DelayedLink(first, 0.0).start()
        try:
            async with AsyncClient([way.address, other], stall=STALL_S) as client:
                client._routers._next = 0
                watch = Watch(self.members)
                await watch.begin()
                streams = Streams(client)
                await watch.until(cell.stage, streams.answers[::2])
                struck_at = time.monotonic()
                _strike_process(cell.fault, routers[0].signal, way)
                await streams.ended()
            if cell.fault is Fault.STOP:
                routers[0].signal(signal.SIGCONT)
            return streams.found(self._plain, struck_at, await leaked_by(self.members))
        finally:
            await way.stop()
            for each in routers:
                each.end()

    async def _chosen(self, cell: Cell) -> Placed:
        """The worker that serves the first request to come to the stage; of one that is queued, one it waits for."""
        role = {Target.PREFILL: "prefill_worker", Target.DRAFT: "draft_worker"}.get(cell.target, "verify_worker")
        found: list[str] = []

        def there() -> bool:
            if any(_is_at(cell.stage, each) for each in self._journeys):
                at = [each for each in self._journeys if _is_at(cell.stage, each) and getattr(each, role)]
                found[:] = [getattr(each, role) for each in at or self._journeys if getattr(each, role)]
            return bool(found)

        await until(there, 60)
        return self.places[found[0].partition("@")[0]]

    def _links(self, how: str) -> None:
        for each in self.places.values():
            if each.worker.role is Role.VERIFY:
                each.worker.trouble_links(how)

    def _strike(self, cell: Cell, victim: Placed) -> None:
        match cell.target, cell.fault:
            case Target.LINK, Fault.STOP:
                victim.worker.trouble_links(f"delay {LINK_SILENT_S}")
            case Target.LINK, Fault.SLOW:
                victim.worker.trouble_links(f"delay {LINK_SLOW_S}")
            case Target.LINK, _:
                victim.worker.trouble_links("cut")
            case _:
                _strike_process(cell.fault, victim.worker.signal, victim.way)

    async def _heal(self, cell: Cell, victim: Placed) -> None:
        victim.way.delay_s = 0.0
        if cell.fault is Fault.KILL:
            del self.places[victim.worker.name]
            victim.worker.end()
            await victim.way.stop()
            await self._place(self._spare)
        elif cell.fault is Fault.STOP and cell.target is not Target.LINK:
            victim.worker.signal(signal.SIGCONT)
        self._links("heal")
        await self._complete()


def _strike_process(fault: Fault, send: Callable[[signal.Signals], None], way: DelayedLink) -> None:
    match fault:
        case Fault.KILL:
            send(signal.SIGKILL)
        case Fault.STOP:
            send(signal.SIGSTOP)
        case Fault.CUT:
            way.cut()
        case Fault.SLOW:
            way.delay_s = SLOW_S


def _is_at(stage: Stage, journey: Journey) -> bool:
    at = journey.stages[-1].stage
    match stage:
        case Stage.QUEUED:
            return at is At.QUEUE and not journey.attempts
        case Stage.PREFILLING:
            return at is At.PREFILL
        case Stage.TRANSFERRING:
            return at is At.FIRST and bool(journey.prefill_worker)
        case Stage.DECODING:
            return len(journey.sent) > 0
        case Stage.VERIFYING:
            return journey.drafted > 0
