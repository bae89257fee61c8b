"""AdaServe's comparison in small: how many requests are served in their latency goal, by how drafts are chosen.

    python -m benchmarks.slo           # on a virtual clock: the same each time, however busy the machine; half an hour
    python -m benchmarks.slo --live    # workers in processes of their own, a router, gRPC; hours, idle cores
    python -m benchmarks.slo --rates 7,8 --ways "k = 4,SLO-customized" --duration 20 --seeds 5

Emulated engines (docs/emulated.md) behind the real roles, streams, draft trees and selection. The target costs what
OPT-13B costs on an A100 (workers/engine/latency.py), 1.5 times: about 30 ms a step up to 95 rows, then 0.24 ms a row,
0.14 ms a prompt token. The draft takes 1 ms, 3 % of it, and its first choice is right 7 times of 10. One verify worker
computes prompts too; one draft worker.

Three classes as in AdaServe (EuroSys'26), 60/20/20 % of requests: tight, 1.2 times the step of a lone request without
drafts; middle, 1.5 times; relaxed, 4.5 times. A request attains its goal if its mean time per output token does, and
its first token comes within 2 s. Arrivals are Poisson, the same for every way, from several seeds; prompts have 200
tokens in the median, answers 128, both log-normal with sigma 0.5.

The ways: settings as they are out of the box; a chain of k = 2, 4, 6 for every request in every step, drafted when the
last verdict is known; no drafts. `--live` stretches all times and goals alike, since a step costs some milliseconds of
processor whatever it emulates.
"""

import argparse
import asyncio
import itertools
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cluster.bench.arrivals import Arrival, Process, Workload, parse_lengths
from cluster.bench.drive import Driver
from cluster.bench.plots import plot_rates
from cluster.bench.report import lateness, summary_row, write_rows
from cluster.bench.summary import OK, ClassSummary, Exchange, summarise
from tests.support.local import MODELS, process_cluster
from tests.support.virtual_workers import VirtualPair
from tidemill import SamplingParams, Slo
from tidemill.core.messages import Event, Tokens
from tidemill.core.model import Request, Role, SloClass
from tidemill.core.settings import (
    EmulatedSettings,
    EngineSettings,
    LatencySettings,
    ModelSettings,
    RouterSettings,
    Settings,
    SloSettings,
    SpeculationSettings,
)
from workers.engine.latency import StepWork, latency_model

ROOT = Path(__file__).parents[1]
MIX = {"tight": 0.6, "middle": 0.2, "relaxed": 0.2}
TIMES_BASELINE = {"tight": 1.2, "middle": 1.5, "relaxed": 4.5}
TTFT_S = 2.0
OURS, NONE, FIXED = "SLO-customized", "no drafts", {f"k = {k}": k for k in (2, 4, 6)}
WAYS = (OURS, *FIXED, NONE)
RATES = "4,7,8,8.5,9,10,12"
VOCABULARY, CONTEXT = 512, 4096
LIVE_STRETCH = 3.0
SETTLED = 0.8  # attainment of the best fixed k at which ours is compared with it


def settings_of(way: str, stretch: float) -> Settings:
    """`stretch`: every time, and every goal, is so many times as long."""
    target = LatencySettings(model="opt-13b", scale=1.5 * stretch)
    draft = LatencySettings(step_s=1e-3 * stretch, decode_row_s=3e-6 * stretch, prefill_token_s=2e-6 * stretch)
    wait_s = SpeculationSettings().wait_s * stretch
    if way in FIXED:
        k = FIXED[way]
        speculation = SpeculationSettings(
            adaptive=False, strategy="chain", width=1, max_depth=k, max_nodes=k, ahead=0, wait_s=wait_s
        )
    else:
        speculation = SpeculationSettings(enabled=way == OURS, wait_s=wait_s)
    baseline_s = latency_model(target)(StepWork(decode_rows=1, context_tokens=256))
    goals = {name: SloSettings(ttft_s=TTFT_S * stretch, tpot_s=n * baseline_s) for name, n in TIMES_BASELINE.items()}
    return Settings(
        name="slo",
        target=ModelSettings(path=MODELS / "target", name="opt-13b"),
        draft=ModelSettings(path=MODELS / "draft"),
        engine=EngineSettings(kind="emulated", kv_blocks=4096, block_size=64, max_running=256, prefix_cache=False),
        emulated=EmulatedSettings(
            target=target, draft=draft, agreement=0.7, vocab_size=VOCABULARY, context_length=CONTEXT
        ),
        router=RouterSettings(port=0, max_active=1024),
        speculation=speculation,
        slo=goals | {"default": goals["relaxed"]},
    )


def goals_of(settings: Settings) -> dict[str, Slo]:
    return {name: Slo(settings.slo[name].ttft_s, settings.slo[name].tpot_s) for name in MIX}


def load_of(rate: float, duration_s: float, seed: int) -> list[Arrival]:
    workload = Workload(Process.POISSON, MIX, parse_lengths("lognormal:200:0.5"), parse_lengths("lognormal:128:0.5"))
    return workload.arrivals(rate, duration_s, seed)


def serve_virtually(settings: Settings, arrivals: Sequence[Arrival], rate: float, seed: int) -> list[Exchange]:
    times: dict[str, list[tuple[float, int]]] = {}

    def told(event: Event, at: float) -> None:
        assert isinstance(event, Tokens), event
        times.setdefault(event.request_id, []).append((at, len(event.tokens)))

    pair = VirtualPair(settings, told)
    for number, arrival in enumerate(arrivals):
        prompt = random.Random(f"{seed}/{number}").choices(range(VOCABULARY), k=arrival.prompt_tokens)
        sampling = SamplingParams(max_tokens=arrival.output_tokens, ignore_eos=True, temperature=0.0, seed=number)
        goal = settings.slo[arrival.slo_class]
        slo = SloClass(arrival.slo_class, goal.ttft_s, goal.tpot_s)
        pair.submit(arrival.at_s, Request(str(number), tuple(prompt), sampling, slo=slo))
    pair.run()
    return [_exchange(number, rate, each, times[str(number)]) for number, each in enumerate(arrivals)]


