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

from tidemill.core.model import Decision
from workers.speculation.branches import Floats, Weights
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
    ranked = _ranked(candidates, budget.tree_nodes)
    count = len(ranked.own)
    needed = _needed(ranked, max(budget.rows - count, 0))
    rows = count + sum(needed)
    room = max((budget.max_rows if times.ready else budget.rows) - rows, 0)
    left = sorted([node for own, due in zip(ranked.own, needed, strict=True) for node in own[due:]])
    surplus, stop = left[:room], Stop.BUDGET if room < len(left) else Stop.EXHAUSTED
    if times.ready:
        best = _most_goodput(ranked, needed, surplus, times, overhead_s)
        if best < len(surplus):
            surplus, stop = surplus[:best], Stop.GOODPUT
    return Decision(_selection(ranked, needed, surplus), stop)


@dataclass(frozen=True, slots=True)
class _Ranked:
    """The nodes of all candidates, likeliest first. Of equals the first comes first, and so a parent.

    A step has few nodes that may be chosen: lists of numbers are gone through in less time than arrays are set up.
    """

    values: list[float]
    owners: list[int]
    nodes: list[int]  # of the owner's tree
    own: list[list[int]]  # of each candidate, those that may be chosen, as places in the other lists
    contexts: list[float]
    needs: list[float]


def _ranked(candidates: Candidates, most: int) -> _Ranked:
    """Of each tree the `most` likeliest nodes may be chosen, but none that the target never takes."""
    weights = candidates.weights
    places = np.flatnonzero(weights.values)
    places = places[np.argsort(-weights.values[places], kind="stable")]
    values, owners = weights.values[places].tolist(), weights.owners[places].tolist()
    own: list[list[int]] = [[] for _ in range(weights.branches)]
    for place, owner in enumerate(owners):
        if len(own[owner]) < most:
            own[owner].append(place)
    nodes = (places - weights.firsts[places] - 1).tolist()
    return _Ranked(values, owners, nodes, own, candidates.contexts.tolist(), candidates.needs.tolist())


def _needed(ranked: _Ranked, room: int) -> list[int]:
    """How many nodes of each request are due to its goal, `room` at most in all."""
    needed, left = [0] * len(ranked.own), room
    lacking = [row for row, need in enumerate(ranked.needs) if need > 1.0 + _ROUNDING]
    for row in sorted(lacking, key=lambda row: -ranked.needs[row]):
        own, enough = ranked.own[row], ranked.needs[row] - _ROUNDING
        wanted, expected = 0, 1.0
        while expected < enough and wanted < len(own):
            expected += ranked.values[own[wanted]]
            wanted += 1
        if expected < enough:  # out of reach
            wanted = min(wanted, room // len(needed))
        needed[row] = min(wanted, left)
        left -= needed[row]
    return needed


def _most_goodput(
    ranked: _Ranked, needed: Sequence[int], surplus: Sequence[int], times: StepTimes, overhead_s: float
) -> int:
    """With how many of the surplus nodes, likeliest first, goodput is best.

    It need not rise and fall once as nodes are added, since a step's duration has steps of its own; so it is computed
    for every number of them.
    """
    rows = len(needed) + sum(needed)
    levels = times.levels(np.arange(rows, rows + len(surplus) + 1)).tolist()
    slope, beside_s = times.slope, times.kv_slope * sum(ranked.contexts) + overhead_s
    tokens, attended = float(len(needed)), sum(ranked.contexts)
    for context, own, due in zip(ranked.contexts, ranked.own, needed, strict=True):
        if due:
            tokens += sum([ranked.values[node] for node in own[:due]])
            attended += context * due
    best, most = 0, tokens / (levels[0] + slope * attended + beside_s)
    for more, node in enumerate(surplus, 1):
        tokens += ranked.values[node]
        attended += ranked.contexts[ranked.owners[node]]
        goodput = tokens / (levels[more] + slope * attended + beside_s)
        if goodput > most:
            best, most = more, goodput
    return best


def _selection(ranked: _Ranked, needed: Sequence[int], surplus: Sequence[int]) -> Selection:
    chosen: list[list[int]] = [[] for _ in needed]
    expected = [1.0] * len(needed)
    for node in chain(*[own[:due] for own, due in zip(ranked.own, needed, strict=True) if due], surplus):
        owner = ranked.owners[node]
        chosen[owner].append(ranked.nodes[node])
        expected[owner] += ranked.values[node]
    return Selection(
        tuple([tuple(nodes) for nodes in chosen]),
        tuple(needed),
        tuple(expected),
        tuple([row for row, need in enumerate(ranked.needs) if expected[row] < need - _ROUNDING]),
        len(needed) + sum(needed) + len(surplus),
    )
