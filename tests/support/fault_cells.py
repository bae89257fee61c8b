"""python -m tests.support.fault_cells [WORDS...]: run the cells of the matrix, all or those with the words in them.

Two workers of each needed role run as processes, behind proxies that can be cut and slowed; what a fault ended is
replaced before the next. What they show is written to docs/faults.md.
"""

import asyncio
import contextlib
import itertools
import signal
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from benchmarks.delay import DelayedLink
from router.journey import Journey
from router.server import RouterServer
from tests.support.fault_matrix import MATRIX, Cell, Fault, Found, Stage, Target, row
from tests.support.local import ProcessWorker, RouterProcess, member_names, settings_for
from tidemill import AsyncClient, SamplingParams
from tidemill.core import control_pb2 as pb
from tidemill.core.control_pb2_grpc import WorkerStub
from tidemill.core.messages import Tokens
from tidemill.core.model import Member, Peer, Role, WorkerLoad
from tidemill.core.settings import EmulatedSettings, LatencySettings, Settings
from tidemill.core.trace import Stage as At

STALL_S = 2.0
ROLES = tuple(role for role in (Role.PREFILL, Role.DRAFT, Role.VERIFY) for _ in range(2))
STREAMS, ACTIVE = 6, 4  # the rest is queued
DEADLINE_S = 40.0
SLOW_S = 0.1  # each way
LINK_SLOW_S, LINK_SILENT_S = 0.02, 3600.0
WIDEN_S = 0.01  # what comes over a KV link is late by so much, so that a transfer can be struck
PAGE = Path(__file__).parents[2] / "docs" / "faults.md"
MARK = "<!-- what follows is written by `make faults` -->\n"

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
class Answer:
    """One stream, as its client saw it. Times are monotonic seconds."""

    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    error: str = ""

    def longest_gap_s(self, since: float) -> float:
        times = [since, *(at for at in self.times if at > since)]
        return max((b - a for a, b in itertools.pairwise(times)), default=0.0)


def _prompt(index: int) -> tuple[int, ...]:
    return tuple(2 + (i * 13 + index * 101) % 4000 for i in range(280 + 20 * index))


def _params(index: int) -> SamplingParams:
    return SamplingParams(max_tokens=100, ignore_eos=True, seed=index, temperature=(0.0, 0.8)[index % 2])


@dataclass
class Placed:
    """A worker and the way to it."""

    worker: ProcessWorker
    way: DelayedLink
    peer: Peer  # its own address


