"""Live roles against static splits of 12 workers, and against chunked prefill on every worker.

    python -m benchmarks.roles --trace azure_llm_2023_conv.csv    # on a virtual clock: half an hour of one core
    python -m benchmarks.roles --only wave --splits 6,7,8
    python -m benchmarks.roles --live --splits 6 --chunks 2048    # Ray actors, router, controller: idle cores

    wave     a square wave between long prompts and long answers; besides, every split serves each half of it alone:
             the best that it could do if the traffic never changed
    burst    long answers, and for half a minute long prompts on top
    trace    the conversations of the Azure LLM inference traces (Patel et al., ISCA 2024), faster than recorded

Simulated, the policies are the routers' and the controller's own; workers and links are made up. `--live` brings up a
cluster of emulated workers for each way and serves the wave for real; there all times, goals and rates, but not the
policy's, are stretched, since a step costs some milliseconds of processor whatever it emulates. Workers are OPT-13B on
an A100 as DistServe measured it. A request counts if it meets both goals. Writes CSV and PNG.
"""

import argparse
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.roles_plots import Run, Served, draw, write_timeline
from cluster.bench.arrivals import BadWorkload, mean_rate, read_trace
from cluster.policy.rebalance import RebalanceConfig
from cluster.sim.cluster import Outcome, SimConfig, Simulation
from cluster.sim.traffic import Arrival, Mix, from_trace, square_wave
from cluster.sim.worker import OPT_13B_80GB
from tidemill.core.model import Role, SloClass

OUT = Path(__file__).parent / "out"
WORKERS = 12
PROMPTS = Mix("long prompts", 31.0, 1800, 40)
OUTPUTS = Mix("long answers", 62.0, 150, 250)
CALM, BURST = replace(OUTPUTS, name="calm", rate=45.0), replace(PROMPTS, name="burst", rate=16.0)
CALM_S, BURST_S = 90.0, 30.0
TRACE_RATE = 18.0  # requests a second that the trace is sped up to
GOALS = SloClass("default", 1.0, 0.045)
WARM_S = 20.0  # not counted: everything starts empty, and roles wait their first dwell
LIVE = "live roles"
SCENARIOS = ("wave", "burst", "trace")


@dataclass(frozen=True, slots=True)
class Scenario:
    """Traffic, and the names of its parts."""

    name: str
    title: str
    arrivals: Sequence[Arrival]
    phases: tuple[str, ...] = ()
    alone: tuple[Sequence[Arrival], ...] = ()  # each phase's traffic for itself


@dataclass(frozen=True, slots=True)
class Way:
    """How the workers are used; `chunk` None: as much at once as the hardware's."""

    name: str
    prefill: int
    live: bool = False
    chunk: int | None = None


def roles(prefill: int) -> list[Role]:
    """So many prefill workers, the rest verifies."""
    return [Role.PREFILL] * prefill + [Role.VERIFY] * (WORKERS - prefill)


