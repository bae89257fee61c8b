"""How a token tree is computed in one pass: as paths, each with a block table of its own.

A node sees the committed tokens, its ancestors and itself, and nothing else. So each leaf gets a table in which exactly
those lie at consecutive positions, and its rows are like any others: the keys pass in depth order and in the same tiles
as in plain decoding, hence the same bits. A node is computed once, on the first path it lies on; its KV is kept on the
others too. Accepting a path means going on with its table, so nothing is compacted or copied afterwards.

          .-- b -- d      path 0: a b d    rows a b d, in the sequence's own table
    a ----+               path 1: a c      row c, in a branch, where the committed tokens of the last block and a
          '-- c                            are written as well
"""

from collections.abc import Iterator
from dataclasses import dataclass

from tidemill.core.tree import ROOT, TokenTree
from workers.engine.native.table import BlockTable, Branch


@dataclass(slots=True)
class TreePath:
    """A way from the root to a leaf, or to where blocks or rows ran out."""

    above: list[int]  # nodes computed on an earlier path
    nodes: list[int]  # nodes computed on this one: rows at consecutive positions
    branch: Branch | None = None  # None: it lies in the sequence's own table


def paths_of(tree: TokenTree) -> Iterator[TreePath]:
    """One for each leaf, in the order of their first nodes; together they compute every node once."""
    inner = set(tree.parents)
    done: set[int] = set()
    for leaf in range(len(tree)):
        if leaf not in inner:
            path = tree.path(leaf)
            yield TreePath([node for node in path if node in done], [node for node in path if node not in done])
            done.update(path)


def lay_out(tree: TokenTree, table: BlockTable, start: int, rows: int) -> list[TreePath]:
    """Find blocks for as many of the tree's nodes as there are `rows` for.

    `start` is the position of the last committed token, whose row is computed in the same step. Whoever calls owns the
    branches, and releases them after the step. A node that finds no place is left out, and so is all that follows it.
    """
    paths: list[TreePath] = []
    placed: set[int] = {ROOT}
    for path in paths_of(tree):
        if not rows or not placed.issuperset(path.above):
            continue
        nodes, depth = path.nodes[:rows], len(path.above)
        if not paths:
            nodes = nodes[: max(table.room - 1, 0)]
            table.grow(start + 1 + len(nodes))
        else:
            path.branch = table.branch(start, start + 1 + depth + len(nodes))
        if nodes and (not paths or path.branch is not None):
            paths.append(TreePath(path.above, nodes, path.branch))
            placed.update(nodes)
            rows -= len(nodes)
    return paths
