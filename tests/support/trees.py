"""What is said of draft trees, one node at a time."""

from collections.abc import Sequence

from tidemill.core.tree import ROOT, TokenTree
from workers.speculation.static_tree import Template


def left_of(tree: TokenTree, tokens: Sequence[int]) -> TokenTree | None:
    """The tree once `tokens` are committed; None if no path carries them all."""
    root = ROOT
    for token in tokens:
        children = [node for node in range(len(tree)) if (tree.parents[node], tree.tokens[node]) == (root, token)]
        if not children:
            return None
        root = children[0]
    below = [node for node in range(len(tree)) if root in {ROOT, *tree.path(node)} - {node}]
    place = {root: ROOT} | {node: index for index, node in enumerate(below)}
    return TokenTree(
        tuple(tree.tokens[node] for node in below),
        tuple(place[tree.parents[node]] for node in below),
        tuple(tree.chances[node] for node in below) if tree.chances else (),
    )


def depths_of(template: Template) -> list[int]:
    """Of each node, as TokenTree's."""
    return TokenTree((0,) * len(template.parents), template.parents).depths()


def accepted(template: Template, acceptance: Sequence[float]) -> float:
    """Draft tokens accepted in the mean, if ranks are accepted with these chances."""
    chances: list[float] = []
    for parent, rank in zip(template.parents, template.ranks, strict=True):
        chances.append(acceptance[rank] * (1.0 if parent == ROOT else chances[parent]))
    return sum(chances)
