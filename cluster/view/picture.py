"""The picture of the cluster in a terminal, down to 80 columns and 24 lines."""

from collections.abc import Sequence
from datetime import datetime

from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from tidemill.core.picture import ClassLine, DecisionLine, Picture, PoolLine, Series, WorkerLine

BLOCKS = "▁▂▃▄▅▆▇█"
NOTHING = "·"
GOOD, FAIR = 0.99, 0.9
STATE_STYLES = {"serving": "green", "draining": "yellow", "stalled": "bold red", "unreachable": "bold red"}
ROLE_STYLES = {"prefill": "yellow", "draft": "magenta", "verify": "cyan"}
MOST_CLASSES = 5
LEAST_DECISIONS = 2
FIXED_LINES = 6  # title, tokens, three rules, the workers' heading


def draw_picture(picture: Picture, height: int = 24) -> RenderableType:
    """At most `height` lines; of workers and decisions so many as there is room for."""
    classes = picture.classes[:MOST_CLASSES]
    room = height - FIXED_LINES - max(len(classes), 1)
    pools = [pool for pool in picture.pools if pool.workers]
    wanted = len(pools) + len(picture.workers)
    rows = min(wanted, max(room - LEAST_DECISIONS, len(pools) + 1))
    decisions = picture.decisions[: max(room - rows, 0)]
    return Group(
        _title(picture),
        _tokens(picture),
        Rule("workers", align="left", style="dim"),
        _workers(pools, picture.workers, rows),
        Rule("goals kept, last minute; requests, TTFT, TPOT", align="left", style="dim"),
        _classes(classes),
        Rule("decisions" if picture.front.rebalances else "decisions: roles are left alone", align="left", style="dim"),
        *[_decision(each) for each in decisions],
    )


def sparkline(series: Series, top: float) -> str:
    """One character a point: eighths of `top`, and a dot where nothing could be measured."""
    return "".join(
        NOTHING if each is None else BLOCKS[round(min(max(each / top, 0.0), 1.0) * (len(BLOCKS) - 1))]
        for each in series
    )


def bar(share: float, width: int) -> str:
    filled = round(min(max(share, 0.0), 1.0) * width)
    return "━" * filled + "╌" * (width - filled)


def percent(share: float | None) -> str:
    """Rounded down, so that 100 % means all."""
    return "-" if share is None else f"{int(100 * share + 1e-9)}%"


def millis(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return (
        f"{seconds:.1f}s" if seconds >= 10 else f"{1e3 * seconds:.0f}ms" if seconds >= 0.1 else f"{1e3 * seconds:.1f}ms"
    )


def _grade(share: float | None) -> str:
    return "dim" if share is None else "green" if share >= GOOD else "yellow" if share >= FAIR else "red"


def _line(*parts: tuple[str, str]) -> Text:
    return Text.assemble(*parts, no_wrap=True, overflow="ellipsis")


def _title(picture: Picture) -> Text:
    front = picture.front
    when = datetime.fromtimestamp(picture.at).strftime("%H:%M:%S")
    return _line((f"tidemill {front.cluster}", "bold"), (f"  {front.model} at {front.address}  ", ""), (when, "dim"))


def _tokens(picture: Picture) -> Text:
    front, full = picture.front, picture.tokens[:-1]
    return _line(
        (f"{picture.tokens_per_s:,.0f} tok/s ", "bold cyan"),
        (sparkline(full, max([each or 0.0 for each in full], default=0.0) or 1.0), "cyan"),
        (f"  {picture.arrivals_per_s:.1f} req/s  {front.active} active  {front.queued} queued", ""),
    )


def _workers(pools: Sequence[PoolLine], workers: Sequence[WorkerLine], rows: int) -> RenderableType:
    """A line for each pool, and lines for its workers: in every pool alike many, if not all have room."""
    if not workers:
        return Text("no worker has reported yet", style="dim")
    table = Table(box=None, pad_edge=False, expand=True, padding=(0, 1, 0, 0), header_style="dim")
    table.add_column("role and worker", no_wrap=True, ratio=1)
    table.add_column("state", no_wrap=True, width=11)
    for heading, width in (("run", 4), ("queue", 5), ("KV", 14), ("step", 7), ("busy", 4), ("tok/s", 7)):
        table.add_column(heading, no_wrap=True, justify="left" if heading == "KV" else "right", width=width)
    room = _shared_out([sum(each.role == pool.role for each in workers) for pool in pools], rows - len(pools))
    for pool, shown in zip(pools, room, strict=True):
        ours = [each for each in workers if each.role == pool.role]
        hidden = f" +{len(ours) - shown} more" if shown < len(ours) else ""
        table.add_row(
            *(f"{pool.role} ({pool.workers}){hidden}", f"{pool.serving} serving", f"{pool.running}", f"{pool.queued}"),
            *(_kv(pool.kv_share), "", percent(pool.busy_share), "" if pool.role == "draft" else f"{pool.rate:,.0f}"),
            style=f"bold {ROLE_STYLES[pool.role]}",
        )
        for each in sorted(ours, key=lambda worker: worker.state == "serving")[:shown]:  # those in trouble first
            table.add_row(
                *(f"  {each.worker.partition('@')[0]}", Text(each.state, style=STATE_STYLES[each.state])),
                *(f"{each.running}", f"{each.queued}", _kv(each.kv_share), millis(each.step_s)),
                *(percent(each.busy_share), "" if each.role == "draft" else f"{each.tokens_per_s:,.0f}"),
            )
    return table


def _shared_out(wanted: Sequence[int], room: int) -> list[int]:
    given = [0] * len(wanted)
    while room > 0 and given != list(wanted):
        for index, most in enumerate(wanted):
            if given[index] < most and room > 0:
                given[index] += 1
                room -= 1
    return given


def _kv(share: float) -> str:
    return f"{bar(share, 8)} {percent(share):>4}"


def _classes(classes: Sequence[ClassLine]) -> RenderableType:
    if not classes:
        return Text("no request has come yet", style="dim")
    table = Table.grid(expand=True, padding=(0, 1, 0, 0))
    for width, justify in ((10, "left"), (4, "right"), (10, "left"), (30, "left"), (None, "left")):
        table.add_column(no_wrap=True, width=width, overflow="ellipsis", justify=justify)  # type: ignore[arg-type]
    for each in classes:
        grade = _grade(each.attainment)
        table.add_row(
            Text(each.name, style="bold"),
            Text(percent(each.attainment), style=grade),
            Text(bar(each.attainment or 0.0, 10), style=grade),
            Text(sparkline(each.series, 1.0), style=grade),
            f"{each.arrived} {millis(each.ttft_s)} {millis(each.tpot_s)}",
        )
    return table


def _decision(decision: DecisionLine) -> Text:
    when = datetime.fromtimestamp(decision.at).strftime("%H:%M:%S")
    said = "; ".join(decision.changes).replace("->", "→")
    loads = ", ".join(f"{role} {load:.2f}" for role, load in decision.loads.items())
    return _line(
        (f"{when} ", "dim"),
        (decision.reason.replace("_", " "), "bold" if decision.changes else "dim"),
        (f"  {said}" if said else "", "cyan"),
        (f"  load {loads}" if loads else "", "dim"),
    )