def ways(splits: Sequence[int], chunks: Sequence[int]) -> list[Way]:
    return [
        Way(LIVE, WORKERS // 2, live=True),
        *(Way(f"chunks of {tokens}", 0, chunk=tokens) for tokens in chunks),
        *(Way(f"{prefill} / {WORKERS - prefill}", prefill) for prefill in splits),
    ]


# --- traffic ----------------------------------------------------------------------------------------------------


def wave(phase_s: float, phases: int, load: float, seed: int) -> Scenario:
    mixes = tuple(replace(mix, rate=mix.rate * load) for mix in (PROMPTS, OUTPUTS))
    alone = tuple(list(mix.arrivals(0.0, phase_s, random.Random(seed))) for mix in mixes)
    names = tuple(mix.name for mix in mixes)
    title = "A square wave between long prompts and long answers"
    return Scenario("wave", title, square_wave(mixes, phase_s, phases, seed), names, alone)


def burst(load: float, seed: int) -> Scenario:
    """The same calm traffic all the time, and more in the middle."""
    rng = random.Random(seed)
    calm, more = (replace(mix, rate=mix.rate * load) for mix in (CALM, BURST))
    end_s = 2 * CALM_S + BURST_S
    arrivals = [*calm.arrivals(0.0, end_s, rng), *more.arrivals(CALM_S, CALM_S + BURST_S, rng)]
    arrivals.sort(key=lambda each: each.at_s)
    return Scenario("burst", "Long answers, and a burst of long prompts", arrivals, (CALM.name, BURST.name))


def conversations(path: Path, rate: float) -> Scenario:
    """Raises BadWorkload."""
    entries = read_trace(path)
    speedup = rate / mean_rate(entries)
    title = f"Azure's conversations, {speedup:.1f} times as fast as recorded"
    return Scenario("trace", title, from_trace(entries, speedup=speedup))


def scenarios(arguments: argparse.Namespace) -> Iterator[Scenario]:
    """Those that were asked for. Raises BadWorkload."""
    if "wave" in arguments.only:
        yield wave(arguments.phase_s, arguments.phases, arguments.load, arguments.seed)
    if "burst" in arguments.only:
        yield burst(arguments.load, arguments.seed)
    if "trace" in arguments.only:
        yield conversations(arguments.trace, TRACE_RATE * arguments.load)


# --- simulated --------------------------------------------------------------------------------------------------


def simulate(way: Way, arrivals: Sequence[Arrival], seed: int) -> Outcome:
    hardware = OPT_13B_80GB if way.chunk is None else replace(OPT_13B_80GB, max_batch_tokens=way.chunk)
    rebalance = RebalanceConfig() if way.live else None
    config = SimConfig(roles(way.prefill), GOALS, hardware, rebalance=rebalance, seed=seed)
    return Simulation(config, arrivals).run(arrivals[-1].at_s + 60.0)


def run_of(way: Way, outcome: Outcome) -> Run:
    served = [Served(each.arrival.at_s, each.arrival.phase, each.met) for each in outcome.ended]
    changes = [(at_s, _told(changes), str(reason)) for at_s, changes, reason in outcome.changes]
    return Run(way.name, served, outcome.looks, changes)


def _told(changes: Sequence[object]) -> str:
    return ", ".join(f"{each.before} -> {each.to}" for each in changes)  # type: ignore[attr-defined]


def compare(scenario: Scenario, tried: Sequence[Way], seed: int, console: Console) -> list[Run]:
    """Every way, live roles first, and the table of them."""
    title = f"{scenario.title}: {len(scenario.arrivals)} requests, in their goals after {WARM_S:.0f} s"
    table = Table("prefill / verify", "all", *scenario.phases, *(f"{name}, alone" for name in _alone(scenario)))
    table.title = title
    runs = []
    for way in tried:
        runs.append(run_of(way, simulate(way, scenario.arrivals, seed)))
        shares = [runs[-1].attainment(WARM_S, phase) for phase in (None, *scenario.phases)]
        if way.prefill and not way.live:
            shares += [run_of(way, simulate(way, alone, seed)).attainment(WARM_S) for alone in scenario.alone]
        table.add_row(way.name, *(f"{share:.1%}" for share in shares))
    console.print(table)
    for at_s, what, reason in runs[0].changes:
        console.print(f"{at_s:6.1f} s  {reason}: {what}", highlight=False)
    return runs


def _alone(scenario: Scenario) -> tuple[str, ...]:
    return scenario.phases if scenario.alone else ()


# --- what is left -----------------------------------------------------------------------------------------------


def best_of(runs: Sequence[Run], tried: Sequence[Way]) -> list[Run]:
    """What is drawn: live roles, the best single split, the best of chunked prefill."""
    by_name = {way.name: way for way in tried}
    kinds: Mapping[bool, list[Run]] = {
        chunked: [run for run in runs if not by_name[run.way].live and bool(by_name[run.way].chunk) is chunked]
        for chunked in (False, True)
    }
    best = [max(kind, key=lambda run: run.attainment(WARM_S)) for kind in kinds.values() if kind]
    return [*(run for run in runs if by_name[run.way].live), *best]


def report(scenario: Scenario, runs: Sequence[Run], tried: Sequence[Way], out: Path, console: Console) -> None:
    out.mkdir(parents=True, exist_ok=True)
    stem = out / f"roles-{scenario.name}"
    write_timeline(stem.with_suffix(".csv"), runs, scenario.arrivals)
    draw(stem.with_suffix(".png"), scenario.title, best_of(runs, tried), scenario.arrivals)
    console.print(f"written to {stem}.csv, .png", highlight=False)


def _numbers(text: str) -> list[int]:
    return [int(each) for each in text.split(",") if each]


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help=f"of {','.join(SCENARIOS)}; all, but trace without --trace")
    parser.add_argument("--trace", type=Path, help="AzureLLMInferenceTrace_conv.csv (2023)")
    parser.add_argument("--phase-s", type=float, help="a half of the wave; 300, or 120 with --live")
    parser.add_argument("--phases", type=int, default=4, help="of the wave")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--load", type=float, default=1.0, help="times the arrivals")
    parser.add_argument("--splits", type=_numbers, default="3,4,5,6,7,8,9", help="numbers of prefill workers")
    parser.add_argument("--chunks", type=_numbers, default="512,1024,2048", help="budgets of chunked prefill")
    parser.add_argument("--live", action="store_true", help="the wave on a real cluster of emulated workers")
    parser.add_argument("--stretch", type=float, default=2.0, help="of all times, live")
    parser.add_argument("--out", type=Path, default=OUT, help="folder for CSV and PNG")
    arguments = parser.parse_args()
    arguments.phase_s = arguments.phase_s or (120.0 if arguments.live else 300.0)
    known = [each for each in SCENARIOS if each != "trace" or arguments.trace]
    arguments.only = arguments.only.split(",") if arguments.only else known
    if set(arguments.only) - set(SCENARIOS):
        parser.error(f"--only takes some of {','.join(SCENARIOS)}")
    if "trace" in arguments.only and not arguments.trace:
        parser.error("--trace FILE is missing: the conversations of github.com/Azure/AzurePublicDataset (2023), a CSV")
    return arguments


def main() -> None:
    arguments, console = _parsed(), Console()
    tried = ways(arguments.splits, arguments.chunks)
    if arguments.live:
        from benchmarks.roles_live import serve  # noqa: PLC0415 - imports Ray

        scenario = wave(arguments.phase_s, arguments.phases, arguments.load / arguments.stretch, arguments.seed)
        scenario = replace(scenario, name="wave-live", alone=())
        runs = [serve(way, scenario.arrivals, arguments.stretch, console) for way in tried]
        report(scenario, runs, tried, arguments.out, console)
        return
    try:
        for scenario in scenarios(arguments):
            report(scenario, compare(scenario, tried, arguments.seed, console), tried, arguments.out, console)
    except BadWorkload as error:
        sys.exit(f"error: {error}")
    if "trace" not in arguments.only:
        console.print("no trace was played: give the Azure conversations with --trace FILE", style="yellow")


if __name__ == "__main__":
    main()
