"""All Ray placement and actor calls: workers and routers are plain classes, wrapped here as actors.

Actors are named and detached: they outlive the process that made them, and the controller finds them again by name.
"""

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.autoscaler.sdk import request_resources
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster import preimported
from cluster.head import free_port
from tidemill.core.model import Member, Peer, Role, WorkerId
from tidemill.core.picture import Outlook
from tidemill.core.settings import Settings
from tidemill.core.telemetry import DecisionRecord, Decoding, RouterTelemetry
from tidemill.core.trace import Trace

log = logging.getLogger(__name__)

ROUTER, CONTROLLER = "router", "controller"
DESCRIBE_TIMEOUT_S = 1.0
LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """What a worker actor says of itself."""

    peer: Peer
    role: Role
    pid: int
    metrics_address: str
    residual: int = 0  # tokens of work that must be finished or moved before it is free
    leaving: bool = False  # takes no more, and goes when it has drained
    retired: bool = False  # has drained: may be ended
    becoming: Role | None = None  # on its way to another role, whoever sent it there


class WorkerActor:
    """Holds one workers.Worker. Ray restarts it when its process dies; it then comes back under a new epoch."""

    def __init__(self, name: str, role: str, settings: Settings) -> None:
        _log_to_stderr()
        host = ray.util.get_node_ip_address() if settings.network.tls else LOOPBACK
        from workers.worker import Worker  # noqa: PLC0415 - torch is imported where the accelerator is

        self._worker = Worker(name, Role(role), settings, host=host)
        self._worker.start()
        self._retirement: Future[None] | None = None

    def describe(self) -> WorkerReport:
        about, retirement = self._worker.describe(), self._retirement
        load = about.load
        return WorkerReport(
            about.peer,
            about.role,
            os.getpid(),
            about.metrics_address,
            load.queued_tokens + (load.kv_blocks_used + load.kv_blocks_leased) * load.block_size,
            retirement is not None,
            retirement is not None and retirement.done() and not retirement.exception(),
            about.becoming,
        )

    def set_role(self, role: str, drain_s: float | None = None) -> WorkerReport:
        """Raises whatever made the switch fail; the worker then goes on in its old role."""
        self._worker.set_role(Role(role), drain_s).result()
        return self.describe()

    def retire(self) -> None:
        """Take no more, drain, and wait to be ended. Asked twice, it does it once, or tries again."""
        if self._retirement is None or (self._retirement.done() and self._retirement.exception()):
            self._retirement = self._worker.retire()

    def stop(self) -> None:
        self._worker.stop()


class RouterActor:
    """Holds one router.RouterServer on the actor's own event loop. Ray restarts it when its process dies; it then
    listens where it did, as soon as the controller tells it who the members are.
    """

    def __init__(self, settings: Settings) -> None:
        _log_to_stderr()
        from router.server import RouterServer  # noqa: PLC0415 - as above

        self._server = RouterServer(settings)
        self._drain_s = settings.deadlines.drain_s
        self._started: asyncio.Task[str] | None = None

    async def start(self) -> str:
        """Listen, if it does not yet; returns the address."""
        if self._started is None:
            self._started = asyncio.create_task(self._server.start())
        return await self._started

    async def set_members(self, members: Sequence[Member]) -> None:
        """One that Ray restarted listens from then on: before, it could serve nobody."""
        await self.start()
        await self._server.set_members(members)

    async def telemetry(self) -> RouterTelemetry:
        return self._server.telemetry()

    async def held(self) -> list[Decoding]:
        return self._server.held()

    async def level(self, request_id: str, to: WorkerId) -> None:
        from router.moves import MoveReason  # noqa: PLC0415 - as above

        await self._server.move(request_id, to, MoveReason.LEVEL)

    async def set_decisions(self, decisions: Sequence[DecisionRecord]) -> None:
        self._server.set_decisions(decisions)

    async def outlook(self) -> Outlook:
        return self._server.outlook()

    async def trace(self, request_id: str) -> Trace | None:
        return self._server.trace(request_id)

    async def latest_traces(self) -> list[Trace]:
        return self._server.latest_traces()

    async def describe(self) -> dict[str, Any]:
        return self._server.describe() | {"pid": os.getpid()}

    async def stop(self) -> None:
        """Requests that run may end within the time a drain may take."""
        await self._server.stop(self._drain_s)


