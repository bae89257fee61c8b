"""The wave of benchmarks/roles.py on a real cluster: Ray actors, a router, a controller, gRPC streams, KV links."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from benchmarks.roles import GOALS, OUTPUTS, PROMPTS, WARM_S, WORKERS, Way
from benchmarks.roles_plots import Run, Served
from cluster.bench.arrivals import Arrival as Due
from cluster.bench.drive import Driver
from cluster.bench.report import lateness
from cluster.bench.summary import OK, failures
from cluster.launch import ClusterState, asking_routers, down, up
from cluster.sim.cluster import Look
from cluster.sim.traffic import Arrival
from cluster.sim.worker import OPT_13B_80GB
from tests.support.local import MODELS
from tidemill import AsyncClient, Slo
from tidemill.core.model import Role
from tidemill.core.settings import (
    ControllerSettings,
    EmulatedSettings,
    EngineSettings,
    LatencySettings,
    ModelSettings,
    PoolSettings,
    RouterSettings,
    Settings,
    SloSettings,
    SpeculationSettings,
)

VOCABULARY, CONTEXT = 512, 8192
LOOK_S = 1.0
IN_FLIGHT, TIMEOUT_S = 4096, 120.0


def settings_of(way: Way, stretch: float) -> Settings:
    """The simulator's workers and goals, `stretch` times as slow."""
    hardware = OPT_13B_80GB
    return Settings(
        name="roles",
        target=ModelSettings(path=MODELS / "target", name="opt-13b"),
        engine=EngineSettings(
            kind="emulated",
            kv_blocks=hardware.kv_tokens // 16,
            block_size=16,
            max_batch_tokens=way.chunk or hardware.max_batch_tokens,
            max_running=hardware.max_running,
            prefix_cache=False,
        ),
        emulated=EmulatedSettings(
            target=LatencySettings(model="opt-13b", scale=stretch), vocab_size=VOCABULARY, context_length=CONTEXT
        ),
        pools=PoolSettings(prefill=way.prefill, draft=0, verify=WORKERS - way.prefill),
        router=RouterSettings(port=0, max_active=1024, max_queued=512),
        speculation=SpeculationSettings(enabled=False),
        controller=ControllerSettings(rebalance=way.live),
        slo={GOALS.name: SloSettings(ttft_s=GOALS.ttft_s * stretch, tpot_s=GOALS.tpot_s * stretch)},
    )


def serve(way: Way, arrivals: Sequence[Arrival], stretch: float, console: Console) -> Run:
    """Bring a cluster up, serve, and take it down again. Raises LaunchError."""
    settings = settings_of(way, stretch)
    state = up(settings, lambda _: None)
    try:
        run, told = asyncio.run(_serve(way, arrivals, settings, state))
    finally:
        down(state, lambda _: None)
    shares = "  ".join(f"{name} {run.attainment(WARM_S, name):.1%}" for name in (PROMPTS.name, OUTPUTS.name))
    console.print(f"{way.name:>14}  all {run.attainment(WARM_S):.1%}  {shares}  {told}", highlight=False)
    for at_s, what, reason in run.changes:
        console.print(f"{at_s:21.1f} s  {reason}: {what}", highlight=False)
    return run


async def _serve(way: Way, arrivals: Sequence[Arrival], settings: Settings, state: ClusterState) -> tuple[Run, str]:
    """The run, and what went wrong in it."""
    due = [Due(each.at_s, each.prompt_tokens, each.output_tokens, GOALS.name) for each in arrivals]
    looks: list[Look] = []
    changes: dict[float, tuple[str, str]] = {}
    async with AsyncClient(state.router_address, retries=0) as client:
        driver = Driver(client, VOCABULARY, 0.0, max_in_flight=IN_FLIGHT, timeout_s=TIMEOUT_S, seed=0)
        began, over = time.time(), asyncio.Event()
        looking = asyncio.create_task(_look(state, looks, changes, over))
        await driver.run(due)
        over.set()
        await looking
    goal = Slo(settings.slo[GOALS.name].ttft_s, settings.slo[GOALS.name].tpot_s)
    phases = [each.phase for each in arrivals]
    served = [Served(each.arrival.at_s, phases[each.number], each.attains(goal)) for each in driver.exchanges]
    failed = ", ".join(f"{count} {kind}" for kind, count in failures(driver.exchanges).items())
    late = lateness([each for each in driver.exchanges if each.result == OK])
    told = [(at - began, what, why) for at, (what, why) in sorted(changes.items())]
    return Run(way.name, served, looks, told), f"{failed} {late or ''}".strip()


async def _look(
    state: ClusterState, looks: list[Look], changes: dict[float, tuple[str, str]], over: asyncio.Event
) -> None:
    """Asks the router beside the load, until that is over. `changes`: by time of the clock, what and why."""
    clock = asyncio.get_running_loop()
    began = clock.time()
    with asking_routers(state) as ask:
        while not over.is_set():
            (described,) = (await asyncio.to_thread(ask, "describe")).values()  # of the only router
            looks.append(_look_of(described, clock.time() - began))
            (outlook,) = (await asyncio.to_thread(ask, "outlook")).values()
            changes |= {each.at: (", ".join(each.changes), each.reason) for each in outlook.decisions if each.changes}
            await asyncio.sleep(LOOK_S)


def _look_of(described: Mapping[str, Any], at_s: float) -> Look:
    workers = described["workers"]
    roles = {role: sum(each["role"] == role for each in workers) for role in Role}
    decoding = sum(each["running"] for each in workers if each["role"] == Role.VERIFY)
    return Look(at_s, roles, max(described["active"] + described["queued"] - decoding, 0), decoding)
