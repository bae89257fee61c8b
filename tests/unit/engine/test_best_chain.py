"""The chain of a tree that an engine verifies which knows chains only."""

import pytest

from tidemill.core.tree import TokenTree


@pytest.mark.parametrize(
    ("tree", "longest", "chain"),
    [
        (TokenTree(), 4, []),
        (TokenTree.chain((5, 6, 7)), 4, [5, 6, 7]),
        (TokenTree.chain((5, 6, 7)), 2, [5, 6]),
        (TokenTree.chain((5, 6, 7)), 0, []),
        (TokenTree((5, 6, 7, 8), (-1, -1, 1, 2), (0.3, 0.6, 0.9, 0.1)), 8, [6, 7, 8]),
        (TokenTree((5, 6, 7, 8), (-1, -1, 0, 1), (0.5, 0.5, 0.1, 0.9)), 8, [5, 7]),
        (TokenTree((5, 6, 7), (-1, -1, 0)), 8, [5, 7]),
    ],
    ids=["nothing", "a chain", "cut", "no room", "by chance", "the first of equals", "chances are not known"],
)
def test_it_goes_along_the_best_children(tree: TokenTree, longest: int, chain: list[int]) -> None:
    assert tree.best_chain(longest) == chain