def _log_to_stderr() -> None:
    """Into the actor's log file, which `tidemill status` names."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")


class Pools:
    """Makes and finds the actors of one cluster; the current process must be connected to Ray."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def start_routers(self) -> dict[str, ActorHandle]:
        """All replicas, by name; their first answer comes when they listen."""
        return {
            router_name(index): self._start_router(router_name(index), of_replica(self._settings, index))
            for index in range(self._settings.router.replicas)
        }

    def _start_router(self, name: str, settings: Settings) -> ActorHandle:
        actor = ray.remote(RouterActor).options(
            name=name, lifetime="detached", num_cpus=0, max_restarts=-1, max_concurrency=64, scheduling_strategy=here()
        )
        return actor.remote(settings)

    def start_worker(self, name: str, role: Role) -> ActorHandle:
        """The actor loads its model in the background; its first answer comes when it serves."""
        options = self._settings.ray
        actor = ray.remote(WorkerActor).options(
            name=name,
            lifetime="detached",
            num_cpus=options.cpus_per_worker,
            num_gpus=options.gpus_per_worker,
            resources=options.resources.get(role, {}),
            scheduling_strategy="SPREAD",  # the loss of a node costs a part of each pool
            max_restarts=options.max_restarts,
            max_concurrency=4,
            runtime_env=self._runtime_env(role),
        )
        return actor.remote(name, str(role), self._settings)

    def _runtime_env(self, role: Role) -> dict[str, Any]:
        """Engines take long to import, so workers' processes are forked from one that has done so."""
        on_vllm = self._settings.engine.kind == "vllm" and role is not Role.DRAFT
        return {
            "env_vars": {"OMP_NUM_THREADS": str(self._settings.threads_of(role))},
            "py_executable": preimported.executable("vllm" if on_vllm else "native"),
        }

    def request_room(self, workers: int) -> None:
        """Have Ray's autoscaler keep nodes for so many workers; without reservations there is nothing to ask for."""
        options = self._settings.ray
        bundle = {"CPU": options.cpus_per_worker, "GPU": options.gpus_per_worker}
        needed = {resource: amount for resource, amount in bundle.items() if amount}
        if needed:
            request_resources(bundles=[needed] * workers)

    def first_workers(self) -> list[tuple[str, Role]]:
        """Name and role of every worker the settings ask for."""
        counts = self._settings.pools
        roles = {Role.PREFILL: counts.prefill, Role.DRAFT: counts.draft, Role.VERIFY: counts.verify}
        return [(f"{role}-{index}", role) for role, count in roles.items() for index in range(count)]


def of_replica(settings: Settings, index: int, free: Callable[[], int] = free_port) -> Settings:
    """The settings of one router: ports of its own, and the one for clients fixed, so that it comes back there."""

    def after(port: int) -> int:
        return port + index if port else 0

    router, metrics, page = settings.router, settings.metrics, settings.status_page
    return settings.model_copy(
        update={
            "router": router.model_copy(update={"port": after(router.port) or free()}),
            "metrics": metrics.model_copy(update={"router_port": after(metrics.router_port)}),
            "status_page": page.model_copy(update={"port": after(page.port)}),
        }
    )


def here() -> NodeAffinitySchedulingStrategy:
    """On this process' node: the address of clients, and the files of secrets and targets, are the head's."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def first_role(name: str) -> Role:
    """The one that the worker of this name is started, and restarted, in."""
    return Role(name.rpartition("-")[0])


def find(name: str) -> ActorHandle:
    """A named actor. Raises ValueError if there is none."""
    return ray.get_actor(name)


def router_name(index: int) -> str:
    return f"{ROUTER}-{index}"


def router_names() -> list[str]:
    """Of all routers of this cluster."""
    return [name for name in _named_actors() if name.startswith(ROUTER)]


def worker_names() -> list[str]:
    """Of all workers of this cluster, whatever state they are in."""
    return [name for name in _named_actors() if name != CONTROLLER and not name.startswith(ROUTER)]


def _named_actors() -> list[str]:
    return sorted(ray.util.list_named_actors())


def describe_workers(names: Sequence[str]) -> dict[str, WorkerReport | None]:
    """What each worker says; None where it says nothing in time or is being restarted."""
    asked: dict[Any, str] = {}
    for name in names:
        with contextlib.suppress(ValueError):
            asked[find(name).describe.remote()] = name
    reports: dict[str, WorkerReport | None] = dict.fromkeys(names)
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=DESCRIBE_TIMEOUT_S) if asked else ([], [])
    for reference in answered:
        with contextlib.suppress(RayError):
            reports[asked[reference]] = ray.get(reference)
    return reports
