"""How a draft tree grows: which of its nodes the draft model computes next, and which are worth sending.

Everything is a function of the tree so far, so it does not matter how the tree came about: from nothing, or as what a
verdict left of an earlier one.
"""

from collections import Counter
from collections.abc import Container, Sequence
from enum import StrEnum

from tidemill.core.tree import ROOT, Shape, TokenTree
from workers.speculation.static_tree import Template


class Strategy(StrEnum):
    """The order in which a tree grows."""

    CHAIN = "chain"  # each node's likeliest child alone
    BEAM = "beam"  # level by level, the likeliest few of each (AdaServe, EuroSys 2026)
    HEAP = "heap"  # the likeliest of all nodes first (DySpec, arXiv 2410.11744)
    STATIC = "static"  # a template that is best for the measured acceptance by rank (Sequoia, arXiv 2402.12374)


def frontier(
    strategy: Strategy, tree: TokenTree, done: Container[int], shape: Shape, template: Template, at_once: int
) -> list[int]:
    """Nodes to compute now, all of whose ancestors are `done`. None: the tree has its shape.

    A node's children are ordered by chance. `template` is what a static tree is to become. `at_once`: how many nodes a
    heap takes in one step; with fewer the tree is likelier, with more it is there sooner.
    """
    if min(shape.depth, shape.width, shape.nodes) <= 0:
        return []
    if ROOT not in done:
        return [ROOT]
    match strategy:
        case Strategy.CHAIN:
            return _chain(tree, done, shape)
        case Strategy.BEAM:
            return _beam(tree, done, shape)
        case Strategy.HEAP:
            return _heap(tree, done, shape, at_once)
        case Strategy.STATIC:
            places = fill(template, tree)
            inner = set(template.parents)
            return [node for node, place in places.items() if place in inner and node not in done]


def worth_sending(strategy: Strategy, tree: TokenTree, shape: Shape, template: Template) -> TokenTree:
    """The part of a tree that is of the shape: for a static tree the template's nodes, else the likeliest."""
    if strategy is Strategy.STATIC:
        return tree.subset(fill(template, tree))
    return tree.subset(likeliest(tree, shape))


def likeliest(tree: TokenTree, shape: Shape) -> list[int]:
    """The nodes with the highest path chances within the shape; with a node its parent, which is no less likely."""
    chances, depths = tree.path_chances(), tree.depths()
    within = [node for node, depth in enumerate(depths) if depth <= shape.depth]
    return sorted(within, key=lambda node: -chances[node])[: shape.nodes]


def fill(template: Template, tree: TokenTree) -> dict[int, int]:
    """The tree's nodes that have a place in the template, and which. Children take their places by rank."""
    children = {place: node for node, place in enumerate(zip(template.parents, template.ranks, strict=True))}
    seen: Counter[int] = Counter()  # children of each node so far
    places = {ROOT: ROOT}
    for node, parent in enumerate(tree.parents):
        place = children.get((places[parent], seen[parent])) if parent in places else None
        seen[parent] += 1
        if place is not None:
            places[node] = place
    del places[ROOT]
    return places


def _chain(tree: TokenTree, done: Container[int], shape: Shape) -> list[int]:
    tip = ROOT
    for _ in range(min(shape.depth, shape.nodes)):
        if tip not in done:
            return [tip]
        tip = next((node for node in range(tip + 1, len(tree)) if tree.parents[node] == tip), len(tree))
        if tip == len(tree):
            break
    return []


def _beam(tree: TokenTree, done: Container[int], shape: Shape) -> list[int]:
    chances, depths = tree.path_chances(), tree.depths()
    for level in range(1, shape.depth):
        beam = _best([node for node, depth in enumerate(depths) if depth == level], chances, shape.width)
        open_nodes = [node for node in beam if node not in done]
        if open_nodes:
            return open_nodes
    return []


def _heap(tree: TokenTree, done: Container[int], shape: Shape, at_once: int) -> list[int]:
    """Only a node that is worth sending itself is worth children; the best few at a time, to share a step."""
    chances, depths = tree.path_chances(), tree.depths()
    wanted = [node for node in likeliest(tree, shape) if depths[node] < shape.depth and node not in done]
    return _best(wanted, chances, at_once)


def _best(nodes: Sequence[int], chances: Sequence[float], count: int) -> list[int]:
    return sorted(nodes, key=lambda node: -chances[node])[:count]