class Stand:
    """The cluster that the faults are put to."""

    def __init__(self) -> None:
        self.router = RouterServer(SETTINGS)
        self.places: dict[str, Placed] = {}
        self._numbers = itertools.count(len(ROLES))  # of workers that take a killed one's place
        self._journeys: list[Journey] = []
        self._plain: list[Answer] = []
        self._plain_began = 0.0

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
                self._plain_began = time.monotonic()
                self._plain, tasks = self._streams(self._client)
                await asyncio.gather(*tasks)
                assert all(not each.error and len(each.tokens) == 100 for each in self._plain), self._plain
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

    async def _place(self, worker: ProcessWorker) -> None:
        member = await asyncio.to_thread(worker.wait)
        way = await DelayedLink(member.peer.address, 0.0).start()
        self.places[worker.name] = Placed(worker, way, member.peer)

    async def _complete(self) -> None:
        """Until the router has all of them."""
        places = self.places.values()
        await self.router.set_members([Member(Peer(p.peer.id, p.way.address), p.worker.role) for p in places])
        await _until(lambda: len(self.router._pools.snapshot().workers) == len(ROLES), 60)

    @staticmethod
    def _streams(client: AsyncClient) -> tuple[list[Answer], list[asyncio.Task[None]]]:
        """The answers grow until the tasks have ended."""
        answers = [Answer() for _ in range(STREAMS)]
        return answers, [asyncio.create_task(_stream(client, *each)) for each in enumerate(answers)]

    # --- a cell -------------------------------------------------------------------------------------------------

    async def run(self, cell: Cell) -> Found:
        if cell.target is Target.ROUTER:
            return await self._run_at_routers(cell)
        self._journeys.clear()
        if cell.stage is Stage.TRANSFERRING:
            self._links(f"delay {WIDEN_S}")
        if cell.fault is Fault.KILL:  # it takes a while to start
            self._spare = ProcessWorker(f"{cell.target}-{next(self._numbers)}", Role(cell.target), SETTINGS)
        began = time.monotonic()
        answers, tasks = self._streams(self._client)
        victim = await self._chosen(cell)
        struck_at = time.monotonic()
        self._links("heal")  # nothing but the fault is to cost time
        self._strike(cell, victim)
        await asyncio.gather(*tasks)
        await self._heal(cell, victim)
        return self._found(answers, began, struck_at, await self._leaked())

    async def _run_at_routers(self, cell: Cell) -> Found:
        """Two routers of their own serve every other stream each; the one that is struck can serve two at once."""
        members = [Member(each.peer, each.worker.role) for each in self.places.values()]
        routers = [RouterProcess(_router_settings(active), members) for active in (ACTIVE // 2, STREAMS)]
        first, other = [await each.address() for each in routers]
        way = await DelayedLink(first, 0.0).start()
        try:
            async with AsyncClient([way.address, other], stall=STALL_S) as client:
                client._routers._next = 0
                steps = await self._prefill_steps()
                began = time.monotonic()
                answers, tasks = self._streams(client)
                while not await self._has_reached(cell.stage, answers[::2], steps):  # noqa: ASYNC110 - nobody tells
                    await asyncio.sleep(0.005)
                struck_at = time.monotonic()
                _strike_process(cell.fault, routers[0].signal, way)
                await asyncio.gather(*tasks)
            if cell.fault is Fault.STOP:
                routers[0].signal(signal.SIGCONT)
            return self._found(answers, began, struck_at, await self._leaked())
        finally:
            await way.stop()
            for each in routers:
                each.end()

    async def _prefill_steps(self) -> int:
        return sum([(await _load(p.peer)).steps for p in self.places.values() if p.worker.role is Role.PREFILL])

    async def _has_reached(self, stage: Stage, answers: list[Answer], steps: int) -> bool:
        """What is seen of a router from outside: its answers, and how far the prefill workers are."""
        match stage:
            case Stage.QUEUED:  # two are served, and the third waits
                return any([await _held(each.peer) for each in self.places.values()])
            case Stage.PREFILLING:
                return await self._prefill_steps() > steps
            case Stage.TRANSFERRING:  # finished blocks travel while the next are computed
                return await self._prefill_steps() > steps + 4
            case Stage.DECODING:
                return any(each.tokens for each in answers)
            case Stage.VERIFYING:
                return any(len(each.tokens) > 10 for each in answers)

    def _found(self, answers: list[Answer], began: float, struck_at: float, leaked: int) -> Found:
        costs = [
            answer.longest_gap_s(struck_at) - plain.longest_gap_s(self._plain_began + struck_at - began)
            for answer, plain in zip(answers, self._plain, strict=True)
        ]
        return Found(
            sum(bool(each.error) for each in answers),
            sum(not a.error and a.tokens != p.tokens for a, p in zip(answers, self._plain, strict=True)),
            max(0.0, *costs),
            leaked,
            tuple(each.error for each in answers if each.error),
        )

    async def _chosen(self, cell: Cell) -> Placed:
        """The worker that serves the first request to come to the stage; of one that is queued, one it waits for."""
        role = {Target.PREFILL: "prefill_worker", Target.DRAFT: "draft_worker"}.get(cell.target, "verify_worker")
        found: list[str] = []

        def there() -> bool:
            if any(_is_at(cell.stage, each) for each in self._journeys):
                at = [each for each in self._journeys if _is_at(cell.stage, each) and getattr(each, role)]
                found[:] = [getattr(each, role) for each in at or self._journeys if getattr(each, role)]
            return bool(found)

        await _until(there, 60)
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

    async def _leaked(self, patience_s: float = 5.0) -> int:
        """Blocks, leases and requests that are still held after a while, of all workers."""
        ends = time.monotonic() + patience_s
        while True:
            held = sum([await _held(each.peer) for each in self.places.values()])
            if not held or time.monotonic() > ends:
                return held
            await asyncio.sleep(0.05)


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


async def _stream(client: AsyncClient, index: int, answer: Answer) -> None:
    try:
        async for chunk in client.stream(_prompt(index), _params(index), timeout=DEADLINE_S):
            answer.tokens += chunk.tokens
            answer.times.append(time.monotonic())
    except Exception as error:
        answer.error = f"{type(error).__name__}: {error}"


async def _held(peer: Peer) -> int:
    load = await _load(peer)
    return load.kv_blocks_used + load.kv_blocks_leased + load.running_requests + load.queued_requests


async def _load(peer: Peer) -> WorkerLoad:
    async with grpc.aio.insecure_channel(peer.address) as channel:
        load: WorkerLoad = (await WorkerStub(channel).Describe(pb.DescribeRequest())).load
        return load


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


async def _until(true: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "it did not come to that"
        await asyncio.sleep(0.001)


async def run(cells: list[Cell]) -> AsyncIterator[tuple[Cell, Found | None]]:
    async with Stand().running() as stand:
        for cell in cells:
            yield cell, None if cell.not_applicable else await stand.run(cell)


async def main(words: list[str]) -> bool:
    """True if all cells hold. Progress goes to standard output, and each result into the page."""
    cells = [each for each in MATRIX if all(word in (each.target, each.fault, each.stage) for word in words)]
    cells.sort(key=lambda cell: cell.fault is Fault.SLOW)  # what takes long comes last
    results: list[tuple[Cell, Found | None]] = []
    async with aclosing(run(cells)) as running:
        async for cell, found in running:
            results.append((cell, found))
            print(f"{len(results):>3}/{len(cells)} {row(cell, found, STALL_S)}", flush=True)
            write(results[-1:])
    return all(found is None or found.holds(cell, STALL_S) for cell, found in results)


def write(results: list[tuple[Cell, Found | None]]) -> None:
    """Into the page, below what is written by hand, in place of what these cells showed before."""
    by_hand, _, written = PAGE.read_text().partition(MARK)
    rows = {_where(line): line for line in written.splitlines() if line.startswith("| ")}
    rows |= {_where(line): line for line in (row(cell, found, STALL_S) for cell, found in results)}
    known = [rows[where] for where in (_where(row(cell, None, STALL_S)) for cell in MATRIX) if where in rows]
    ran, broken = sum("n/a" not in each for each in known), sum("**broken**" in each for each in known)
    said = f"\n{ran} of {len(MATRIX)} cells ran, {broken} broken; stall limit {STALL_S:g} s.\n\n"
    head = "| struck | fault | stage | failed | changed | recovery s | leaked | verdict |\n"
    head += "|---|---|---|--:|--:|--:|--:|---|\n"
    PAGE.write_text(by_hand + MARK + said + head + "\n".join(known) + "\n")


def _where(line: str) -> tuple[str, ...]:
    return tuple(line.split(" | ")[:3])


if __name__ == "__main__":
    sys.exit(not asyncio.run(main(sys.argv[1:])))
