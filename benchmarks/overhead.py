"""What the way through client, router and streams adds to the engine's own time, and what handing the KV over adds.

    python -m benchmarks.overhead

One request at a time, no drafts, no prefix cache, the bundled target. Three ways for the same prompts: the engine
called in this process; a cluster that prefills where it decodes; a cluster with a prefill worker. Engine and cluster
alternate request by request, and each figure is a median.
"""

import argparse
import itertools
import multiprocessing
import random
import statistics
import time
from pathlib import Path

import torch

from cluster import launch
from tidemill import Client
from tidemill.core.model import Request
from tidemill.core.settings import (
    EngineSettings,
    ModelSettings,
    PoolSettings,
    RouterSettings,
    Settings,
    SpeculationSettings,
)
from tidemill.types import SamplingParams
from workers.engine.native.engine import NativeEngine

MODELS = Path(__file__).parents[1] / "models"
TOKENS = 48
ENGINE = EngineSettings(prefix_cache=False)
IN_PROCESS, IN_PLACE, HANDED_OVER = "engine alone", "cluster, in place", "cluster, handed over"


def cluster_settings(name: str, prefill: int) -> Settings:
    return Settings(
        name=f"overhead-{name}",
        target=ModelSettings(path=MODELS / "target"),
        engine=ENGINE,
        pools=PoolSettings(prefill=prefill, draft=0, verify=1),
        router=RouterSettings(port=0),
        speculation=SpeculationSettings(enabled=False),
    )


def engine_alone(engine: NativeEngine, prompt: list[int]) -> tuple[float, float]:
    """(TTFT, median ITL) in seconds."""
    params = SamplingParams(max_tokens=TOKENS, ignore_eos=True, seed=0)
    stamps = [time.perf_counter()]
    engine.submit(Request("r", tuple(prompt), params))
    while engine.has_work():
        if engine.step().outputs:
            stamps.append(time.perf_counter())
    return _figures(stamps)


def through_cluster(client: Client, prompt: list[int]) -> tuple[float, float]:
    """(TTFT, median ITL) in seconds, as the application sees them."""
    stamps = [time.perf_counter()]
    for chunk in client.stream(prompt, max_tokens=TOKENS, ignore_eos=True):
        stamps += [time.perf_counter()] * bool(chunk.tokens)
    return _figures(stamps)


def _figures(stamps: list[float]) -> tuple[float, float]:
    gaps = [after - before for before, after in itertools.pairwise(stamps[1:])]
    return stamps[1] - stamps[0], statistics.median(gaps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="requests per way and prompt length")
    args = parser.parse_args()
    for way in (IN_PLACE, HANDED_OVER):  # a process each: Ray keeps the first cluster's token for as long as one lives
        process = multiprocessing.get_context("spawn").Process(target=measure, args=(way, args.repeats))
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(process.exitcode)


def measure(way: str, repeats: int) -> None:
    """One cluster beside the engine."""
    torch.set_num_threads(1)
    engine = NativeEngine.from_folder(MODELS / "target", ENGINE)
    prefill = 1 if way == HANDED_OVER else 0
    state = launch.up(cluster_settings(f"p{prefill}", prefill), lambda line: None)
    try:
        with Client(state.router_address) as client:
            compare(engine, client, way, repeats, random.Random(0))
    finally:
        launch.down(state, lambda line: None)


def compare(engine: NativeEngine, client: Client, way: str, repeats: int, rng: random.Random) -> None:
    """For a short and a long prompt."""
    for length in (200, 1500):
        found: dict[str, list[tuple[float, float]]] = {IN_PROCESS: [], way: []}
        for _ in range(repeats + 2):
            prompt = [rng.randrange(5, 4096) for _ in range(length)]
            found[IN_PROCESS].append(engine_alone(engine, prompt))
            found[way].append(through_cluster(client, prompt))
        ttft, itl = (
            {name: statistics.median(run[part] for run in runs[2:]) for name, runs in found.items()} for part in (0, 1)
        )
        alone, cluster = ((ttft[name] * 1e3, itl[name] * 1e3) for name in (IN_PROCESS, way))
        print(
            f"{length:5d} tokens  {IN_PROCESS}: TTFT {alone[0]:7.2f} ms, ITL {alone[1]:5.2f} ms   "
            f"{way}: TTFT {cluster[0]:7.2f} ms ({cluster[0] - alone[0]:+.2f} ms, {cluster[0] / alone[0]:.2f}x), "
            f"ITL {cluster[1]:5.2f} ms ({cluster[1] - alone[1]:+.2f} ms)",
            flush=True,
        )


if __name__ == "__main__":
    main()
