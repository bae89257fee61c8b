"""What became of the requests, and what that says: attainment, goodput, percentiles. Pure.

A request attains its goal if it was answered in full with both TTFT and TPOT within those of its class. Goodput counts
such requests per second. Whatever was due counts, whether it failed or was never sent; only what the user cancelled
does not.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.bench.arrivals import Arrival
from tidemill import Slo

OK, DROPPED, CANCELLED = "ok", "dropped", "cancelled"  # results beside the kinds of errors
ALL = "all"
PERCENTS = (50, 90, 99)
Percentiles = tuple[float, ...]  # one for each of PERCENTS; NaN if there is nothing to rank


@dataclass(frozen=True, slots=True)
class Exchange:
    """What became of one request. Times in seconds from when it was due, so that a late client is no excuse."""

    number: int
    rate: float  # of the load it was a part of
    arrival: Arrival
    result: str  # OK, DROPPED: too many in flight, CANCELLED by the user, or the kind of an error
    sent_late_s: float = 0.0
    ttft_s: float | None = None
    tpot_s: float | None = None  # mean over the tokens after the first; 0 with fewer than two
    total_s: float | None = None
    output_tokens: int = 0  # that came
    accepted_per_verify: float = 0.0
    retries: int = 0
    prefill_worker: str = ""
    draft_worker: str = ""
    verify_worker: str = ""

    def attains(self, goal: Slo) -> bool:
        if self.result != OK or self.ttft_s is None or self.tpot_s is None:
            return False
        return self.ttft_s <= goal.ttft_s and self.tpot_s <= goal.tpot_s


@dataclass(frozen=True, slots=True)
class ClassSummary:
    """One class at one rate. Percentiles are over answers in full."""

    rate: float
    slo_class: str
    due: int
    sent: int
    ok: int
    attainment: float  # share of those due; NaN if none was
    goodput: float  # requests a second
    output_tokens_per_s: float
    ttft_s: Percentiles
    tpot_s: Percentiles

    @property
    def dropped(self) -> int:
        return self.due - self.sent

    @property
    def failed(self) -> int:
        return self.sent - self.ok


def summarise(
    exchanges: Iterable[Exchange], goals: Mapping[str, Slo], rate: float, duration_s: float
) -> list[ClassSummary]:
    """Each class in the order of the goals, and then ALL if there are several. `duration_s`: that arrivals lasted."""
    counted = [each for each in exchanges if each.result != CANCELLED]
    rows = []
    for name in goals:
        own = [each for each in counted if each.arrival.slo_class == name]
        rows.append(_summary(own, name, goals, rate, duration_s))
    return rows if len(rows) == 1 else [*rows, _summary(counted, ALL, goals, rate, duration_s)]


def _summary(
    exchanges: Sequence[Exchange], name: str, goals: Mapping[str, Slo], rate: float, duration_s: float
) -> ClassSummary:
    answered = [each for each in exchanges if each.result == OK]
    attained = sum(each.attains(goals[each.arrival.slo_class]) for each in exchanges)
    return ClassSummary(
        rate=rate,
        slo_class=name,
        due=len(exchanges),
        sent=sum(each.result != DROPPED for each in exchanges),
        ok=len(answered),
        attainment=attained / len(exchanges) if exchanges else float("nan"),
        goodput=attained / duration_s,
        output_tokens_per_s=sum(each.output_tokens for each in exchanges) / duration_s,
        ttft_s=percentiles([each.ttft_s for each in answered if each.ttft_s is not None]),
        tpot_s=percentiles([each.tpot_s for each in answered if each.tpot_s is not None]),
    )


def percentiles(values: Sequence[float]) -> Percentiles:
    """Linear between the closest ranks."""
    if not values:
        return (float("nan"),) * len(PERCENTS)
    return tuple(float(value) for value in np.percentile(values, PERCENTS))


def failures(exchanges: Iterable[Exchange]) -> Counter[str]:
    """How often each result but OK occurred."""
    return Counter(each.result for each in exchanges if each.result != OK)
