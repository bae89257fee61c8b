"""Which drafted nodes a step verifies: AdaServe's SLO-customized selection (EuroSys'26), stopped by goodput.

    1  every request gets its root's row
    2  in descending need, each gets its likeliest nodes until as many tokens are expected as its goal needs
    3  the likeliest nodes that are left, of all requests, for as long as they raise the expected tokens per second

A node's value is the chance of its whole path, so a request's expected tokens are 1 + the sum of its nodes' values. The
value never rises along a path: the likeliest nodes of a tree are always connected.

What differs from the paper: step 3 has a stop. And a request whose goal is out of reach has the greatest need of all;
lest it take everybody's rows for nothing it gets no more than an equal part of them in step 2. The paper's cap of the
need at depth + 1 needs no check, since the values of a level add up to 1 at most.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain

import numpy as np
import numpy.typing as npt

from tidemill.core.model import Decision
from tidemill.core.tree import TokenTree
from workers.speculation.step_time import StepTimes

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.intp]
_ROUNDING = 1e-9  # tokens: what sums of chances may be off by


class Reason(StrEnum):
    """Why a node is verified."""

    NEEDED = "needed"  # by its request's goal
    SURPLUS = "surplus"  # it raises the step's goodput


class Stop(StrEnum):
    """Why no more nodes are verified."""

    EXHAUSTED = "exhausted"  # there are none
    BUDGET = "budget"
    GOODPUT = "goodput"  # more would cost more than they bring


@dataclass(frozen=True, slots=True)
class Candidate:
    """A decoding request. `tree` has calibrated chances; each of its rows attends to about `context` tokens."""

    tree: TokenTree
    context: int
    need: float = 1.0  # tokens this step should yield; without a goal it is the one that it always yields


@dataclass(frozen=True, slots=True)
class Budget:
    """Rows of a step, roots included. There is a root's row for each request even if they are more."""

    rows: int  # for what goals need: see goodput.verify_budget
    max_rows: int  # in all, `rows` or more
    tree_nodes: int  # of one request, without its root


@dataclass(frozen=True, slots=True)
class Selection:
    """Nodes to verify of each candidate's tree, likeliest first, and so parents before children."""

    nodes: tuple[tuple[int, ...], ...]
    needed: tuple[int, ...]  # how many of them, from the first, are there because of the goal; the others are surplus
    unmet: tuple[int, ...]  # candidates from which fewer tokens are expected than they need
    tokens: float  # expected of the step
    rows: int

    def count(self, reason: Reason) -> int:
        """Nodes chosen for this reason."""
        needed = sum(self.needed)
        return needed if reason is Reason.NEEDED else self.rows - len(self.nodes) - needed


def need(elapsed_s: float, round_s: float, tpot_goal_s: float, decoded: int) -> float:
    """Tokens a request must gain in a round of `round_s` to be on time after it; less than 1 if it is ahead.

    `elapsed_s` since its first decode step began, in which `decoded` tokens came.
    """
    return (elapsed_s + round_s) / tpot_goal_s - decoded


def select(
    candidates: Sequence[Candidate], times: StepTimes, budget: Budget, overhead_s: float = 0.0
) -> Decision[Selection]:
    """Choose for one step. `overhead_s`: seconds of a round that are not the step's.

    While `times` is not ready, goodput is unknown, and `budget.rows` are all there is.
    """
    if not candidates:
        return Decision(Selection((), (), (), 0.0, 0), Stop.EXHAUSTED)
    count = len(candidates)
    order, values = _ranked(candidates, budget.tree_nodes)
    gains = values.cumsum(axis=1)
    needs = np.array([each.need for each in candidates])
    needed = _needed(values, gains, needs, max(budget.rows - count, 0))
    chosen, stop = _surplus(candidates, values, needed, times, budget, overhead_s)
    expected = 1.0 + np.where(chosen > 0, gains[np.arange(count), chosen - 1], 0.0)
    unmet = np.flatnonzero(expected < needs - _ROUNDING)
    ends = chosen.tolist()
    selection = Selection(
        tuple([tuple(nodes[:end]) for nodes, end in zip(order.tolist(), ends, strict=True)]),
        tuple(needed.tolist()),
        tuple(unmet.tolist()),
        float(expected.sum()),
        count + sum(ends),
    )
    return Decision(selection, stop)


def _ranked(candidates: Sequence[Candidate], most: int) -> tuple[Ids, Floats]:
    """Of each tree the `most` likeliest nodes, likeliest first, and their values: both [candidates, nodes].

    Trees with fewer nodes have values of 0 at the end. Of equals the first comes first, and so a parent.
    """
    sizes = np.array([len(each.tree.tokens) for each in candidates])
    values = np.zeros((len(candidates), max(int(sizes.max()), 1)))
    filled = np.arange(values.shape[1]) < sizes[:, None]
    values[filled] = list(chain.from_iterable([each.tree.path_chances() for each in candidates]))
    order = np.argsort(-values, axis=1, kind="stable")[:, : max(most, 1)]
    values = values[np.arange(len(candidates))[:, None], order]
    return order, values if most > 0 else np.zeros_like(values)


def _needed(values: Floats, gains: Floats, needs: Floats, room: int) -> Ids:
    """How many nodes of each request are due to its goal, `room` at most in all."""
    lacking = needs - 1.0 - _ROUNDING  # beyond the token that every request gets
    wanted = ((gains - values < lacking[:, None]) & (values > 0.0)).sum(axis=1)
    out_of_reach = gains[:, -1] < lacking
    wanted = np.where(out_of_reach, np.minimum(wanted, room // len(needs)), wanted)
    tightest = np.argsort(-needs, kind="stable")
    before = wanted[tightest].cumsum() - wanted[tightest]
    needed = np.empty_like(wanted)
    needed[tightest] = np.clip(room - before, 0, wanted[tightest])
    return needed


def _surplus(
    candidates: Sequence[Candidate], values: Floats, needed: Ids, times: StepTimes, budget: Budget, overhead_s: float
) -> tuple[Ids, Stop]:
    """How many nodes of each request are chosen in all, and why no more are.

    Goodput need not rise and fall once as nodes are added, likeliest first, since a step's duration has steps of its
    own; so it is computed for every number of them.
    """
    count, width = values.shape
    taken = np.arange(width) < needed[:, None]
    left = np.where(taken, 0.0, values).ravel()
    rows = count + int(needed.sum())
    room = max((budget.max_rows if times.ready else budget.rows) - rows, 0)
    available = int(np.count_nonzero(left))
    likeliest = np.argsort(-left, kind="stable")[: min(room, available)]
    owners, stop = likeliest // width, Stop.BUDGET if room < available else Stop.EXHAUSTED
    if times.ready:
        contexts = np.array([float(each.context) for each in candidates])
        attended = float(contexts @ (needed + 1)) + np.concatenate(([0.0], contexts[owners].cumsum()))
        seconds = (
            times.levels(np.arange(rows, rows + owners.size + 1))
            + times.slope * attended
            + times.kv_slope * contexts.sum()
            + overhead_s
        )
        tokens = count + float(values[taken].sum()) + np.concatenate(([0.0], left[likeliest].cumsum()))
        best = int(np.argmax(tokens / seconds))
        if best < owners.size:
            owners, stop = owners[:best], Stop.GOODPUT
    return needed + np.bincount(owners, minlength=count), stop
