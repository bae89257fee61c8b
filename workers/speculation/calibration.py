"""What a draft's chances are worth: how often the target really takes a node, given that it took the node's parent.

A draft model's own probability says how sure it is, not how right. Each source of drafts is measured by the raw chance
of a node, in bins that are narrow near 0 and 1, where draft models live; and by depth and by rank, for metrics and for
static trees. Depth is not told apart in the calibration: once the parent was taken, the draft model and the target have
read the same text, however deep the node lies.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence

import numpy as np

from tidemill.core.tree import ROOT, TokenTree

EDGES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97)  # between bins
RANK_PRIOR = (0.6, 0.12, 0.05, 0.03, 0.02, 0.01, 0.01, 0.01)  # a child's chance by its place among its siblings
DEPTH_PRIOR = 0.6
MAX_DEPTH = 16  # nodes further down are counted with those at this depth
STRENGTH = 8.0  # observations that a prior counts for
MEMORY = 1000.0  # and after which what was counted is halved
ALPHA_MEMORY = 128.0  # the same for one request, whose text changes
_CELLS = 256  # of the table that chances are looked up in
_CENTRES = tuple((low + high) / 2 for low, high in zip((0.0, *EDGES), (*EDGES, 1.0), strict=True))


class Rates:
    """Shares of successes under Beta priors, one per cell; what is old fades."""

    __slots__ = ("_memory", "_priors", "_taken", "_tried")

    def __init__(self, priors: Sequence[float], memory: float = MEMORY) -> None:
        self._priors = tuple(priors)
        self._memory = memory
        self._taken = [0.0] * len(self._priors)
        self._tried = [0.0] * len(self._priors)

    def observe(self, cell: int, taken: bool) -> None:
        self._tried[cell] += 1.0
        if taken:
            self._taken[cell] += 1.0
        if self._tried[cell] >= self._memory:
            self._tried[cell] /= 2
            self._taken[cell] /= 2

    def values(self, priors: Sequence[float] | None = None) -> list[float]:
        """Of all cells, 0 to 1: their priors before the first observation. Other priors may be put in their place."""
        return [
            (taken + STRENGTH * prior) / (tried + STRENGTH)
            for taken, tried, prior in zip(self._taken, self._tried, priors or self._priors, strict=True)
        ]


class Alpha:
    """Of one request: how often the target took one of the nodes it was offered after a node; a moving average."""

    __slots__ = ("_rates",)

    def __init__(self, prior: float) -> None:
        self._rates = Rates((prior,), ALPHA_MEMORY)

    def observe(self, tree: TokenTree, accepted: Sequence[int]) -> None:
        """`accepted` nodes of the tree from below the root downward."""
        for _ in accepted:
            self._rates.observe(0, True)
        last = accepted[-1] if accepted else ROOT
        if last in tree.parents:
            self._rates.observe(0, False)

    @property
    def value(self) -> float:
        """0 to 1."""
        return self._rates.values()[0]


class _Source:
    """What is known of one source's drafts."""

    def __init__(self) -> None:
        self.bins = Rates(_CENTRES)
        self.means = list(_CENTRES)  # mean raw chance of each bin's latest observations
        self.ranks = Rates(RANK_PRIOR)
        self.depths = Rates([DEPTH_PRIOR] * MAX_DEPTH)
        self._table: list[float] | None = None

    def observe(self, chance: float, taken: bool, rank: int, depth: int) -> None:
        place = bisect_right(EDGES, chance)
        self.bins.observe(place, taken)
        self.means[place] += (chance - self.means[place]) / 64
        self.ranks.observe(min(rank, len(RANK_PRIOR) - 1), taken)
        self.depths.observe(min(depth, MAX_DEPTH) - 1, taken)
        self._table = None

    @property
    def table(self) -> list[float]:
        """Calibrated chance by raw chance, straight lines between the bins; made when first needed after a change."""
        if self._table is None:
            cells = (np.arange(_CELLS + 1) + 0.5) / _CELLS
            self._table = np.interp(cells, [0.0, *self.means], [0.0, *self.bins.values(self.means)]).tolist()
        return self._table


class Calibration:
    """Of all sources, by name. Raw chances in, measured chances out; a source nobody has observed is believed.

    `observe` only nodes whose parent the target took: of the others nothing is known. Where a source gives no chances,
    its nodes count as certain, and their measured chance is what they have in common.
    """

    def __init__(self) -> None:
        self._sources: dict[str, _Source] = {}

    def observe(self, source: str, chance: float, taken: bool, rank: int = 0, depth: int = 1) -> None:
        """A node of raw `chance`, 0 to 1, the `rank`-th (from 0) of its siblings, at `depth` (from 1)."""
        self._known(source).observe(chance, taken, rank, depth)

    def observe_verdict(self, source: str, tree: TokenTree, accepted: Sequence[int]) -> None:
        """All that a verdict tells: `tree` as verified, with raw chances, and its accepted nodes from the top down."""
        known = self._known(source)
        depths = {node: depth for depth, node in enumerate((ROOT, *accepted))}
        ranks = dict.fromkeys(depths, 0)
        for node, parent in enumerate(tree.parents):
            if parent in depths:
                chance = tree.chances[node] if tree.chances else 1.0
                known.observe(chance, node in depths, ranks[parent], depths[parent] + 1)
                ranks[parent] += 1

    def chance(self, source: str, raw: float) -> float:
        """Measured chance that the target takes a node of this raw chance, given that it took the parent."""
        return self.calibrated(source, (raw,))[0]

    def calibrated(self, source: str, chances: Iterable[float]) -> list[float]:
        """`chance` of many at once."""
        table = self._known(source).table
        return [table[int(chance * _CELLS)] for chance in chances]

    def by_rank(self, source: str) -> tuple[float, ...]:
        """Chance that a node's first, second, ... child is taken: what Sequoia (arXiv 2402.12374) builds trees from."""
        return tuple(self._known(source).ranks.values())

    def by_depth(self, source: str) -> tuple[float, ...]:
        """Chance that a node at depth 1, 2, ... is taken once its parent was; for metrics."""
        return tuple(self._known(source).depths.values())

    def _known(self, source: str) -> _Source:
        known = self._sources.get(source)
        if known is None:
            known = self._sources[source] = _Source()
        return known
