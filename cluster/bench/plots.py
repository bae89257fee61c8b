"""Pictures of a load test: attainment and goodput against rate, and how TTFT and TPOT are distributed."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from cluster.bench.summary import ALL, OK, ClassSummary, Exchange
from tidemill import Slo

WIDE = (9.0, 3.6)  # inches


def by_class(rows: Iterable[ClassSummary]) -> dict[str, list[ClassSummary]]:
    """A line for each class."""
    lines: dict[str, list[ClassSummary]] = {}
    for row in rows:
        lines.setdefault(row.slo_class, []).append(row)
    return lines


def plot_rates(path: Path, lines: Mapping[str, Sequence[ClassSummary]], bold: str = ALL) -> None:
    """Against the rate offered: the share of requests in their goal, and how many that is a second."""
    figure, (left, right) = _two_axes()
    for name, rows in lines.items():
        style = {"color": "black", "linewidth": 2.0} if name == bold else {}
        rates = [row.rate for row in rows]
        left.plot(rates, [100 * row.attainment for row in rows], marker="o", label=name, **style)  # type: ignore[arg-type]
        right.plot(rates, [row.goodput for row in rows], marker="o", label=name, **style)  # type: ignore[arg-type]
    offered = [0.0, max(row.rate for rows in lines.values() for row in rows)]
    right.plot(offered, offered, linestyle=":", color="grey", label="offered")
    left.axhline(90, linestyle=":", color="grey")
    left.set(xlabel="requests / s", ylabel="in their goal, %", xlim=(0, None), ylim=(-3, 103))
    right.set(xlabel="requests / s", ylabel="goodput, requests / s", xlim=(0, None), ylim=(0, None))
    _finish(figure, (left, right), path)


def plot_distributions(path: Path, exchanges: Iterable[Exchange], goals: Mapping[str, Slo]) -> None:
    """CDFs over answers in full: a line for each rate, or, if there is one only, for each class, with its goal."""
    answered = [each for each in exchanges if each.result == OK]
    rates = sorted({each.rate for each in answered})
    figure, axes = _two_axes()
    for axis, field, label in zip(axes, ("ttft_s", "tpot_s"), ("TTFT", "TPOT"), strict=True):
        if len(rates) > 1:
            for index, rate in enumerate(rates):
                color = mpl.colormaps["viridis"](index / len(rates))
                _cdf(axis, [getattr(e, field) for e in answered if e.rate == rate], f"{rate:.3g} / s", color)
        else:
            for index, (name, goal) in enumerate(goals.items()):
                color = mpl.colormaps["tab10"](index)
                _cdf(axis, [getattr(e, field) for e in answered if e.arrival.slo_class == name], name, color)
                axis.axvline(1e3 * getattr(goal, field), linestyle=":", color=color)
        axis.set(xlabel=f"{label}, ms", ylabel="share of requests, %", ylim=(0, 101), xscale="log")
        _mark_plainly(axis)
    _finish(figure, axes, path)


def _mark_plainly(axis: Axes) -> None:
    """A logarithmic axis says 20, 50, 100 instead of powers of ten, and something however little of it is shown."""
    low, high = axis.get_xlim()
    subs = (1.0, 2.0, 5.0) if high < 200 * low else (1.0,)
    axis.xaxis.set_major_locator(LogLocator(subs=subs) if high > 5 * low else MaxNLocator(5))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())


def _cdf(axis: Axes, seconds: Iterable[float], label: str, color: tuple[float, float, float, float]) -> None:
    ranked = sorted(1e3 * each for each in seconds if each > 0)  # a single token has no TPOT
    shares = [100 * (index + 1) / len(ranked) for index in range(len(ranked))]
    axis.step([*ranked[:1], *ranked], [0.0, *shares] if ranked else [], where="post", label=label, color=color)


def _two_axes() -> tuple[Figure, tuple[Axes, Axes]]:
    figure = Figure(figsize=WIDE, layout="constrained")  # no pyplot: it would look for a display
    left, right = figure.subplots(1, 2)
    return figure, (left, right)


def _finish(figure: Figure, axes: Iterable[Axes], path: Path) -> None:
    for axis in axes:
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="small", frameon=False)
    figure.savefig(path, dpi=150)
