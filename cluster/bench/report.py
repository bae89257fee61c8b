"""Results as a table for people and as CSV for everything else."""

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from rich.table import Table

from cluster.bench.summary import PERCENTS, ClassSummary, Exchange

LATE_S = 0.05  # a client that sends the 99th of 100 requests so late is itself a bottleneck


def table(rows: Iterable[ClassSummary]) -> Table:
    """Fits a terminal of 80 columns."""
    found = Table(box=None, padding=(0, 1, 0, 0), header_style="bold underline")
    headers = ("rate", "class", "sent", "ok", "fail", "drop", "goal", "good/s", "TTFT, ms", "TPOT, ms")
    for header in headers:
        found.add_column(header, justify="left" if header == "class" else "right", no_wrap=True)
    for row in rows:
        found.add_row(
            f"{row.rate:.3g}",
            row.slo_class,
            str(row.sent),
            str(row.ok),
            _or_dash(row.failed),
            _or_dash(row.dropped),
            "-" if math.isnan(row.attainment) else f"{row.attainment:.1%}",
            f"{row.goodput:.2f}",
            _milliseconds(row.ttft_s, 0),
            _milliseconds(row.tpot_s, 0 if row.tpot_s[0] > 0.1 else 1),
        )
    ranks = "/".join(f"p{percent}" for percent in PERCENTS)
    found.caption = (
        f"TTFT and TPOT: {ranks} of answers in full; goal: share of all that were due which met both goals; "
        "good/s: how many a second did"
    )
    found.caption_justify = "left"
    return found


def _or_dash(count: int) -> str:
    return str(count) if count else "-"


def _milliseconds(values: Sequence[float], digits: int) -> str:
    return "-" if any(math.isnan(value) for value in values) else "/".join(f"{v * 1e3:.{digits}f}" for v in values)


def lateness(exchanges: Sequence[Exchange]) -> str | None:
    """A warning, if the client itself was too slow."""
    late_s = float(np.percentile([each.sent_late_s for each in exchanges], 99)) if exchanges else 0.0
    if late_s < LATE_S:
        return None
    return f"1 request of 100 was sent more than {late_s * 1e3:.0f} ms late: this client is a part of what was measured"


def write_requests(path: Path, exchanges: Iterable[Exchange]) -> None:
    """One line a request, in the order they were due. Times in seconds; empty: there was none."""
    rows = []
    for each in sorted(exchanges, key=lambda each: (each.rate, each.number)):
        row = asdict(each)
        arrival = row.pop("arrival")
        arrival["wanted_tokens"] = arrival.pop("output_tokens")
        rows.append(_rounded({"rate": row.pop("rate"), "number": row.pop("number")} | arrival | row))
    write_rows(path, rows)


def write_summary(path: Path, summaries: Iterable[ClassSummary]) -> None:
    """One line for each rate and class. Times in seconds."""
    write_rows(path, [summary_row(each) for each in summaries])


def summary_row(summary: ClassSummary) -> dict[str, object]:
    """By column."""
    row = asdict(summary) | {"failed": summary.failed, "dropped": summary.dropped}
    for name in ("ttft_s", "tpot_s"):
        values = row.pop(name)
        row |= {f"{name[:-2]}_p{percent}_s": value for percent, value in zip(PERCENTS, values, strict=True)}
    return _rounded(row)


def _rounded(row: dict[str, object]) -> dict[str, object]:
    """Microseconds are enough; NaN becomes empty."""

    def shown(value: object) -> object:
        if not isinstance(value, float):
            return value
        return "" if math.isnan(value) else round(value, 6)

    return {name: shown(value) for name, value in row.items()}


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Columns are those of the first row."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)
