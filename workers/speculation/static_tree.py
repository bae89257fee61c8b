"""Fixed tree shapes, chosen from how often the target's token is the draft's likeliest, second likeliest, and so on.

Sequoia (Chen et al. 2024), section 4.1: a dynamic program finds the shape with most accepted tokens. An acceptance
vector holds, for each rank from 0, the chance that the target's token is the draft's successor of that rank; the
entries are chances of things that exclude each other.
"""

from collections import deque
from collections.abc import Sequence
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


@lru_cache(maxsize=64)
def optimal_tree(acceptance: tuple[float, ...], nodes: int, depth: int) -> Template:
    """The shape of at most `nodes` nodes and `depth` levels of which most is accepted in the mean.

    Takes O(nodes² · depth · ranks) once for the same arguments. Raises ValueError if a chance is not in [0, 1].
    """
    if not all(0.0 <= chance <= 1.0 for chance in acceptance):
        raise ValueError(f"chances of acceptance lie between 0 and 1; they are {tuple(acceptance)}")
    shares = _shares(acceptance, max(nodes, 0), max(depth, 0))
    parents: list[int] = []
    ranks: list[int] = []
    places = deque([(ROOT, max(nodes, 0), max(depth, 0))])
    while places:
        parent, left, levels = places.popleft()
        given = []
        for rank in range(len(acceptance) - 1, -1, -1):
            share = int(shares[levels, rank, left])
            given.append(share)
            left -= share
        for rank, share in enumerate(reversed(given)):
            if share:
                places.append((len(parents), share - 1, levels - 1))
                parents.append(parent)
                ranks.append(rank)
    return Template(tuple(parents), tuple(ranks))


def _shares(acceptance: Sequence[float], nodes: int, depth: int) -> npt.NDArray[np.int64]:
    """[l, b, m]: of m nodes on l levels below a node, those that its successor of rank b gets, itself included, if the
    best is made of them with no rank beyond b.

    T[l][b][m] = max over y of T[l][b-1][m-y] + p_b (1 + T[l-1][all][y-1]); nothing is gained where y = 0.
    """
    ranks = len(acceptance)
    accepted = np.zeros((depth + 1, ranks + 1, nodes + 1))  # T
    shares = np.zeros((depth + 1, ranks, nodes + 1), np.int64)
    counts = np.arange(nodes + 1)
    left = counts[:, None] - counts[None, :]  # [m, y]: nodes for the ranks before
    for level in range(1, depth + 1):
        for rank, chance in enumerate(acceptance):
            gain = np.zeros(nodes + 1)
            gain[1:] = chance * (1.0 + accepted[level - 1, ranks, :-1])
            totals = np.where(left >= 0, accepted[level, rank][left] + gain, -np.inf)
            shares[level, rank] = totals.argmax(axis=1)
            accepted[level, rank + 1] = totals.max(axis=1)
    return shares
