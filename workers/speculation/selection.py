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

from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from tidemill.core.model import Decision
from workers.speculation.branches import Floats, Ids, Weights
from workers.speculation.step_time import StepTimes

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
class Candidates:
    """The decoding requests, [requests], one at least, and a branch for each."""

    weights: Weights  # of their branches' nodes
    contexts: Floats  # tokens that each of a request's rows attends to
    needs: Floats  # tokens this step should yield; without a goal it is the one that it always yields


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
    expected: tuple[float, ...]  # tokens of each candidate, one of which needs no node
    unmet: tuple[int, ...]  # candidates from which fewer are expected than they need
    rows: int

    def count(self, reason: Reason) -> int:
        """Nodes chosen for this reason."""
        needed = sum(self.needed)
        return needed if reason is Reason.NEEDED else self.rows - len(self.nodes) - needed


def select(candidates: Candidates, times: StepTimes, budget: Budget, overhead_s: float = 0.0) -> Decision[Selection]:
    """Choose for one step. `overhead_s`: seconds of a round that are not the step's.

    While `times` is not ready, goodput is unknown, and `budget.rows` are all there is.
    """
    count, needs = candidates.needs.size, candidates.needs
    order, values = _ranked(candidates.weights, budget.tree_nodes)
    gains = values.cumsum(axis=1)
    needed = _needed(values, gains, needs, max(budget.rows - count, 0))
    chosen, stop = _surplus(values, candidates.contexts, needed, times, budget, overhead_s)
    expected = 1.0 + np.where(chosen > 0, gains[np.arange(count), chosen - 1], 0.0)
    ends = chosen.tolist()
    selection = Selection(
        tuple([tuple(nodes[:end]) for nodes, end in zip(order.tolist(), ends, strict=True)]),
        tuple(needed.tolist()),
        tuple(expected.tolist()),
        tuple(np.flatnonzero(expected < needs - _ROUNDING).tolist()),
        count + sum(ends),
    )
    return Decision(selection, stop)


def _ranked(weights: Weights, most: int) -> tuple[Ids, Floats]:
    """Of each tree the `most` likeliest nodes, likeliest first, and their values: both [candidates, nodes].

    Trees with fewer nodes have values of 0 at the end. Of equals the first comes first, and so a parent.
    """
    places = np.arange(weights.values.size) - weights.firsts
    values = np.zeros((weights.branches, int(places.max()) + 1))
    values[weights.owners, places] = weights.values
    order = np.argsort(-values, axis=1, kind="stable")[:, : max(most, 1)]
    values = values.ravel()[order + (np.arange(weights.branches) * values.shape[1])[:, None]]
    return order - 1, values if most > 0 else np.zeros_like(values)


def _needed(values: Floats, gains: Floats, needs: Floats, room: int) -> Ids:
    """How many nodes of each request are due to its goal, `room` at most in all. `values`, `gains`: their sums."""
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
    values: Floats, contexts: Floats, needed: Ids, times: StepTimes, budget: Budget, overhead_s: float
) -> tuple[Ids, Stop]:
    """How many nodes of each request are chosen in all, and why no more are.

    Goodput need not rise and fall once as nodes are added, likeliest first, since a step's duration has steps of its
    own; so it is computed for every number of them.
    """
    count, width = values.shape
    due = np.arange(width) < needed[:, None]
    left = np.where(due, 0.0, values).ravel()
    rows = count + int(needed.sum())
    room = max((budget.max_rows if times.ready else budget.rows) - rows, 0)
    open_nodes = np.flatnonzero(left)
    likeliest = open_nodes[np.argsort(-left[open_nodes], kind="stable")[:room]]
    owners, stop = likeliest // width, Stop.BUDGET if room < open_nodes.size else Stop.EXHAUSTED
    if times.ready:
        seconds = (
            times.levels(np.arange(rows, rows + owners.size + 1))
            + times.slope * (float(contexts @ (needed + 1)) + _sums(contexts[owners]))
            + times.kv_slope * contexts.sum()
            + overhead_s
        )
        tokens = count + values[due].sum() + _sums(left[likeliest])
        best = int(np.argmax(tokens / seconds))
        if best < owners.size:
            owners, stop = owners[:best], Stop.GOODPUT
    return needed + np.bincount(owners, minlength=count), stop


def _sums(values: Floats) -> Floats:
    """Of the first 0, 1, ... of them: [values + 1]."""
    sums = np.zeros(values.size + 1)
    values.cumsum(out=sums[1:])
    return sums
