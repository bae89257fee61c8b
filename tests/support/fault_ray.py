"""Actors that faults are put to: a cluster on Ray with a router, its controller and four workers.

Workers that a fault ended are not restarted by Ray: who is there has to take their place. Between two cells the pools
are filled again.
"""

import asyncio
import contextlib
import itertools
import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from cluster import launch
from cluster.launch import ray  # by this way, because it must not be imported before `cluster`
from cluster.pools import CONTROLLER, Pools, WorkerReport, describe_workers, find, router_names, worker_names
from tests.support.fault_matrix import Cell, Fault, Found, Target
from tests.support.fault_stand import SETTINGS, SLOW_S
from tests.support.fault_streams import Streams, Watch, leaked_by
from tests.support.processes import cut_connections, standing_still, stuttering
from tidemill import AsyncClient
from tidemill.core.model import Member, Role
from tidemill.core.settings import ControllerSettings, PoolSettings, RaySettings

Staff = Mapping[Role, int]
ONE_VERIFY: Staff = {Role.PREFILL: 2, Role.DRAFT: 1, Role.VERIFY: 1}
TWO_VERIFY: Staff = {Role.PREFILL: 1, Role.DRAFT: 1, Role.VERIFY: 2}
STAFF: Mapping[Target, Staff] = {
    Target.CONTROLLER: TWO_VERIFY,
    Target.LAST_PREFILL: TWO_VERIFY,
    Target.LAST_DRAFT: TWO_VERIFY,
    Target.LAST_VERIFY: ONE_VERIFY,
}
LAST_OF = {Target.LAST_PREFILL: Role.PREFILL, Target.LAST_DRAFT: Role.DRAFT, Target.LAST_VERIFY: Role.VERIFY}
FEW_NODES = 4  # of a draft: a step of 16 rows has some left for prompts, where verify workers compute them
RUNS_S = 0.01  # of a slow process, between two times that it stands still
PATIENCE_S = 60.0

ON_RAY = SETTINGS.model_copy(
    update={
        "name": "faults",
        "pools": PoolSettings(prefill=1, draft=1, verify=2),
        "speculation": SETTINGS.speculation.model_copy(update={"max_nodes": FEW_NODES}),
        "controller": ControllerSettings(rebalance=False),  # it heals
        "ray": RaySettings(max_restarts=0),
    }
)


class RayStand:
    """The cluster that the faults are put to."""

    client: AsyncClient

    def __init__(self) -> None:
        self._pools = Pools(ON_RAY)
        self._numbers = itertools.count(ON_RAY.pools.verify)  # of workers that take a lost one's place
        self._router: Any = None

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["RayStand"]:
        with tempfile.TemporaryDirectory(prefix="tidemill-state-") as folder, _state_in(folder):
            self.state = launch.up(ON_RAY, _silent)
            try:
                self._router = find(router_names()[0])
                async with AsyncClient(self.state.router_address, retries=0) as self.client:
                    self.plain = await Streams.undisturbed(self.client)
                    yield self
            finally:
                launch.down(self.state, _silent)

    # --- a cell -------------------------------------------------------------------------------------------------

    async def run(self, cell: Cell) -> Found:
        members = await self.staffed(STAFF[cell.target])
        victim = await self.pid_of(cell.target)
        watch = Watch(members)
        await watch.begin()
        streams = Streams(self.client)
        await watch.until(cell.stage, streams.answers)
        struck_at = time.monotonic()
        async with struck(cell.fault, victim):
            await streams.ended()
        await self.controller_answers(other_than=victim if cell.fault is Fault.KILL else None)
        return streams.found(self.plain, struck_at, await leaked_by(await self.members()))

    async def pid_of(self, target: Target) -> int:
        if target is Target.CONTROLLER:
            return await self.controller_answers()
        (found,) = [each.pid for each in (await self.reports()).values() if each.role is LAST_OF[target]]
        return found

    async def controller_answers(self, other_than: int | None = None) -> int:
        """Its process, once it knows all workers; with `other_than`, of the one that Ray started after that."""

        async def pid() -> int | None:
            said = await find(CONTROLLER).describe.remote()
            known: dict[str, WorkerReport | None] = await find(CONTROLLER).reports.remote()
            complete = set(known) == set(worker_names()) and all(known.values())
            return said["pid"] if complete and said["pid"] != other_than else None

        return await _answer(pid)

    # --- who is there -------------------------------------------------------------------------------------------

    async def reports(self) -> dict[str, WorkerReport]:
        """By name, once all say something."""

        async def complete() -> dict[str, WorkerReport] | None:
            reports = await asyncio.to_thread(lambda: describe_workers(worker_names()))
            known = {name: each for name, each in reports.items() if each is not None}
            return known if len(known) == len(reports) else None

        return await _answer(complete)

    async def members(self) -> list[Member]:
        return [Member(each.peer, each.role) for each in (await self.reports()).values()]

    async def staffed(self, wanted: Staff) -> list[Member]:
        """The workers, once there are so many of each role, and the router has them."""
        spare = []
        missing = Counter(wanted)
        for name, report in (await self.reports()).items():
            if missing[report.role]:
                missing[report.role] -= 1
            else:
                spare.append(name)
        changes = []
        for role in missing.elements():
            if spare:
                changes.append(find(spare.pop()).set_role.remote(str(role)))
            else:
                changes.append(self._pools.start_worker(f"{role}-{next(self._numbers)}", role).describe.remote())
        await asyncio.gather(*changes)
        await self.router_has(wanted)
        return await self.members()

    async def router_has(self, wanted: Staff) -> None:
        """All of them, and nobody else, serving."""

        async def complete() -> bool:
            seen = (await self._router.describe.remote())["workers"]
            roles = Counter(Role(each["role"]) for each in seen if each["state"] == "serving")
            return len(seen) == roles.total() and roles == Counter(wanted)

        await _answer(complete)


@contextlib.asynccontextmanager
async def struck(fault: Fault, pid: int) -> AsyncIterator[None]:
    """Inside, what the fault does to the process lasts."""
    async with contextlib.AsyncExitStack() as lasting:
        match fault:
            case Fault.KILL:
                os.kill(pid, signal.SIGKILL)
            case Fault.STOP:
                await lasting.enter_async_context(standing_still(pid))
            case Fault.CUT:
                assert cut_connections(pid), "it has no connection"
            case Fault.SLOW:
                await lasting.enter_async_context(stuttering(pid, SLOW_S, RUNS_S))
        yield


async def _answer(ask: Callable[[], Any]) -> Any:
    """The first that is something; an actor that is gone, or being restarted, is asked again."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        with contextlib.suppress(ray.exceptions.RayError, ValueError):
            if answer := await ask():
                return answer
        assert time.monotonic() < deadline, "it did not come to that"
        await asyncio.sleep(0.05)


@contextlib.contextmanager
def _state_in(folder: str) -> Any:
    """The state file goes to a folder of its own."""
    before = os.environ.get("XDG_STATE_HOME")
    os.environ["XDG_STATE_HOME"] = folder
    try:
        yield
    finally:
        if before is None:
            del os.environ["XDG_STATE_HOME"]
        else:
            os.environ["XDG_STATE_HOME"] = before


def _silent(_line: str) -> None:
    pass
