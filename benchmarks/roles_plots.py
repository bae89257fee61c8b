"""What happened while roles followed the traffic: as CSV, and as a picture over time."""

import csv
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from cluster.sim.cluster import Look
from cluster.sim.traffic import Arrival
from tidemill.core.model import Role

BIN_S = 5.0
ROLE_COLORS = {Role.PREFILL: "#E69F00", Role.DRAFT: "#CC79A7", Role.VERIFY: "#0072B2"}  # Okabe and Ito's
WAY_STYLES = (
    {"color": "#111111", "linewidth": 2.0, "zorder": 3},
    {"color": "#D55E00", "linewidth": 1.3},
    {"color": "#56B4E9", "linewidth": 1.3},
)
GREY = "#666666"


@dataclass(frozen=True, slots=True)
class Served:
    """A request that has ended: when it came, in which part of the traffic, and whether it met both its goals."""

    at_s: float
    phase: str
    met: bool


@dataclass(frozen=True, slots=True)
class Run:
    """One way of using the workers, on one traffic. `changes`: when, what, why."""

    way: str
    served: Sequence[Served]
    looks: Sequence[Look]
    changes: Sequence[tuple[float, str, str]] = field(default_factory=tuple)

    def attainment(self, since_s: float, phase: str | None = None) -> float:
        """Of requests that arrived in a phase, and not before `since_s`."""
        met = [each.met for each in self.served if phase in (None, each.phase) and each.at_s >= since_s]
        return sum(met) / len(met) if met else float("nan")

    def most_waiting(self) -> list[tuple[float, int]]:
        """(middle of half a bin, requests that waited then at most)."""
        width_s = BIN_S / 2
        by_half = itertools.groupby(self.looks, key=lambda look: int(look.at_s // width_s))
        return [((index + 0.5) * width_s, max(look.waiting for look in looks)) for index, looks in by_half]

    def attainment_over_time(self) -> list[tuple[float, float]]:
        """(middle of the bin, share in their goals of those that arrived in it)."""
        bins: dict[int, list[bool]] = {}
        for each in self.served:
            bins.setdefault(int(each.at_s // BIN_S), []).append(each.met)
        return [((index + 0.5) * BIN_S, sum(met) / len(met)) for index, met in sorted(bins.items())]


def asked(arrivals: Iterable[Arrival]) -> list[tuple[float, float, float]]:
    """(middle of the bin, prompt tokens a second, output tokens a second)."""
    bins: dict[int, list[Arrival]] = {}
    for each in arrivals:
        bins.setdefault(int(each.at_s // BIN_S), []).append(each)
    return [
        (
            (index + 0.5) * BIN_S,
            sum(each.prompt_tokens for each in of) / BIN_S,
            sum(each.output_tokens for each in of) / BIN_S,
        )
        for index, of in sorted(bins.items())
    ]


# --- CSV --------------------------------------------------------------------------------------------------------


def write_timeline(path: Path, runs: Iterable[Run], arrivals: Sequence[Arrival]) -> None:
    """A line for each way and BIN_S seconds; roles and queue are those at the bin's beginning."""
    traffic = {at_s: (prompts, outputs) for at_s, prompts, outputs in asked(arrivals)}
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["way", "at_s", "prompt_tokens_per_s", "output_tokens_per_s", *Role, "waiting", "decoding", "in_goal"]
        )
        for run in runs:
            for at_s, share in run.attainment_over_time():
                look = next((each for each in run.looks if each.at_s >= at_s - BIN_S / 2), run.looks[-1])
                prompts, outputs = traffic.get(at_s, (0.0, 0.0))
                counts = [look.roles.get(role, 0) for role in Role]
                numbers = [f"{at_s - BIN_S / 2:g}", f"{prompts:.0f}", f"{outputs:.0f}"]
                writer.writerow([run.way, *numbers, *counts, look.waiting, look.decoding, f"{share:.4f}"])


# --- picture ----------------------------------------------------------------------------------------------------


def draw(path: Path, title: str, runs: Sequence[Run], arrivals: Sequence[Arrival]) -> None:
    """Traffic, the first run's roles, and everybody's queue and attainment, above each other."""
    figure = Figure(figsize=(10.0, 8.4), layout="constrained")  # no pyplot: it would look for a display
    axes: Sequence[Axes] = figure.subplots(4, 1, sharex=True, height_ratios=(2, 2, 2, 3))
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    _traffic(axes[0], arrivals)
    _roles(axes[1], runs[0])
    for run, style in zip(runs, WAY_STYLES, strict=False):
        _line(axes[2], [(at_s, max(most, 0.8)) for at_s, most in run.most_waiting()], run.way, style)
        overall = f"{run.way}: {run.attainment(0.0):.0%}"
        _line(axes[3], [(at_s, 100 * share) for at_s, share in run.attainment_over_time()], overall, style)
    axes[2].set(yscale="log", ylim=(0.8, None), ylabel="at most so many wait\nfor their first token")
    axes[2].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes[3].set(ylim=(-3, 103), ylabel="in both goals, %\n(by time of arrival)", xlabel="seconds")
    axes[3].set_xlim(0, arrivals[-1].at_s)
    for axis in axes:
        _finish(axis, runs[0])
    figure.align_ylabels(axes)
    figure.savefig(path, dpi=150)


def _traffic(axis: Axes, arrivals: Sequence[Arrival]) -> None:
    rows = asked(arrivals)
    for place, name, color in ((1, "prompt", Role.PREFILL), (2, "output", Role.VERIFY)):
        values = [row[place] / 1e3 for row in rows]
        axis.plot([row[0] for row in rows], values, color=ROLE_COLORS[color], label=f"{name} tokens", linewidth=1.6)
    axis.set(ylim=(0, None), ylabel="asked for,\nthousand tokens / s")


def _roles(axis: Axes, run: Run) -> None:
    at = [each.at_s for each in run.looks]
    used = [role for role in (Role.VERIFY, Role.DRAFT, Role.PREFILL) if any(each.roles.get(role) for each in run.looks)]
    counts = [[each.roles.get(role, 0) for each in run.looks] for role in used]
    axis.stackplot(
        at, counts, labels=[str(role) for role in used], colors=[ROLE_COLORS[role] for role in used], step="post"
    )
    axis.set(ylim=(0, max(sum(of) for of in zip(*counts, strict=True))), ylabel=f"workers,\n{run.way}")


def _line(axis: Axes, points: Sequence[tuple[float, float]], label: str, style: Mapping[str, object]) -> None:
    axis.plot([x for x, _ in points], [y for _, y in points], label=label, **style)  # type: ignore[arg-type]


def _finish(axis: Axes, live: Run) -> None:
    """A faint line where roles changed; what is what stands to the right."""
    for at_s, _ in itertools.groupby(live.changes, key=lambda change: change[0]):
        axis.axvline(at_s, color=GREY, linewidth=0.7, linestyle=":", zorder=1)
    axis.grid(axis="y", alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8.5, colors=GREY)
    axis.yaxis.label.set(size=9, color=GREY)
    axis.xaxis.label.set(size=9, color=GREY)
    axis.legend(fontsize=8.5, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), reverse=True)
