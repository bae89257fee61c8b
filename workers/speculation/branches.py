"""What tokens that were committed have left of draft trees, and how likely the target takes each node of it.

A step asks this of many small trees at once. They are laid out in one array, one tree after another, and worked out
level by level: going through their nodes one by one would take longer than choosing among them may.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tidemill.core.tree import ROOT, TokenTree

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.intp]
Calibrate = Callable[[str, Floats], Floats]  # a source's raw chances -> measured ones


@dataclass(slots=True, eq=False)
class Branch:
    """The nodes of `tree` below `root`, which is one of its nodes or ROOT. Nobody changes it once it is made.

    Nothing is copied when tokens are committed: the root moves down. The arrays have a place for the tree's own root
    and one for each node, [1 + nodes], and are shared by all branches of a tree.
    """

    tree: TokenTree
    source: str  # who drafted it
    fate: str  # how it was come by; metric label
    root: int
    levels: int  # below the root, at most
    chances: Floats  # raw, given the parent; 1 where they are not known
    parents: Ids  # places; that of the tree's own root is itself

    @classmethod
    def of(cls, tree: TokenTree, source: str, fate: str) -> "Branch":
        """All of a tree."""
        levels = max(tree.depths(), default=0)
        chances = np.array((1.0, *(tree.chances or (1.0,) * len(tree))))
        return cls(tree, source, fate, ROOT, levels, chances, np.array((ROOT, *tree.parents)) + 1)

    def after(self, tokens: Sequence[int], fate: str) -> "Branch | None":
        """What is left of it once these are committed; None if no path has them all."""
        root = self.tree.find(tokens, self.root)
        if root is None:
            return None
        return Branch(self.tree, self.source, fate, root, self.levels - len(tokens), self.chances, self.parents)

    def up_to(self, levels: int) -> "Branch":
        """No more than so many levels of it."""
        if self.levels <= levels:
            return self
        below = self.tree.subset(self._path_chances(), self.root)
        return Branch.of(below.up_to(levels), self.source, self.fate)

    def expected_tokens(self) -> float:
        """How many of its tokens the target takes, by raw chances (AdaServe: the sum of all path chances)."""
        return sum(self._path_chances().values())

    def _path_chances(self) -> dict[int, float]:
        """Of its nodes: how likely the target takes the whole path from the root to each."""
        own, parents = self.tree.chances or (1.0,) * len(self.tree), self.tree.parents
        chances = {self.root: 1.0}
        for node in range(self.root + 1, len(parents)):
            if parents[node] in chances:
                chances[node] = own[node] * chances[parents[node]]
        del chances[self.root]
        return chances


@dataclass(frozen=True, slots=True)
class Weights:
    """Of the nodes of several branches: arrays [places], one branch after another.

    `values` are chances of whole paths, 0 at places that are not a branch's: none is above its parent's.
    """

    values: Floats
    owners: Ids  # which branch
    firsts: Ids  # the first place of that branch, which is its tree's own root; its nodes follow
    branches: int

    def expected(self) -> Floats:
        """How many tokens of each branch the target takes: [branches]."""
        return np.bincount(self.owners, self.values, self.branches).astype(np.float64, copy=False)


def weigh(branches: Sequence[Branch], calibrate: Calibrate) -> Weights:
    """How likely the target takes each node, all of its path included. There is a branch at least."""
    sizes = np.array([each.parents.size for each in branches])
    starts = sizes.cumsum() - sizes
    owners = np.arange(sizes.size).repeat(sizes)
    firsts = starts[owners]
    roots = starts + [each.root + 1 for each in branches]
    chances = _calibrated(branches, owners, calibrate)
    parents = np.concatenate([each.parents for each in branches]) + firsts
    chances[roots], parents[roots] = 1.0, roots
    values = np.zeros(chances.size)
    values[roots] = 1.0
    for _ in range(max([each.levels for each in branches])):  # so many of them below the roots are right
        values = chances * values[parents]
    values[roots] = 0.0
    return Weights(values, owners, firsts, sizes.size)


def _calibrated(branches: Sequence[Branch], owners: Ids, calibrate: Calibrate) -> Floats:
    raw = np.concatenate([each.chances for each in branches])
    sources = {each.source for each in branches}
    if len(sources) == 1:
        return calibrate(sources.pop(), raw)
    chances = np.empty_like(raw)
    for source in sources:
        own = np.array([each.source == source for each in branches])[owners]
        chances[own] = calibrate(source, raw[own])
    return chances
