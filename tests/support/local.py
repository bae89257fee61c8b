"""A cluster without Ray: a router in this event loop, workers in this process or in processes of their own."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from router.server import RouterServer
from tests.support import router_process, worker_process
from tests.support.forked import Forked
from tidemill import AsyncClient
from tidemill.core.model import Member, Peer, Role
from tidemill.core.settings import (
    DeadlineSettings,
    EmulatedSettings,
    EngineSettings,
    ModelSettings,
    PoolSettings,
    RouterSettings,
    Settings,
    SpeculationSettings,
)
from workers.loop import EngineLoop
from workers.worker import Worker

MODELS = Path(__file__).parents[2] / "models"
ALL_ROLES = (Role.PREFILL, Role.DRAFT, Role.VERIFY, Role.VERIFY)


def settings_for(
    kind: str = "emulated",
    *,
    speculation: bool = True,
    router: dict[str, object] | None = None,
    deadlines: dict[str, float] | None = None,
    emulated: EmulatedSettings | None = None,
    **engine: object,
) -> Settings:
    """Small pools; drafts are waited for long enough to be used on a busy machine."""
    return Settings(
        name="test",
        target=ModelSettings(path=MODELS / "target", name="tiny"),
        draft=ModelSettings(path=MODELS / "draft"),
        engine=EngineSettings(kind=kind, **({"kv_blocks": 512} | engine)),  # type: ignore[arg-type]
        emulated=emulated or EmulatedSettings(),
        pools=PoolSettings(),
        router=RouterSettings(**({"port": 0} | (router or {}))),  # type: ignore[arg-type]
        speculation=SpeculationSettings(enabled=speculation, adaptive=False, wait_s=0.2),
        deadlines=DeadlineSettings(**(deadlines or {})),
    )


def member_names(roles: Sequence[Role]) -> list[tuple[str, Role]]:
    counts: dict[Role, int] = {}
    names = []
    for role in roles:
        names.append((f"{role}-{counts.get(role, 0)}", role))
        counts[role] = counts.get(role, 0) + 1
    return names


@dataclass
class LocalCluster:
    """Workers are reachable as objects (`workers`), so that tests can look inside."""

    router: RouterServer
    address: str
    workers: list[Worker] = field(default_factory=list)
    members: list[Member] = field(default_factory=list)

    async def settled(self, what: Callable[[], bool], timeout_s: float = 20.0) -> None:
        """Wait until something is so; fails if it does not become so."""
        deadline = time.monotonic() + timeout_s
        while not what():
            assert time.monotonic() < deadline, "it did not settle"
            await asyncio.sleep(0.01)

    async def nothing_held(self) -> None:
        """No block, no lease and no request anywhere; a cluster that leaks fails here."""

        def clean(loop: EngineLoop) -> bool:
            loop.engine.check()  # type: ignore[attr-defined]
            return loop.holds_nothing

        await self.settled(lambda: all(worker.on_engine_thread(clean).result() for worker in self.workers))
        await self.settled(lambda: self.router.describe()["active"] == self.router.describe()["queued"] == 0)


@contextlib.asynccontextmanager
async def local_cluster(settings: Settings, roles: Sequence[Role] = ALL_ROLES) -> AsyncIterator[LocalCluster]:
    """Everything in this process. On the way out it must hold nothing."""
    router = RouterServer(settings)
    cluster = LocalCluster(router, await router.start())
    try:
        for name, role in member_names(roles):
            worker = Worker(name, role, settings)
            cluster.members.append(Member(worker.start(), role))
            cluster.workers.append(worker)
        await router.set_members(cluster.members)
        await cluster.settled(lambda: len(router._pools.snapshot().workers) == len(roles))
        yield cluster
        await cluster.nothing_held()
    finally:
        await router.stop(0.1)
        for worker in cluster.workers:
            await asyncio.to_thread(worker.stop)


class ProcessWorker(Forked):
    """A worker in a process of its own, which can be killed."""

    def __init__(self, name: str, role: Role, settings: Settings, core: int | None = None) -> None:
        """`core`: the only one it runs on."""
        self.name, self.role = name, role
        self.peer: Peer | None = None
        super().__init__(worker_process.serve, name, role, settings, core)

    def wait(self) -> Member:
        """Until it serves."""
        self.peer = self.said()
        return Member(self.peer, self.role)

    def trouble_links(self, how: str) -> None:
        """Of the KV that comes to it; see worker_process."""
        self.connection.send(how)


class RouterProcess(Forked):
    """A router in a process of its own, which can be killed and stopped."""

    def __init__(self, settings: Settings, members: Iterable[Member]) -> None:
        super().__init__(router_process.serve, settings, list(members))

    async def address(self) -> str:
        return str(await asyncio.to_thread(self.said))


@contextlib.asynccontextmanager
async def process_cluster(
    settings: Settings, roles: Sequence[Role] = ALL_ROLES, reached: Callable[[Member], Awaitable[Member]] | None = None
) -> AsyncIterator[tuple[AsyncClient, RouterServer, list[ProcessWorker]]]:
    """Workers in processes of their own; (client, router, workers). `reached` may put another address in a worker's
    place, by which all others know it then."""
    workers = [ProcessWorker(name, role, settings) for name, role in member_names(roles)]
    router = RouterServer(settings)
    address = await router.start()
    try:
        members = [await asyncio.to_thread(worker.wait) for worker in workers]
        await router.set_members([await reached(each) for each in members] if reached else members)
        deadline = time.monotonic() + 10
        while len(router._pools.snapshot().workers) < len(roles):
            assert time.monotonic() < deadline, "the workers do not answer"
            await asyncio.sleep(0.02)
        async with AsyncClient(address) as client:
            yield client, router, workers
    finally:
        await router.stop(0.1)
        for worker in workers:
            worker.end()
