"""Trees that grow from a small random language model, against what enumeration finds best."""

import itertools
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.trees import accepted, depths_of, left_of
from tidemill.core.tree import EMPTY, ROOT, Shape, TokenTree
from workers.speculation.frontier import Strategy, frontier, worth_sending
from workers.speculation.ranks import RankAcceptance
from workers.speculation.static_tree import Template, optimal_tree

VOCABULARY = 4
ACCEPTANCE = (0.5, 0.3, 0.1)
Path = tuple[int, ...]
Successors = tuple[tuple[int, ...], tuple[float, ...]]  # tokens, likeliest first, and their chances
Model = Callable[[Path], Successors]

SHAPES = st.builds(Shape, depth=st.integers(0, 4), width=st.integers(0, 4), nodes=st.integers(0, 12))
SEEDS = st.integers(0, 10**6)


def model_of(seed: int) -> Model:
    """Successors of a path, the same at every call; some paths have few, some are equally likely."""

    def successors(path: Path) -> Successors:
        rng = random.Random(hash((seed, *path)))
        tokens = rng.sample(range(VOCABULARY), rng.randint(1, VOCABULARY))
        weights = sorted((rng.choice((1, 1, 2, 5, 20)) for _ in tokens), reverse=True)
        total = sum(weights) + rng.choice((0, 3))
        return tuple(tokens), tuple(weight / total for weight in weights)

    return successors


def path_tokens(tree: TokenTree, node: int) -> Path:
    return () if node == ROOT else tuple(tree.tokens[each] for each in tree.path(node))


class Growing:
    """As a draft worker has a tree grow."""

    def __init__(self, strategy: Strategy, shape: Shape, model: Model, tree: TokenTree = EMPTY) -> None:
        self.strategy, self.shape, self.model = strategy, shape, model
        self.template = optimal_tree(ACCEPTANCE[: shape.width], shape.nodes, shape.depth)
        self.tree, self.done, self.calls = tree, set(tree.parents), 0

    def run(self) -> TokenTree:
        while nodes := frontier(self.strategy, self.tree, self.done, self.shape, self.template, self.shape.width):
            for node in nodes:
                assert node not in self.done
                assert node == ROOT or self.tree.parents[node] in self.done
                self.add(node)
            self.calls += 1
        return worth_sending(self.strategy, self.tree, self.shape, self.template)

    def add(self, node: int) -> None:
        tokens, chances = (each[: self.shape.width] for each in self.model(path_tokens(self.tree, node)))
        parents = (node,) * len(tokens)
        tree = self.tree
        self.tree = TokenTree((*tree.tokens, *tokens), (*tree.parents, *parents), (*tree.chances, *chances))
        self.done.add(node)


def all_paths(model: Model, depth: int, width: int) -> dict[Path, float]:
    """The chance of every path of at most `depth` tokens, each among the `width` likeliest at its place."""
    found: dict[Path, float] = {}
    level: dict[Path, float] = {(): 1.0}
    for _ in range(depth):
        level = {
            (*path, token): value * chance
            for path, value in level.items()
            for token, chance in itertools.islice(zip(*model(path), strict=True), width)
        }
        found |= level
    return found


@given(strategy=st.sampled_from(Strategy), shape=SHAPES, seed=SEEDS)
def test_trees_keep_their_bounds(strategy: Strategy, shape: Shape, seed: int) -> None:
    growing = Growing(strategy, shape, model_of(seed))
    tree = growing.run()
    assert len(tree) <= shape.nodes
    assert max(tree.depths(), default=0) <= shape.depth
    assert all(tree.parents.count(parent) <= shape.width for parent in set(tree.parents))
    assert len(growing.done) <= max(shape.nodes, shape.depth * shape.width) * max(shape.width, 1) + 1
    if strategy in (Strategy.CHAIN, Strategy.BEAM):
        assert growing.calls <= shape.depth


@given(shape=SHAPES, seed=SEEDS)
def test_a_chain_follows_the_first_successor(shape: Shape, seed: int) -> None:
    model = model_of(seed)
    tree = Growing(Strategy.CHAIN, Shape(shape.depth, min(shape.width, 1), shape.nodes), model).run()
    path: Path = ()
    for _ in range(min(shape.depth, shape.nodes) if shape.width else 0):
        path += model(path)[0][:1]
    assert tree == TokenTree.chain(path, tree.chances)


@given(depth=st.integers(1, 4), width=st.integers(1, 4), seed=SEEDS)
def test_a_beam_computes_the_likeliest_of_each_level(depth: int, width: int, seed: int) -> None:
    """Those that can be reached: whose parents were computed themselves."""
    growing = Growing(Strategy.BEAM, Shape(depth, width, depth * width * width), model_of(seed))
    growing.run()
    chances, depths = growing.tree.path_chances(), growing.tree.depths()
    for level in range(1, depth):
        at_level = [node for node, own in enumerate(depths) if own == level]
        computed = sorted(chances[node] for node in at_level if node in growing.done)
        assert computed == sorted(chances[node] for node in at_level)[-width:]


