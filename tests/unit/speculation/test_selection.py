"""Selection keeps its promises on any trees, and is the best there is on small ones."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidemill.core.model import Decision
from tidemill.core.tree import EMPTY, ROOT, TokenTree
from workers.speculation import selection
from workers.speculation.branches import Branch, weigh
from workers.speculation.selection import Budget, Candidates, Reason, Selection, Stop
from workers.speculation.step_time import StepTimes

PLENTY = Budget(rows=1000, max_rows=1000, tree_nodes=100)


@dataclass(frozen=True)
class Candidate:
    """One request: a tree with measured chances, and what Candidates say of it."""

    tree: TokenTree
    context: int
    need: float = 1.0


def select(
    requests: Sequence[Candidate], times: StepTimes, budget: Budget, overhead_s: float = 0.0
) -> Decision[Selection]:
    branches = [Branch.of(each.tree, "", "") for each in requests]
    candidates = Candidates(
        weigh(branches, lambda _, chances: chances),
        np.array([float(each.context) for each in requests]),
        np.array([each.need for each in requests]),
    )
    return selection.select(candidates, times, budget, overhead_s)


def step_times(row_s: float = 0.0, context_s: float = 0.0, base_s: float = 0.01) -> StepTimes:
    times = StepTimes()
    for rows in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        for context in (0, 10_000):
            times.observe(rows, context, base_s + row_s * rows + context_s * context)
    return times


FREE = step_times()
COSTLY = step_times(row_s=0.002, context_s=1e-7)


@st.composite
def trees(draw: st.DrawFn, most: int = 12) -> TokenTree:
    size = draw(st.integers(0, most))
    parents = tuple(draw(st.integers(ROOT, node - 1)) for node in range(size))
    chances = tuple(draw(st.sampled_from((0.0, 0.1, 0.25, 0.5, 0.7, 0.9, 1.0))) for _ in range(size))
    return TokenTree(tuple(range(size)), parents, chances)


def candidates(most: int = 12, count: int = 6) -> st.SearchStrategy[list[Candidate]]:
    one = st.builds(Candidate, trees(most), st.integers(1, 4000), st.floats(-5, 20))
    return st.lists(one, min_size=1, max_size=count)


budgets = st.builds(
    lambda rows, more, nodes: Budget(rows, rows + more, nodes),
    st.integers(0, 40),
    st.integers(0, 40),
    st.integers(0, 12),
)


def value(tree: TokenTree, nodes: Iterable[int]) -> float:
    chances = tree.path_chances()
    return sum(chances[node] for node in nodes)


def connected(tree: TokenTree, nodes: Sequence[int]) -> bool:
    return all(tree.parents[node] in {ROOT, *nodes} for node in nodes)


def best_value(tree: TokenTree, size: int) -> float:
    """The highest of all connected subsets of at most this size, by trying them all."""
    subsets = (nodes for k in range(size + 1) for nodes in combinations(range(len(tree)), k) if connected(tree, nodes))
    return max(value(tree, nodes) for nodes in subsets)


class TestAlways:
    @given(candidates(), budgets, st.sampled_from((FREE, COSTLY, StepTimes())))
    def test_connected_within_budget_and_no_root_dropped(
        self, requests: list[Candidate], budget: Budget, times: StepTimes
    ) -> None:
        chosen = select(requests, times, budget).choice
        assert len(chosen.nodes) == len(chosen.needed) == len(requests)
        for each, nodes in zip(requests, chosen.nodes, strict=True):
            assert len(set(nodes)) == len(nodes) <= budget.tree_nodes
            for place in range(len(nodes) + 1):  # likeliest first: every beginning is connected too
                assert connected(each.tree, nodes[:place])
        assert chosen.rows == len(requests) + sum(map(len, chosen.nodes)) <= max(budget.max_rows, len(requests))
        assert chosen.count(Reason.NEEDED) <= max(budget.rows - len(requests), 0)
        assert chosen.count(Reason.NEEDED) + chosen.count(Reason.SURPLUS) + len(requests) == chosen.rows

    @given(candidates(), budgets)
    def test_expected_tokens_and_unmet_goals_are_told(self, requests: list[Candidate], budget: Budget) -> None:
        chosen = select(requests, COSTLY, budget).choice
        expected = [1.0 + value(each.tree, nodes) for each, nodes in zip(requests, chosen.nodes, strict=True)]
        assert chosen.expected == pytest.approx(expected)
        unmet = [place for place, each in enumerate(requests) if expected[place] < each.need - 1e-9]
        assert list(chosen.unmet) == unmet

    @given(candidates(), budgets)
    def test_no_more_is_needed_than_the_goal_asks(self, requests: list[Candidate], budget: Budget) -> None:
        chosen = select(requests, FREE, budget).choice
        for each, nodes, count in zip(requests, chosen.nodes, chosen.needed, strict=True):
            assert count == 0 or 1.0 + value(each.tree, nodes[: count - 1]) < each.need

    def test_nothing_to_do(self) -> None:
        plain = select([Candidate(EMPTY, 10)] * 3, FREE, PLENTY)
        assert plain.choice == Selection(((), (), ()), (0, 0, 0), (1.0, 1.0, 1.0), (), 3)
        assert plain.reason is Stop.EXHAUSTED


def node_by_node(
    requests: Sequence[Candidate], times: StepTimes, budget: Budget, overhead_s: float
) -> tuple[list[tuple[int, ...]], list[int], Stop]:
    """The three steps of the module's first lines, without an array: chosen nodes, how many are needed, why no more."""
    values = [each.tree.path_chances() for each in requests]
    ranked = [
        sorted((node for node, value in enumerate(own) if value > 0.0), key=lambda node: -own[node])[
            : budget.tree_nodes
        ]
        for own in values
    ]
    needed = [0] * len(requests)
    room = all_room = max(budget.rows - len(requests), 0)
    for row in sorted(range(len(requests)), key=lambda row: -requests[row].need):
        expected, wanted = 1.0, 0
        while expected < requests[row].need - 1e-9 and wanted < len(ranked[row]):
            expected += values[row][ranked[row][wanted]]
            wanted += 1
        if expected < requests[row].need - 1e-9:
            wanted = min(wanted, all_room // len(requests))
        needed[row] = min(wanted, room)
        room -= needed[row]
    left = [(row, node) for row, nodes in enumerate(ranked) for node in nodes[needed[row] :]]
    left.sort(key=lambda each: -values[each[0]][each[1]])
    rows = len(requests) + sum(needed)
    surplus = left[: max((budget.max_rows if times.ready else budget.rows) - rows, 0)]
    stop = Stop.BUDGET if len(surplus) < len(left) else Stop.EXHAUSTED
    if times.ready:
        best = max(
            range(len(surplus) + 1), key=lambda more: goodput(requests, needed, surplus[:more], times, overhead_s)
        )
        surplus, stop = surplus[:best], stop if best == len(surplus) else Stop.GOODPUT
    counts = [needed[row] + sum(owner == row for owner, _ in surplus) for row in range(len(requests))]
    return [tuple(nodes[:count]) for nodes, count in zip(ranked, counts, strict=True)], needed, stop


def goodput(
    requests: Sequence[Candidate],
    needed: Sequence[int],
    surplus: Sequence[tuple[int, int]],
    times: StepTimes,
    overhead_s: float,
) -> float:
    """Tokens per second of a step with the needed nodes, which are each tree's likeliest, and these."""
    rows = [1 + count + sum(owner == row for owner, _ in surplus) for row, count in enumerate(needed)]
    attended = sum(count * each.context for count, each in zip(rows, requests, strict=True))
    seconds = times.seconds(sum(rows), attended, sum(each.context for each in requests)) + overhead_s
    tokens = float(len(requests))
    for count, each in zip(needed, requests, strict=True):
        tokens += sum(sorted(each.tree.path_chances(), reverse=True)[:count])
    return (tokens + sum(requests[row].tree.path_chances()[node] for row, node in surplus)) / seconds


class TestGold:
    @settings(deadline=None)
    @given(candidates(), budgets, st.sampled_from((FREE, COSTLY, StepTimes())), st.sampled_from((0.0, 0.003)))
    def test_the_same_as_node_by_node(
        self, requests: list[Candidate], budget: Budget, times: StepTimes, overhead_s: float
    ) -> None:
        decision = select(requests, times, budget, overhead_s)
        chosen = list(decision.choice.nodes), list(decision.choice.needed), decision.reason
        assert chosen == node_by_node(requests, times, budget, overhead_s)


class TestOptimal:
    @given(trees(7), st.floats(1, 5), st.integers(0, 7))
    def test_needed_nodes_are_the_best_of_their_number(self, tree: TokenTree, goal: float, cap: int) -> None:
        chosen = select([Candidate(tree, 1, goal)], FREE, Budget(1000, 1, cap)).choice
        nodes = chosen.nodes[0]
        assert chosen.needed == (len(nodes),)
        assert value(tree, nodes) == pytest.approx(best_value(tree, len(nodes)))

    @given(candidates(most=5, count=3), st.integers(0, 8))
    def test_surplus_nodes_are_the_best_of_all_requests(self, requests: list[Candidate], room: int) -> None:
        free = [Candidate(each.tree, each.context) for each in requests]
        rows = len(free) + room
        chosen = select(free, FREE, Budget(rows, rows, 100)).choice
        best = [0.0] * (room + 1)  # by nodes used so far
        for each in free:
            alone = [best_value(each.tree, size) for size in range(min(room, len(each.tree)) + 1)]
            best = [
                max(best[used - size] + alone[size] for size in range(min(used, len(alone) - 1) + 1))
                for used in range(room + 1)
            ]
        assert sum(chosen.expected) == pytest.approx(len(free) + best[room])


class TestNeeds:
    CHAIN = TokenTree.chain(range(6), (0.9,) * 6)

    def test_the_tight_are_served_before_the_relaxed(self) -> None:
        requests = [Candidate(self.CHAIN, 1, goal) for goal in (1.5, 4.0, 0.2, 2.5)]
        counts = []
        for rows in range(4, 14):
            counts.append(select(requests, FREE, Budget(rows, rows, 6)).choice.needed)
        assert counts[4] == (0, 4, 0, 0)
        assert counts[6] == (0, 4, 0, 2)
        assert counts[7] == (1, 4, 0, 2)
        assert counts[9] == (1, 4, 0, 2)

    @given(candidates(), budgets)
    def test_one_that_lacks_nodes_leaves_none_to_the_more_relaxed(
        self, requests: list[Candidate], budget: Budget
    ) -> None:
        chosen = select(requests, FREE, budget).choice
        full = select(requests, FREE, Budget(10_000, 10_000, budget.tree_nodes)).choice
        for tight, one in enumerate(requests):
            within_reach = tight not in full.unmet
            if within_reach and chosen.needed[tight] < full.needed[tight]:
                assert all(not chosen.needed[other] for other, each in enumerate(requests) if each.need < one.need), (
                    "a more relaxed request was served"
                )

    def test_a_hopeless_request_gets_its_root_and_an_equal_part(self) -> None:
        requests = [Candidate(self.CHAIN, 1, 100.0), Candidate(self.CHAIN, 1, 3.0), Candidate(self.CHAIN, 1, 3.0)]
        chosen = select(requests, FREE, Budget(9, 9, 6)).choice
        assert chosen.needed == (2, 3, 1)
        assert 0 in chosen.unmet
        assert select(requests, FREE, PLENTY).choice.unmet == (0,)

    def test_without_a_goal_only_the_root_is_needed(self) -> None:
        chosen = select([Candidate(self.CHAIN, 1)], FREE, PLENTY).choice
        assert chosen.needed == (0,)
        assert len(chosen.nodes[0]) == 6


class TestGoodput:
    CHAIN = TokenTree.chain(range(8), (0.7,) * 8)

    def goodput(self, times: StepTimes, nodes: int, context: int = 100, overhead_s: float = 0.0) -> float:
        tokens = 1.0 + sum(0.7**depth for depth in range(1, nodes + 1))
        return tokens / (times.seconds(1 + nodes, (1 + nodes) * context) + overhead_s)

    @pytest.mark.parametrize("overhead_s", [0.0, 0.02])
    @pytest.mark.parametrize("row_s", [0.0, 0.001, 0.003, 0.01])
    def test_as_many_nodes_as_goodput_is_best_with(self, row_s: float, overhead_s: float) -> None:
        times = step_times(row_s)
        decision = select([Candidate(self.CHAIN, 100)], times, PLENTY, overhead_s)
        best = max(range(9), key=lambda nodes: self.goodput(times, nodes, 100, overhead_s))
        assert len(decision.choice.nodes[0]) == best
        assert decision.reason is (Stop.EXHAUSTED if best == 8 else Stop.GOODPUT)

    def test_what_a_goal_needs_is_verified_even_if_it_does_not_pay(self) -> None:
        times = step_times(row_s=0.02)
        chosen = select([Candidate(self.CHAIN, 100, 2.0)], times, PLENTY).choice
        assert chosen.count(Reason.NEEDED) == 2
        assert chosen.count(Reason.SURPLUS) == 0

    def test_long_contexts_cost(self) -> None:
        times = step_times(row_s=1e-6, context_s=1e-6)
        short, long = (len(select([Candidate(self.CHAIN, n)], times, PLENTY).choice.nodes[0]) for n in (10, 10_000))
        assert long < short

    def test_the_budget_stops(self) -> None:
        assert select([Candidate(self.CHAIN, 1)], FREE, Budget(4, 4, 8)).reason is Stop.BUDGET

    def test_unmeasured_step_times_leave_the_budget_of_free_rows(self) -> None:
        decision = select([Candidate(self.CHAIN, 1)], StepTimes(), Budget(4, 100, 8))
        assert (decision.choice.rows, decision.reason) == (4, Stop.BUDGET)
