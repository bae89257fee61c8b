"""The `tidemill bench` command."""

import asyncio
import importlib.util
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from cluster.bench import report
from cluster.bench.arrivals import (
    LENGTHS_HELP,
    Arrival,
    BadWorkload,
    Process,
    TraceEntry,
    Workload,
    fitted,
    mean_rate,
    parse_lengths,
    parse_mix,
    read_trace,
)
from cluster.bench.drive import Driver
from cluster.bench.summary import CANCELLED, DROPPED, OK, ClassSummary, Exchange, failures, summarise
from tidemill import AsyncClient, Slo, TidemillError, Tls
from tidemill.core.model import DEFAULT_SLO
from tidemill.core.settings import SettingsError, SloSettings
from tidemill.core.settings_file import load_settings

DEFAULT_ADDRESS = "127.0.0.1:7071"
DEFAULT_GOALS = {"default": SloSettings(ttft_s=DEFAULT_SLO.ttft_s, tpot_s=DEFAULT_SLO.tpot_s)}
REFRESH_PER_S = 4
# Options, by the group that the help shows them in.
WHERE = partial(typer.Option, rich_help_panel="Cluster")
WHEN = partial(typer.Option, rich_help_panel="When requests come")
WHAT = partial(typer.Option, rich_help_panel="What they ask for")


@dataclass(slots=True)
class Results:
    """All rates so far; whatever ends the command, this much is reported."""

    goals: Mapping[str, Slo]
    exchanges: list[Exchange] = field(default_factory=list)
    rows: list[ClassSummary] = field(default_factory=list)

    def add(self, exchanges: list[Exchange], rate: float, duration_s: float) -> None:
        self.exchanges += exchanges
        self.rows += summarise(exchanges, self.goals, rate, duration_s)


@dataclass(frozen=True, slots=True)
class Plan:
    """The command line, checked."""

    address: str
    token: str | None
    tls: Tls | None
    workload: Workload
    rates: tuple[float, ...]
    duration_s: float
    timeout_s: float
    max_in_flight: int
    seed: int


def bench(
    config: Annotated[
        Path | None, WHERE("--config", "-c", help="The cluster's settings: address and goals are read there.")
    ] = None,
    address: Annotated[str | None, WHERE(help="Router, host:port; goes before the settings'.")] = None,
    token_file: Annotated[Path | None, WHERE(help="File with the bearer token.")] = None,
    ca: Annotated[Path | None, WHERE(help="PEM file of the authority that signed the router's certificate.")] = None,
    arrivals: Annotated[Process | None, WHEN(help="As in a trace if there is one, else poisson.")] = None,
    rates: Annotated[str, WHEN(help="Requests a second, one run after another; a trace's own, else 2.")] = "",
    duration: Annotated[float, WHEN(min=0.1, help="Seconds of arrivals at each rate.")] = 30.0,
    trace: Annotated[Path | None, WHEN(help="CSV file: TIMESTAMP, ContextTokens, GeneratedTokens (Azure's).")] = None,
    speed: Annotated[str, WHEN(help="Instead of rates: times as fast as recorded.")] = "",
    skip: Annotated[float, WHEN(min=0, help="Seconds of the trace, as recorded, to leave out first.")] = 0.0,
    seed: Annotated[int, WHEN(help="Same seed, same load.")] = 0,
    prompt_tokens: Annotated[str, WHAT(help=f"{LENGTHS_HELP}; the trace's, else 256.")] = "",
    output_tokens: Annotated[str, WHAT(help=f"{LENGTHS_HELP}; the trace's, else 64.")] = "",
    mix: Annotated[str, WHAT(help="SLO classes and their shares: tight=0.6,relaxed=0.4.")] = "default",
    goal: Annotated[
        list[str] | None, WHAT(help="A class's TTFT and TPOT, if not the settings': tight=0.5,0.05; repeatable.")
    ] = None,
    max_in_flight: Annotated[int, WHAT(min=1, help="Requests open at once; what is due beyond is dropped.")] = 512,
    timeout: Annotated[float, WHAT(min=0.1, help="Deadline of each request, in seconds.")] = 120.0,
    out: Annotated[Path | None, typer.Option(help="Folder for CSV and PNG files; none: bench-DATE-TIME.")] = None,
) -> None:
    """Put load on a running cluster and say how much was served within its latency goals.

    Requests are sent when they are due, however slow the answers are.
    Prompts are random tokens. Ctrl-C cancels what is in flight and reports the rest.

    \b
      tidemill bench --rates 2,4,8 --duration 20
      tidemill bench -c deploy/emulated.yaml --trace conv.csv --speed 1,2 \\
          --mix tight=0.6,default=0.2,relaxed=0.2
    """
    console, err = Console(), Console(stderr=True)
    try:
        settings = load_settings(config) if config else None
        entries = read_trace(trace, skip) if trace else ()
        workload = _workload(arrivals, entries, prompt_tokens, output_tokens, mix)
        plan = Plan(
            address=address or (f"{settings.router.host}:{settings.router.port}" if settings else DEFAULT_ADDRESS),
            token=token_file.read_text(encoding="utf-8").strip() if token_file else None,
            tls=Tls(ca) if ca else None,
            workload=workload,
            rates=_rates(workload, rates, speed),
            duration_s=duration,
            timeout_s=timeout,
            max_in_flight=max_in_flight,
            seed=seed,
        )
        results = Results(_goals(workload.mix, goal or [], settings.slo if settings else DEFAULT_GOALS))
    except (BadWorkload, SettingsError, OSError) as error:
        err.print(f"[red]error:[/] {error}", highlight=False)
        raise typer.Exit(1) from error
    folder = out or Path(f"bench-{datetime.now():%Y%m%d-%H%M%S}")
    code = _run(plan, results, err)
    if results.exchanges:
        console.print(report.table(results.rows))
        _tell_faults(results.exchanges, err)
        _write(folder, results, err)
    raise typer.Exit(code)


