"""Branches of draft trees are what is left of them, and weigh what their nodes are worth one by one."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.trees import left_of
from tidemill.core.messages import Draft
from tidemill.core.tree import EMPTY, ROOT, TokenTree, prefix_hash
from workers.speculation.branch_cache import BASES, BranchCache, Fate
from workers.speculation.branches import Branch, Floats, weigh

TOKENS = st.integers(0, 2)  # few, so that paths are often right


@st.composite
def trees(draw: st.DrawFn, most: int = 10) -> TokenTree:
    size = draw(st.integers(0, most))
    parents = tuple(draw(st.integers(ROOT, node - 1)) for node in range(size))
    chances = tuple(draw(st.floats(0, 1)) for _ in range(size if draw(st.booleans()) else 0))
    return TokenTree(tuple(draw(TOKENS) for _ in range(size)), parents, chances)


committed = st.lists(st.lists(TOKENS, min_size=1, max_size=3), max_size=3)
cases = st.lists(st.tuples(trees(), committed, st.sampled_from(("draft", "lookup"))), min_size=1, max_size=5)


def measured(source: str, chances: Floats) -> Floats:
    """Some sources are more often right than others."""
    return chances * (0.5 if source == "draft" else 0.75)


def rated(tree: TokenTree, source: str) -> TokenTree:
    """The same with measured chances."""
    chances = measured(source, np.array(tree.chances or (1.0,) * len(tree)))
    return TokenTree(tree.tokens, tree.parents, tuple(chances))


@given(cases, st.data())
def test_weights_are_the_path_chances_of_what_is_left(
    drawn: list[tuple[TokenTree, list[list[int]], str]], data: st.DataObject
) -> None:
    branches, left = [], []
    for tree, rounds, source in drawn:
        branch, rest = Branch.of(tree, source, "fresh"), tree
        for tokens in rounds:
            further, without = branch.after(tokens, "branch"), left_of(rest, tokens)
            assert (further is None) == (without is None)
            if further is None or without is None:
                break
            branch, rest = further, without
        levels = data.draw(st.integers(0, 10))
        branches.append(branch.up_to(levels))
        left.append(rated(rest.up_to(levels), source))
        assert branch.expected_tokens() == pytest.approx(sum(rest.path_chances()))
    weights = weigh(branches, measured)
    for row, rest in enumerate(left):
        own = np.flatnonzero((weights.owners == row) & (weights.values > 0.0))
        assert tuple(weights.values[own]) == tuple(value for value in rest.path_chances() if value > 0.0)
        nodes = [node for node, value in enumerate(rest.path_chances()) if value > 0.0]
        chosen = branches[row].tree.subset((own - weights.firsts[own] - 1).tolist(), branches[row].root)
        assert (chosen.tokens, chosen.parents) == (rest.subset(nodes).tokens, rest.subset(nodes).parents)
    assert weights.expected() == pytest.approx([sum(rest.path_chances()) for rest in left])


class TestCache:
    @settings(deadline=None)
    @given(st.integers(0, 10**6))
    def test_the_same_as_trees_cut_anew_after_each_step(self, seed: int) -> None:
        """Drafts for all tokens, for fewer, for others; of what fits that with the most expected tokens is kept."""
        rng = random.Random(seed)
        cache, tokens, best, fresh = BranchCache(), [1, 2], EMPTY, False
        cache.open("r", tokens)
        told = [len(tokens)]
        for _ in range(30):
            match rng.randrange(4):
                case 0:
                    new = rng.choices(range(3), k=rng.randint(1, 3))
                    tokens += new
                    cache.commit("r", new)
                    best, fresh = left_of(best, new) or EMPTY, False
                case 1:
                    cache.told("r")
                    told = sorted({*told, len(tokens)})[-BASES:]
                case _:
                    base = rng.randint(1, len(tokens))
                    tree = random_tree(rng)
                    fate = cache.put(Draft("r", base, tree, prefix_hash(tokens[:base])))
                    rest = left_of(tree, tokens[base:])
                    if base not in told:
                        assert fate is Fate.FOREIGN
                    elif rest is None:
                        assert fate is Fate.STALE
                    else:
                        assert fate is (Fate.FRESH if base == len(tokens) else Fate.BRANCH)
                        if sum(rest.path_chances()) >= sum(best.path_chances()):
                            best, fresh = rest, base == len(tokens)
            branch = cache.branch("r")
            values = weigh([branch], lambda _, chances: chances).values
            assert tuple(values[values > 0.0]) == best.path_chances()
            assert branch.fate == (Fate.FRESH if fresh else Fate.BRANCH)

    def test_of_requests_nobody_knows_there_is_nothing(self) -> None:
        cache = BranchCache()
        cache.commit("r", (1,))
        cache.told("r")
        assert cache.put(Draft("r", 1, TokenTree.chain((1,)))) is Fate.FOREIGN
        assert len(cache.branch("r").tree) == 0
        cache.open("r", [1])
        cache.close("r")
        assert len(cache) == 0


def random_tree(rng: random.Random) -> TokenTree:
    size = rng.randint(0, 8)
    return TokenTree(
        tuple(rng.choices(range(3), k=size)),
        tuple(rng.randint(ROOT, node - 1) for node in range(size)),
        tuple(rng.uniform(0.1, 1.0) for _ in range(size)),
    )
