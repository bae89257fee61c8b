"""How long a request that moves between two verify workers goes without a token, in steps.

    python -m benchmarks.migration

The bundled target, native engine, no drafts, a process for each worker, the router and the client in this one. A
request with a prompt of 1,500 tokens decodes, alone or beside others on both workers, and is moved to and fro. The
pause is the time between the last token of the one worker and the first of the other, at the client; steps are the
median time between tokens of the same stream while nothing moves, and the duration of the engine's own steps.
"""

import argparse
import asyncio
import itertools
import random
import statistics
import time
from dataclasses import dataclass, field

from router.move import MoveOutcome
from router.server import RouterServer
from tests.support.local import process_cluster, settings_for
from tidemill import AsyncClient
from tidemill.core.model import Role

PROMPT, OUTPUT = 1500, 400
SETTLE_S = 0.15  # between moves


@dataclass
class Figures:
    """Seconds."""

    pauses: list[float] = field(default_factory=list)
    router_pauses: list[float] = field(default_factory=list)
    whole_moves: list[float] = field(default_factory=list)
    between_tokens: list[float] = field(default_factory=list)
    engine_steps: list[float] = field(default_factory=list)


def prompt_of(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(5, 4096) for _ in range(length)]


async def background(client: AsyncClient, rng: random.Random) -> None:
    while True:
        async for _ in client.stream(prompt_of(rng, 200), max_tokens=800, ignore_eos=True):
            pass


async def measure_one(client: AsyncClient, router: RouterServer, rng: random.Random, found: Figures) -> None:
    """One stream, moved as often as its length allows."""
    stamps: list[float] = []
    moves: list[tuple[float, float]] = []
    name = f"measured-{rng.random()}"

    async def to_and_fro() -> None:
        while name not in router.decoding():  # noqa: ASYNC110 - a router tells nobody
            await asyncio.sleep(0.005)
        while True:
            await asyncio.sleep(SETTLE_S)
            workers = router._pools.snapshot().of(Role.VERIFY)
            found.engine_steps += [each.load.step_s for each in workers if each.load.running_requests]
            at = router.decoding().get(name)
            target = next((each.peer.id for each in workers if each.peer.id != at), None)
            if at is None or target is None:
                return
            started = time.perf_counter()
            if await router.move(name, target) is MoveOutcome.MOVED:
                moves.append((started, time.perf_counter()))

    mover = asyncio.create_task(to_and_fro())
    stream = client.stream(prompt_of(rng, PROMPT), max_tokens=OUTPUT, ignore_eos=True, request_id=name)
    async for chunk in stream:
        stamps += [time.perf_counter()] * bool(chunk.tokens)
    await mover
    gaps = list(itertools.pairwise(stamps))
    for started, ended in moves:  # a move ends when the router has the target's first token: the client's next one
        found.pauses.append(next(after - before for before, after in gaps if after >= ended))
        found.whole_moves.append(ended - started)
    calm = [(b, a) for b, a in gaps if not any(a >= started and b <= ended for started, ended in moves)]
    found.between_tokens += [after - before for before, after in calm]


async def measure(streams: int, beside: int, seed: int) -> tuple[Figures, float]:
    """(figures, the router's own mean pause)."""
    found, rng = Figures(), random.Random(seed)
    settings = settings_for("native", speculation=False, prefix_cache=False, kv_blocks=1024)
    async with process_cluster(settings, (Role.VERIFY, Role.VERIFY)) as (client, router, _):
        others = [asyncio.create_task(background(client, random.Random(index))) for index in range(2 * beside)]
        await asyncio.sleep(1.0 if beside else 0.0)
        for _ in range(streams):
            await measure_one(client, router, rng, found)
        for each in others:
            each.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        registry = router.metrics.registry
        name = "tidemill_migration_pause_seconds"
        total, count = (registry.get_sample_value(f"{name}_{part}") or 0.0 for part in ("sum", "count"))
    return found, total / max(count, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=6)
    parser.add_argument("--beside", type=int, nargs="*", default=[0, 4], help="other requests on each worker")
    args = parser.parse_args()
    for beside in args.beside:
        found, router_s = asyncio.run(measure(args.streams, beside, seed=beside))
        pause, token, step = (
            statistics.median(each) for each in (found.pauses, found.between_tokens, found.engine_steps)
        )
        worst = sorted(found.pauses)[int(0.9 * len(found.pauses))]
        print(
            f"{beside} beside it, {len(found.pauses)} moves of {statistics.median(found.whole_moves) * 1e3:.0f} ms: "
            f"pause {pause * 1e3:.2f} ms (90 %: {worst * 1e3:.2f} ms; mean at the router {router_s * 1e3:.2f} ms)   "
            f"between tokens {token * 1e3:.2f} ms: {pause / token:.2f}x   "
            f"engine's step {step * 1e3:.2f} ms: {pause / step:.2f}x",
            flush=True,
        )


if __name__ == "__main__":
    main()