# --- the command line -----------------------------------------------------------------------------------------------


def _workload(arrivals: Process | None, trace: Sequence[TraceEntry], prompt: str, output: str, mix: str) -> Workload:
    """Raises BadWorkload."""
    return Workload(
        arrivals or (Process.TRACE if trace else Process.POISSON),
        parse_mix(mix),
        parse_lengths(prompt or "256") if prompt or not trace else None,
        parse_lengths(output or "64") if output or not trace else None,
        trace,
    )


def _rates(workload: Workload, rates: str, speeds: str) -> tuple[float, ...]:
    """Raises BadWorkload."""
    if rates and speeds:
        raise BadWorkload("--rates and --speed are both given; one of them says how fast requests come")
    if speeds and not workload.trace:
        raise BadWorkload("--speed needs --trace")
    text = speeds or rates or ("1" if workload.trace else "2")
    try:
        found = tuple(float(each) for each in text.split(","))
    except ValueError:
        found = (0.0,)
    if not all(0 < each < float("inf") for each in found):
        raise BadWorkload(f"{text!r} are no rates; expected numbers above 0, such as 2,4,8")
    of_trace = workload.trace and not rates
    return tuple(each * mean_rate(workload.trace) for each in found) if of_trace else found


def _goals(mix: Mapping[str, float], given: list[str], settings: Mapping[str, SloSettings]) -> dict[str, Slo]:
    """The goal of each class of the mix. Raises BadWorkload."""
    known = {name: Slo(each.ttft_s, each.tpot_s) for name, each in settings.items()}
    for text in given:
        name, _, numbers = text.partition("=")
        try:
            ttft_s, tpot_s = (float(each) for each in numbers.split(","))
        except ValueError:
            raise BadWorkload(f"{text!r} is no goal; expected such as tight=0.5,0.05") from None
        known[name] = Slo(ttft_s, tpot_s)
    missing = [name for name in mix if name not in known]
    if missing:
        raise BadWorkload(f"no goal is known of class {missing[0]!r}; give --goal {missing[0]}=TTFT,TPOT or --config")
    return {name: known[name] for name in mix}


# --- the run --------------------------------------------------------------------------------------------------------


def _run(plan: Plan, results: Results, err: Console) -> int:
    """The exit code; the results are filled in whatever happens."""
    try:
        asyncio.run(_run_rates(plan, results, err))
    except KeyboardInterrupt:
        err.print("interrupted: requests in flight were cancelled")
        return 130
    except TidemillError as error:
        hint = "; is it up? see `tidemill status`" if error.kind == "unavailable" else ""
        err.print(f"[red]error:[/] {error}{hint}", highlight=False)
        return 1
    return 0


