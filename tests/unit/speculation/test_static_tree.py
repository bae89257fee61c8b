"""Templates against what enumeration finds best."""

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidemill.core.tree import ROOT, TokenTree
from workers.speculation.static_tree import Template, best_tree, optimal_tree

ACCEPTANCE = (0.5, 0.3, 0.1)
CHANCES = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=3)


def test_impossible_arguments() -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        optimal_tree((0.5, 1.5), 2, 2)
    with pytest.raises(ValueError, match="no sizes"):
        best_tree(ACCEPTANCE, (), (1,), lambda nodes, depth: 1.0)


def all_templates(nodes: int, ranks: int) -> Iterator[Template]:
    """Every tree of so many nodes, with distinct ranks among siblings."""
    for parents in itertools.product(*(range(ROOT, node) for node in range(nodes))):
        for chosen in itertools.product(range(ranks), repeat=nodes):
            if len(set(zip(parents, chosen, strict=True))) == nodes:
                yield Template(parents, chosen)


@pytest.mark.parametrize("acceptance", [(0.6, 0.3), (0.9, 0.05), (0.3, 0.6), (0.5, 0.5), (1.0, 0.0)])
def test_templates_are_the_best_of_all_small_trees(acceptance: tuple[float, ...]) -> None:
    best: dict[tuple[int, int], float] = {}  # accepted by size and depth
    for nodes in range(1, 7):
        for template in all_templates(nodes, len(acceptance)):
            key = nodes, template.depth
            best[key] = max(best.get(key, 0.0), template.accepted(acceptance))
    for nodes, depth in itertools.product(range(7), repeat=2):
        template = optimal_tree(acceptance, nodes, depth)
        within = [value for (size, levels), value in best.items() if size <= nodes and levels <= depth]
        assert template.accepted(acceptance) == pytest.approx(max(within, default=0.0))
        assert len(template) <= nodes
        assert template.depth <= depth


@given(chances=CHANCES, nodes=st.integers(0, 20), depth=st.integers(0, 5))
def test_room_never_hurts(chances: list[float], nodes: int, depth: int) -> None:
    def accepted(nodes: int, depth: int, acceptance: tuple[float, ...]) -> float:
        return optimal_tree(acceptance, nodes, depth).accepted(acceptance)

    acceptance = tuple(chances)
    least = accepted(nodes, depth, acceptance) * (1 - 1e-9)
    assert accepted(nodes + 1, depth, acceptance) >= least
    assert accepted(nodes, depth + 1, acceptance) >= least
    assert accepted(nodes, depth, (*acceptance, 0.1)) >= least
    assert accepted(nodes, depth, tuple(min(chance + 0.1, 1.0) for chance in acceptance)) >= least


@given(nodes=st.integers(-1, 30), depth=st.integers(-1, 6))
def test_templates_go_level_by_level(nodes: int, depth: int) -> None:
    template = optimal_tree(ACCEPTANCE, nodes, depth)
    assert len(template) <= max(nodes, 0)
    assert len(set(zip(template.parents, template.ranks, strict=True))) == len(template)
    assert list(template.parents) == sorted(template.parents)
    depths = TokenTree((0,) * len(template), template.parents).depths()
    assert depths == sorted(depths)
    assert template.depth == max(depths, default=0) <= max(depth, 0)


@settings(max_examples=30)
@given(chances=CHANCES, draft_s=st.floats(0.001, 1.0), row_s=st.floats(0.0, 0.2))
def test_size_and_depth_follow_from_the_cost(chances: list[float], draft_s: float, row_s: float) -> None:
    def cost(nodes: int, depth: int) -> float:
        return depth * draft_s + 1.0 + nodes * row_s

    sizes, depths = (0, 1, 2, 4, 8), (1, 2, 4)
    found = best_tree(chances, sizes, depths, cost)
    every = [optimal_tree(tuple(chances), nodes, depth) for nodes in sizes for depth in depths]
    least = min(cost(len(tree), tree.depth) / (1 + tree.accepted(chances)) for tree in every)
    assert cost(len(found), found.depth) / (1 + found.accepted(chances)) == pytest.approx(least)


def test_drafts_that_cost_too_much_are_not_made() -> None:
    sizes, depths = (0, 1, 4), (1, 2)
    assert best_tree((0.1,), sizes, depths, lambda nodes, depth: 1.0 + depth) == Template()
    assert len(best_tree((0.9,), sizes, depths, lambda nodes, depth: 1.0 + 0.01 * depth)) == 2
