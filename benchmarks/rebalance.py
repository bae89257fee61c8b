"""Static splits of 12 workers against live roles, on a square wave between long prompts and long answers; simulated.

    python -m benchmarks.rebalance

The routers' and the controller's policies are those of the cluster; workers are OPT-13B on GPUs as DistServe measured
them. Besides the wave, every split serves each half of it alone: the best that a fixed split could do if the traffic
never changed. Chunked prefill on every worker is tried with several budgets.
"""

import argparse
import random
from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from cluster.policy.rebalance import RebalanceConfig
from cluster.sim.cluster import Outcome, SimConfig, Simulation
from cluster.sim.traffic import Arrival, Mix, square_wave
from cluster.sim.worker import OPT_13B_80GB
from tidemill.core.model import Role, SloClass

WORKERS = 12
PROMPTS = Mix("long prompts", 31.0, 1800, 40)
OUTPUTS = Mix("long answers", 62.0, 150, 250)
GOALS = SloClass("default", 1.0, 0.045)
CHUNKS = (512, 1024, 2048)
WARM_S = 60.0  # not counted: everything starts empty, and roles wait their first dwell


def roles(prefill: int) -> list[Role]:
    """So many prefill workers, the rest verifies."""
    return [Role.PREFILL] * prefill + [Role.VERIFY] * (WORKERS - prefill)


def run(config: SimConfig, arrivals: Sequence[Arrival]) -> Outcome:
    return Simulation(config, arrivals).run(arrivals[-1].at_s + 60.0)


def row(outcome: Outcome) -> list[str]:
    shares = [outcome.attainment(phase, WARM_S) for phase in (None, PROMPTS.name, OUTPUTS.name)]
    return [f"{share:.1%}" for share in shares]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--phase-s", type=float, default=120.0)
    parser.add_argument("--phases", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--load", type=float, default=1.0, help="times the arrivals")
    arguments = parser.parse_args()
    mixes = tuple(replace(mix, rate=mix.rate * arguments.load) for mix in (PROMPTS, OUTPUTS))
    wave = square_wave(mixes, arguments.phase_s, arguments.phases, arguments.seed)
    alone = [list(mix.arrivals(0.0, arguments.phase_s, random.Random(arguments.seed))) for mix in mixes]
    base = SimConfig(roles(WORKERS // 2), slo=GOALS, seed=arguments.seed)

    table = Table("prefill / verify", "wave", *(mix.name for mix in mixes), *(f"{mix.name}, alone" for mix in mixes))
    live = run(replace(base, rebalance=RebalanceConfig()), wave)
    table.add_row("live", *row(live), "", "")
    for tokens in CHUNKS:
        config = replace(base, roles=roles(0), hardware=replace(OPT_13B_80GB, max_batch_tokens=tokens))
        table.add_row(f"none, chunks of {tokens}", *row(run(config, wave)), "", "")
    for prefill in range(1, WORKERS):
        config = replace(base, roles=roles(prefill))
        lone = [f"{run(config, each).attainment(since_s=WARM_S):.1%}" for each in alone]
        table.add_row(f"{prefill} / {WORKERS - prefill}", *row(run(config, wave)), *lone)
    console = Console()
    console.print(table)
    for at_s, changes, reason in live.changes:
        moves = ", ".join(f"{change.before} -> {change.to}" for change in changes)
        console.print(f"{at_s:6.1f} s  {reason}: {moves}", highlight=False)


if __name__ == "__main__":
    main()