async def _run_rates(plan: Plan, results: Results, err: Console) -> None:
    async with AsyncClient(plan.address, token=plan.token, tls=plan.tls, retries=0) as client:
        card = (await client.models())[0]
        for rate in plan.rates:
            arrivals, cut = fitted(plan.workload.arrivals(rate, plan.duration_s, plan.seed), card.context_length)
            if cut:
                err.print(f"{cut} of {len(arrivals)} requests are cut to the context of {card.context_length} tokens")
            driver = Driver(
                client,
                card.vocab_size,
                rate,
                max_in_flight=plan.max_in_flight,
                timeout_s=plan.timeout_s,
                seed=plan.seed,
            )
            await _run_rate(driver, arrivals, rate, plan.duration_s, results, err)


async def _run_rate(
    driver: Driver, arrivals: list[Arrival], rate: float, duration_s: float, results: Results, err: Console
) -> None:
    clock = asyncio.get_running_loop()
    started = clock.time()
    progress = Progress(driver, results.goals, f"{rate:.3g} requests/s", len(arrivals))

    def shown() -> Table:
        return progress.line(clock.time() - started, duration_s)

    try:
        with Live(console=err, refresh_per_second=REFRESH_PER_S, get_renderable=shown, transient=True):
            await driver.run(arrivals)
    finally:
        results.add(driver.exchanges, rate, min(duration_s, clock.time() - started))  # less if it was interrupted


class Progress:
    """What is shown while a load runs. It looks at each outcome once: this process has its requests to send."""

    def __init__(self, driver: Driver, goals: Mapping[str, Slo], title: str, due: int) -> None:
        self._driver = driver
        self._goals = goals
        self._title = title
        self._due = due
        self._seen = self._attained = 0
        self._results: Counter[str] = Counter()

    def line(self, elapsed_s: float, duration_s: float) -> Table:
        for each in self._driver.exchanges[self._seen :]:
            self._seen += 1
            self._results[each.result] += 1
            self._attained += each.attains(self._goals[each.arrival.slo_class])
        ok, dropped = self._results[OK], self._results[DROPPED]
        failed = self._seen - ok - dropped
        grid = Table.grid(padding=(0, 2))
        grid.add_row(
            self._title,
            ProgressBar(total=duration_s, completed=min(elapsed_s, duration_s), width=16),
            f"{self._seen + self._driver.in_flight}/{self._due} due",
            f"{self._driver.in_flight} open",
            f"[green]{ok} ok[/]",
            f"[red]{failed} failed[/]" if failed else "",
            f"[red]{dropped} dropped[/]" if dropped else "",
            f"{self._attained / self._seen:.0%} in goal" if self._seen else "",
        )
        return grid


# --- what is left ---------------------------------------------------------------------------------------------------


def _tell_faults(exchanges: list[Exchange], err: Console) -> None:
    for kind, count in failures(exchanges).most_common():
        err.print(f"{count} {'' if kind == CANCELLED else 'failed: '}{kind}", highlight=False)
    late = report.lateness([each for each in exchanges if each.result == OK])
    if late:
        err.print(f"[yellow]{late}[/]", highlight=False)


def _write(folder: Path, results: Results, err: Console) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        report.write_requests(folder / "requests.csv", results.exchanges)
        report.write_summary(folder / "summary.csv", results.rows)
        plot = _plotter()
        if plot is not None:
            plot(folder, results)
    except OSError as error:
        err.print(f"[red]error:[/] the results cannot be written: {error}", highlight=False)
        raise typer.Exit(1) from error
    plots = "" if plot else "; no plots without matplotlib: pip install 'tidemill[plots]'"
    err.print(f"written to {folder}{plots}", highlight=False)


def _plotter() -> Callable[[Path, Results], None] | None:
    """None where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from cluster.bench.plots import by_class, plot_distributions, plot_rates  # noqa: PLC0415 - an extra, and slow to import

    def plot(folder: Path, results: Results) -> None:
        plot_rates(folder / "rates.png", by_class(results.rows))
        plot_distributions(folder / "latencies.png", results.exchanges, results.goals)

    return plot
