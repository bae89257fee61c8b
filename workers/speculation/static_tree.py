"""Fixed tree shapes, chosen from how often the target's token is the draft's likeliest, second likeliest, and so on.

Sequoia (Chen et al. 2024), sections 4.1 and 4.2: a dynamic program finds the shape with most accepted tokens, and the
size and depth follow from what a round costs. An acceptance vector holds, for each rank from 0, the chance that the
target's token is the draft's successor of that rank; the entries are chances of things that exclude each other.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from tidemill.core.tree import ROOT


@dataclass(frozen=True, slots=True)
class Template:
    """A tree without tokens: node i carries its parent's successor of rank `ranks[i]`, 0 the likeliest.

    Parents come before their children, levels one after another.
    """

    parents: tuple[int, ...] = ()
    ranks: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.parents)

    @property
    def depth(self) -> int:
        """Levels below the root."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent == ROOT else depths[parent] + 1)
        return max(depths, default=0)

    def accepted(self, acceptance: Sequence[float]) -> float:
        """Draft tokens accepted in the mean, if ranks are accepted with these chances."""
        chances: list[float] = []
        for parent, rank in zip(self.parents, self.ranks, strict=True):
            chances.append(acceptance[rank] * (1.0 if parent == ROOT else chances[parent]))
        return sum(chances)


@dataclass(frozen=True, slots=True)
class _Plan:
    """Best ways to place up to m nodes on up to l levels below a node of which successors of rank < b are used."""

    accepted: npt.NDArray[np.float64]  # [l, b, m]: draft tokens accepted in the mean
    taken: npt.NDArray[np.int64]  # [l, b, m]: nodes that the successor of rank b - 1 gets, itself included

    def template(self, nodes: int, depth: int) -> Template:
        parents: list[int] = []
        ranks: list[int] = []
        places = deque([(ROOT, max(nodes, 0), max(depth, 0))])
        while places:
            parent, left, levels = places.popleft()
            shares = []
            for rank in range(self.taken.shape[1] - 2, -1, -1):
                share = int(self.taken[levels, rank + 1, left])
                shares.append(share)
                left -= share
            for rank, share in enumerate(reversed(shares)):
                if share:
                    places.append((len(parents), share - 1, levels - 1))
                    parents.append(parent)
                    ranks.append(rank)
        return Template(tuple(parents), tuple(ranks))


def _plan(acceptance: Sequence[float], nodes: int, depth: int) -> _Plan:
    """T[l][b][m] = max over y of T[l][b-1][m-y] + p_b (1 + T[l-1][all][y-1]); nothing is gained where y = 0."""
    if not all(0.0 <= chance <= 1.0 for chance in acceptance):
        raise ValueError(f"chances of acceptance lie between 0 and 1; they are {tuple(acceptance)}")
    nodes, depth, ranks = max(nodes, 0), max(depth, 0), len(acceptance)
    accepted = np.zeros((depth + 1, ranks + 1, nodes + 1))
    taken = np.zeros(accepted.shape, np.int64)
    counts = np.arange(nodes + 1)
    left = counts[:, None] - counts[None, :]  # [m, y]: nodes for the ranks before
    for level in range(1, depth + 1):
        for rank, chance in enumerate(acceptance):
            gain = np.zeros(nodes + 1)
            gain[1:] = chance * (1.0 + accepted[level - 1, ranks, :-1])
            totals = np.where(left >= 0, accepted[level, rank][left] + gain, -np.inf)
            taken[level, rank + 1] = totals.argmax(axis=1)
            accepted[level, rank + 1] = totals.max(axis=1)
    return _Plan(accepted, taken)


@lru_cache(maxsize=64)
def optimal_tree(acceptance: tuple[float, ...], nodes: int, depth: int) -> Template:
    """The shape of at most `nodes` nodes and `depth` levels of which most is accepted in the mean.

    Takes O(nodes² · depth · ranks) once for the same arguments. Raises ValueError if a chance is not in [0, 1].
    """
    return _plan(acceptance, nodes, depth).template(nodes, depth)


def best_tree(
    acceptance: Sequence[float], sizes: Iterable[int], depths: Iterable[int], cost: Callable[[int, int], float]
) -> Template:
    """Of the optimal shapes of these sizes and depths, the one with the least time for a token.

    `cost(nodes, depth)`: seconds of a round, depth · draft step + verification of the nodes; a round yields one token
    more than it accepts. Ties go to the smaller, then the shallower. With a size of 0 the answer may be not to draft.
    """
    sizes, depths = sorted(set(sizes)), sorted(set(depths))
    if not sizes or not depths:
        raise ValueError("no sizes or no depths to choose from")
    plan = _plan(acceptance, sizes[-1], depths[-1])
    templates = [plan.template(nodes, depth) for nodes in sizes for depth in depths]
    return min(templates, key=lambda tree: cost(len(tree), tree.depth) / (1.0 + tree.accepted(acceptance)))