def _exchange(number: int, rate: float, arrival: Arrival, times: Sequence[tuple[float, int]]) -> Exchange:
    first, last, tokens = times[0][0], times[-1][0], sum(count for _, count in times)
    assert tokens == arrival.output_tokens
    return Exchange(
        number=number,
        rate=rate,
        arrival=arrival,
        result=OK,
        ttft_s=first - arrival.at_s,
        tpot_s=(last - first) / max(tokens - 1, 1),
        total_s=last - arrival.at_s,
        output_tokens=tokens,
        accepted_per_verify=tokens / len(times) - 1,
    )


async def serve_live(settings: Settings, arrivals: Sequence[Arrival], rate: float, seed: int) -> list[Exchange]:
    async with process_cluster(settings, (Role.VERIFY, Role.DRAFT)) as (client, _, _):
        driver = Driver(client, VOCABULARY, rate, max_in_flight=1024, timeout_s=600.0, seed=seed)
        await driver.run(arrivals)
        return driver.exchanges


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--live", action="store_true")
    parser.add_argument("--stretch", type=float, help=f"of all times; 1, live {LIVE_STRETCH}")
    parser.add_argument("--rates", default=RATES, help="requests a second, before stretching")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--duration", type=float, default=60.0, help="seconds of arrivals, before stretching")
    parser.add_argument("--seeds", default="1,2,3", help="of the arrivals; what is shown counts the requests of all")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "out", help="folder for CSV and PNG")
    args = parser.parse_args()
    stretch = args.stretch or (LIVE_STRETCH if args.live else 1.0)
    seeds = [int(each) for each in args.seeds.split(",")]
    console = Console()
    lines: dict[str, list[ClassSummary]] = {way: [] for way in args.ways.split(",")}
    rows: list[dict[str, object]] = []
    for rate, way in itertools.product([float(each) for each in args.rates.split(",")], lines):
        settings, offered, duration_s = settings_of(way, stretch), rate / stretch, args.duration * stretch
        exchanges: list[Exchange] = []
        for seed in seeds:
            arrivals = load_of(offered, duration_s, seed)
            if args.live:
                served = asyncio.run(serve_live(settings, arrivals, offered, seed))
                console.print(lateness(served) or "", end="", style="yellow")
            else:
                served = serve_virtually(settings, arrivals, offered, seed)
            of_seed = summarise(served, goals_of(settings), offered, duration_s)
            rows += [{"way": way, "seed": seed} | summary_row(each) for each in of_seed]
            exchanges += served
        found = summarise(exchanges, goals_of(settings), offered, duration_s * len(seeds))
        lines[way].append(found[-1])
        rows += [{"way": way, "seed": "all"} | summary_row(each) for each in found]
        console.print(_line(way, found), highlight=False, soft_wrap=True)
    args.out.mkdir(parents=True, exist_ok=True)
    name = "slo-live" if args.live else "slo"
    write_rows(args.out / f"{name}.csv", rows)
    plot_rates(args.out / f"{name}.png", lines, bold=OURS)
    console.print(_table(lines), _verdict(lines), f"written to {args.out}/{name}.csv, .png", sep="\n")


def _line(way: str, found: Iterable[ClassSummary]) -> str:
    classes = "  ".join(f"{each.slo_class} {each.attainment:.0%} {each.tpot_s[0] * 1e3:.1f} ms" for each in found)
    return f"{way:>14}  {classes}"


def _table(lines: Mapping[str, Sequence[ClassSummary]]) -> Table:
    table = Table("requests / s", title="in their goal, %; goodput, requests / s", box=None)
    for way in lines:
        table.add_column(way, justify="right")
    for at_rate in zip(*lines.values(), strict=True):
        cells = [f"{100 * each.attainment:.1f}  {each.goodput:.2f}" for each in at_rate]
        table.add_row(f"{at_rate[0].rate:.3g}", *cells)
    return table


def _verdict(lines: Mapping[str, Sequence[ClassSummary]]) -> str:
    """How ours does where the best fixed k has come down to SETTLED."""
    reaches = {way: rate_at(lines[way], SETTLED) for way in FIXED if way in lines}
    best = max(reaches, key=lambda way: reaches[way] or 0.0, default=None)
    if best is None or OURS not in lines or not (rate := reaches[best]):
        return f"no fixed k comes down to {SETTLED:.0%} at these rates"
    return (
        f"best fixed: {best}, {SETTLED:.0%} at {rate:.2f} requests / s; {OURS}: {attainment_at(lines[OURS], rate):.1%}"
    )


def rate_at(rows: Sequence[ClassSummary], attainment: float) -> float | None:
    """Where the line through the rows first falls to this attainment."""
    for before, after in itertools.pairwise(rows):
        if before.attainment > attainment >= after.attainment:
            share = (before.attainment - attainment) / (before.attainment - after.attainment)
            return before.rate + share * (after.rate - before.rate)
    return None


def attainment_at(rows: Sequence[ClassSummary], rate: float) -> float:
    """On the line through the rows, `rate` being between the first and the last."""
    before, after = next(pair for pair in itertools.pairwise(rows) if pair[0].rate <= rate <= pair[1].rate)
    share = (rate - before.rate) / (after.rate - before.rate)
    return before.attainment + share * (after.attainment - before.attainment)


if __name__ == "__main__":
    main()
