"""A router between a real client and scripted workers, all in this event loop, over gRPC on loopback."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass

from router.server import RouterServer
from tests.support.scripted_worker import Behaviour, ScriptedWorker, obliging_verify
from tidemill import AsyncClient
from tidemill.core import metrics
from tidemill.core.messages import Command, Event
from tidemill.core.model import Role
from tidemill.core.settings import Settings

SHORT, LONG = [7] * 5, [7] * 100  # prefilled in place, and elsewhere


async def started(settings: Settings, *workers: ScriptedWorker) -> RouterServer:
    """A router that hears these workers, which have started."""
    router = RouterServer(settings)
    await router.start()
    await router.set_members([each.member for each in workers])
    while len(router._pools.snapshot().workers) < len(workers):  # noqa: ASYNC110 - tests poll
        await asyncio.sleep(0.005)
    return router


@dataclass
class Stage:
    """A router, its workers and a client that does not retry."""

    router: RouterServer
    client: AsyncClient
    workers: list[ScriptedWorker]

    def count(self, series: metrics.Series, **labels: str) -> float:
        return self.router.metrics.value(series, **labels)

    async def until(self, what: Callable[[], bool], timeout_s: float = 5.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not what():
            assert time.monotonic() < deadline, "it did not come about"
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def stage(settings: Settings, *workers: ScriptedWorker) -> AsyncIterator[Stage]:
    """On the way out the router must be empty and every request it began must have been counted."""
    router = RouterServer(settings)
    address = await router.start()
    try:
        await router.set_members([await worker.start() for worker in workers])
        async with AsyncClient(address, retries=0, timeout=10.0) as client:
            it = Stage(router, client, list(workers))
            await it.until(lambda: len(router._pools.snapshot().workers) == len(workers))
            yield it
            await it.until(lambda: router.describe()["active"] == router.describe()["queued"] == 0)
        assert not router._servicer._active
        assert not any(each._conversations for each in router._pools._workers.values())
    finally:
        await router.stop(0.0)
        for worker in workers:
            await worker.stop()


def verify(name: str = "verify-0", on: Behaviour | None = None) -> ScriptedWorker:
    worker = ScriptedWorker(name, Role.VERIFY)
    worker.on = on or obliging_verify(worker)
    return worker


def silent(_: Command) -> Iterable[Event]:
    return ()