@given(shape=SHAPES, seed=SEEDS)
def test_a_heap_has_the_likeliest_of_all_paths(shape: Shape, seed: int) -> None:
    model = model_of(seed)
    tree = Growing(Strategy.HEAP, shape, model).run()
    every = sorted(all_paths(model, shape.depth, shape.width).values(), reverse=True)
    assert sorted(tree.path_chances(), reverse=True) == every[: shape.nodes]


@given(strategy=st.sampled_from([Strategy.HEAP, Strategy.CHAIN]), shape=SHAPES, seed=SEEDS, at=st.integers(0, 99))
def test_what_a_verdict_leaves_grows_to_what_would_have_grown(
    strategy: Strategy, shape: Shape, seed: int, at: int
) -> None:
    """The tree after some accepted tokens is the one that starts from them."""
    model = model_of(seed)
    ahead = Growing(strategy, shape.times(2), model)
    ahead.run()
    if not len(ahead.tree):
        return
    path = path_tokens(ahead.tree, at % len(ahead.tree))
    rest = left_of(ahead.tree, path)
    assert rest is not None
    after = Growing(strategy, shape, lambda more: model(path + more), rest).run()
    fresh = Growing(strategy, shape, lambda more: model(path + more)).run()
    assert sorted(after.path_chances()) == pytest.approx(sorted(fresh.path_chances()))


@given(nodes=st.integers(0, 12), depth=st.integers(0, 4))
def test_a_heap_finds_what_the_dynamic_program_finds(nodes: int, depth: int) -> None:
    """Where ranks alone decide, the likeliest paths are the optimal tree."""
    shape = Shape(depth, len(ACCEPTANCE), nodes)
    tree = Growing(Strategy.HEAP, shape, lambda _: (tuple(range(len(ACCEPTANCE))), ACCEPTANCE)).run()
    template = optimal_tree(ACCEPTANCE, nodes, depth)
    assert accepted(template, ACCEPTANCE) == pytest.approx(sum(tree.path_chances()))


def test_a_static_tree_fills_its_template_by_rank() -> None:
    growing = Growing(
        Strategy.STATIC,
        Shape(3, 3, 5),
        lambda path: ((5, 6, 7), (0.5, 0.25, 0.125)) if len(path) != 1 else ((8,), (0.9,)),
    )
    growing.template = Template(parents=(ROOT, ROOT, 0, 1, 2), ranks=(0, 2, 0, 0, 1))
    assert growing.run() == TokenTree((5, 7, 8, 8, 6), growing.template.parents, (0.5, 0.125, 0.9, 0.9, 0.25))
    assert growing.calls == 3


def test_a_static_tree_leaves_out_branches_without_successors() -> None:
    growing = Growing(Strategy.STATIC, Shape(2, 2, 4), lambda path: ((5,), (0.5,)))
    growing.template = Template(parents=(ROOT, ROOT, 1, 0), ranks=(0, 1, 0, 0))
    assert growing.run() == TokenTree.chain((5, 5), (0.5, 0.5))


class TestRankAcceptance:
    def test_it_learns_which_ranks_are_taken(self) -> None:
        ranks = RankAcceptance()
        tree = TokenTree((1, 2, 3, 4), (-1, -1, 1, 1))
        for _ in range(500):
            ranks.observe(tree, (2, 3, 9))  # the second child, then its first; nothing is known of the third token
        assert ranks.chances[:3] == pytest.approx((0.5, 0.5, 0.0), abs=0.03)

    def test_a_token_that_no_child_carries_counts_against_all(self) -> None:
        ranks = RankAcceptance()
        before = ranks.chances
        ranks.observe(TokenTree((1, 2), (-1, -1)), (7, 1))
        assert all(now < then for now, then in zip(ranks.chances, before, strict=True))

    def test_old_observations_fade(self) -> None:
        ranks = RankAcceptance()
        for token in [1] * 4000 + [2] * 4000:
            ranks.observe(TokenTree((1, 2), (-1, -1)), (token,))
        assert ranks.chances[1] > 0.9

    def test_templates_change_with_what_was_learned(self) -> None:
        ranks = RankAcceptance()
        shape = Shape(4, 2, 4)
        assert max(depths_of(ranks.template(shape))) > 2
        for _ in range(2000):
            ranks.observe(TokenTree((1, 2), (-1, -1)), (2,))
        assert 1 in ranks.template(shape).ranks
