"""Templates against what enumeration finds best."""

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.trees import accepted, depths_of
from tidemill.core.tree import ROOT
from workers.speculation.static_tree import Template, optimal_tree

ACCEPTANCE = (0.5, 0.3, 0.1)
CHANCES = st.lists(st.floats(0.0, 1.0), min_size=1, max_size=3)


def test_impossible_arguments() -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        optimal_tree((0.5, 1.5), 2, 2)


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
            key = nodes, max(depths_of(template), default=0)
            best[key] = max(best.get(key, 0.0), accepted(template, acceptance))
    for nodes, depth in itertools.product(range(7), repeat=2):
        template = optimal_tree(acceptance, nodes, depth)
        within = [value for (size, levels), value in best.items() if size <= nodes and levels <= depth]
        assert accepted(template, acceptance) == pytest.approx(max(within, default=0.0))
        assert len(template.parents) <= nodes
        assert max(depths_of(template), default=0) <= depth


@given(chances=CHANCES, nodes=st.integers(0, 20), depth=st.integers(0, 5))
def test_room_never_hurts(chances: list[float], nodes: int, depth: int) -> None:
    def best(nodes: int, depth: int, acceptance: tuple[float, ...]) -> float:
        return accepted(optimal_tree(acceptance, nodes, depth), acceptance)

    acceptance = tuple(chances)
    least = best(nodes, depth, acceptance) * (1 - 1e-9)
    assert best(nodes + 1, depth, acceptance) >= least
    assert best(nodes, depth + 1, acceptance) >= least
    assert best(nodes, depth, (*acceptance, 0.1)) >= least
    assert best(nodes, depth, tuple(min(chance + 0.1, 1.0) for chance in acceptance)) >= least


@given(nodes=st.integers(-1, 30), depth=st.integers(-1, 6))
def test_templates_go_level_by_level(nodes: int, depth: int) -> None:
    template = optimal_tree(ACCEPTANCE, nodes, depth)
    assert len(template.parents) <= max(nodes, 0)
    assert len(set(zip(template.parents, template.ranks, strict=True))) == len(template.parents)
    assert list(template.parents) == sorted(template.parents)
    depths = depths_of(template)
    assert depths == sorted(depths)
    assert max(depths, default=0) <= max(depth, 0)
