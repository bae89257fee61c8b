"""How large the next drafts should be, if any: SmartSpec's goodput (arXiv 2406.14066) under AdaServe's load control.

SmartSpec: of all draft lengths k, 0 among them, take the one with the most expected tokens per second,

    goodput(k) = sum over requests of (1 - alpha^(k+1)) / (1 - alpha) / seconds of a round with k drafted tokens each.

Acceptance alone decides nothing: the same alpha that speeds up one request slows down thirty-two. AdaServe (EuroSys'26)
bounds depth and width by the number of requests: what a step verifies at almost no extra time is shared by all.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from tidemill.core.model import Decision
from tidemill.core.tree import Shape
from workers.speculation.step_time import StepTimes

Floats = npt.NDArray[np.float64]
NO_DRAFTS = Shape(0, 0, 0)


class DraftReason(StrEnum):
    """Why drafts have their shape."""

    GOODPUT = "goodput"  # the depth that promises the most tokens per second
    LOAD = "load"  # so does this one, among those that the number of requests allows
    KEPT = "kept"  # as before: another depth promises hardly more
    UNMEASURED = "unmeasured"  # step times are not known yet; the least depth
    NO_REQUESTS = "no_requests"
    NO_GAIN = "no_gain"  # every depth would slow the requests down
    PROBE = "probe"  # so it would, by old estimates; once in a while they are renewed


DRAFTING = frozenset({DraftReason.GOODPUT, DraftReason.LOAD, DraftReason.KEPT})


@dataclass(frozen=True, slots=True)
class LoadControl:
    """With n requests: depth = clip(max_depth, min_depth, floor(depth_rows / (n + depth_offset)) - 1) at most,
    width = clip(max_width, 1, floor(width_rows / n) + width_offset).

    AdaServe's D_max, D_min, B1, c1 and W_max, B2, c2. Raises ValueError if a bound is below 1, or max below min.
    """

    max_depth: int = 8
    min_depth: int = 1
    depth_rows: int = 256
    depth_offset: int = 0
    max_width: int = 3
    width_rows: int = 64
    width_offset: int = 0
    max_nodes: int = 24  # of one tree

    def __post_init__(self) -> None:
        if not 1 <= self.min_depth <= self.max_depth or min(self.max_width, self.max_nodes) < 1:
            raise ValueError(f"a draft has a level, a child and a node at least; got {self}")

    def depth(self, requests: int) -> int:
        """Levels a tree may have."""
        most = self.depth_rows // max(requests + self.depth_offset, 1) - 1
        return min(self.max_depth, max(self.min_depth, most))

    def shape(self, requests: int, depth: int) -> Shape:
        """A tree of this depth, as wide as there is room for."""
        width = min(self.max_width, max(1, self.width_rows // max(requests, 1) + self.width_offset))
        return Shape(depth, width, min(depth * width, self.max_nodes))


@dataclass(frozen=True, slots=True)
class Damping:
    """What keeps the decision from flapping.

    Drafting begins when it promises `start` times the tokens per second, and ends below 1. Its depth changes for
    `change` times as many. While there is none, every `probe_every`-th step has drafts all the same; 0: none has.
    """

    start: float = 1.05
    change: float = 1.03
    probe_every: int = 64


@dataclass(frozen=True, slots=True)
class Conditions:
    """What was measured. `alphas`: of each decoding request, the chance that one more drafted token is accepted."""

    alphas: Sequence[float]
    context: float  # tokens, summed over the decoding requests
    draft_step_s: float  # of the draft worker: one more token for all requests
    round_trip_s: float  # to the draft worker and back
    ahead: bool  # it drafts the next round while this one is verified


def draft_shape(
    conditions: Conditions,
    times: StepTimes,
    control: LoadControl,
    damping: Damping,
    previous: Decision[Shape] | None,
    step: int,
) -> Decision[Shape]:
    """The shape of the next drafts; NO_DRAFTS: none. `previous`: what this function said last; `step` counts its calls.

    Depth is decided for chains, so that with wider trees the gain is rather more; width is decided by load alone.
    """
    count = len(conditions.alphas)
    if not count:
        return Decision(NO_DRAFTS, DraftReason.NO_REQUESTS)
    if not times.ready:
        return Decision(control.shape(count, control.min_depth), DraftReason.UNMEASURED)
    most = control.depth(count)
    gains = speedups(conditions, times, most)
    best = 1 + int(np.argmax(gains[1:]))
    drafting = previous is not None and previous.reason in DRAFTING
    if gains[best] < (1.0 if drafting else damping.start):
        if damping.probe_every and step % damping.probe_every == 0:
            return Decision(control.shape(count, best), DraftReason.PROBE)
        return Decision(NO_DRAFTS, DraftReason.NO_GAIN)
    if drafting and previous is not None and previous.choice.depth <= most:
        kept = previous.choice.depth
        if kept != best and gains[kept] >= 1.0 and gains[best] < gains[kept] * damping.change:
            return Decision(control.shape(count, kept), DraftReason.KEPT)
    bounded = best == most < control.max_depth
    return Decision(control.shape(count, best), DraftReason.LOAD if bounded else DraftReason.GOODPUT)


def speedups(conditions: Conditions, times: StepTimes, max_depth: int) -> Floats:
    """Tokens per second with chains of 0, 1, ..., `max_depth` tokens, over those without: [max_depth + 1]."""
    depths = np.arange(max_depth + 1)
    tokens = (np.asarray(conditions.alphas)[:, None] ** depths).sum(axis=0).cumsum()
    steps = times.levels(len(conditions.alphas) * (1 + depths)) + times.slope * conditions.context * (1 + depths)
    steps += times.kv_slope * conditions.context
    drafts = depths * conditions.draft_step_s + conditions.round_trip_s
    rounds = np.maximum(steps, drafts) if conditions.ahead else steps + drafts
    rounds[0] = steps[0]
    goodput = tokens / rounds
    return np.asarray(goodput / goodput[0])


def verify_budget(times: StepTimes, requests: int, context: float, tolerance: float, max_rows: int) -> int:
    """Rows of the largest step that takes at most 1 + `tolerance` times as long as one with a row for each request.

    `context`: tokens, summed over the requests; more rows read it more often. From `requests` to `max_rows`.
    """
    least = max(requests, 1)
    attended = times.slope * context / least

    def seconds(rows: int) -> float:
        return times.level(rows) + attended * rows + times.kv_slope * context

    longest_s = seconds(least) * (1.0 + tolerance)
    return max(bisect_right(range(max_rows + 1), longest_s, lo=least, key=seconds) - 1, requests)
