"""What a draft's chances are worth: how often the target really takes a node, given that it took the node's parent.

A draft model's own probability says how sure it is, not how right. Each source of drafts is measured by the raw chance
of a node, in bins that are narrow near 0 and 1, where draft models live. Depth is not told apart: once the parent was
taken, the draft model and the target have read the same text, however deep the node lies.
"""

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tidemill.core.tree import ROOT, TokenTree

EDGES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97)  # between bins
STRENGTH = 8.0  # observations that a prior counts for
MEMORY = 1000.0  # and after which what was counted is halved
ALPHA_MEMORY = 128.0  # the same for one request, whose text changes
_CELLS = 256  # of the table that chances are looked up in
_MIDDLES = (np.arange(_CELLS + 1) + 0.5) / _CELLS
_CENTRES = tuple((low + high) / 2 for low, high in zip((0.0, *EDGES), (*EDGES, 1.0), strict=True))

Floats = npt.NDArray[np.float64]


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

    def value(self, cell: int) -> float:
        """0 to 1: its prior before the first observation."""
        return (self._taken[cell] + STRENGTH * self._priors[cell]) / (self._tried[cell] + STRENGTH)

    def values(self, priors: Sequence[float]) -> list[float]:
        """Of all cells, with these priors in place of their own."""
        return [
            (taken + STRENGTH * prior) / (tried + STRENGTH)
            for taken, tried, prior in zip(self._taken, self._tried, priors, strict=True)
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
        return self._rates.value(0)


class _Source:
    """What is known of one source's drafts."""

    def __init__(self) -> None:
        self.bins = Rates(_CENTRES)
        self.means = list(_CENTRES)  # mean raw chance of each bin's latest observations
        self._table: Floats | None = None

    def observe(self, chance: float, taken: bool) -> None:
        place = bisect_right(EDGES, chance)
        self.bins.observe(place, taken)
        self.means[place] += (chance - self.means[place]) / 64
        self._table = None

    @property
    def table(self) -> Floats:
        """Calibrated chance by raw chance, straight lines between the bins; made when first needed after a change."""
        if self._table is None:
            self._table = np.interp(_MIDDLES, [0.0, *self.means], [0.0, *self.bins.values(self.means)])
        return self._table


class Calibration:
    """Of all sources, by name. Raw chances in, measured chances out; a source nobody has observed is believed.

    `observe` only nodes whose parent the target took: of the others nothing is known. Where a source gives no chances,
    its nodes count as certain, and their measured chance is what they have in common.
    """

    def __init__(self) -> None:
        self._sources: dict[str, _Source] = {}

    def observe(self, source: str, chance: float, taken: bool) -> None:
        """A node of raw `chance`, 0 to 1."""
        self._known(source).observe(chance, taken)

    def observe_verdict(self, source: str, tree: TokenTree, accepted: Sequence[int]) -> None:
        """All that a verdict tells: `tree` as verified, with raw chances, and its accepted nodes from the top down."""
        known = self._known(source)
        taken = {ROOT, *accepted}
        for node, parent in enumerate(tree.parents):
            if parent in taken:
                known.observe(tree.chances[node] if tree.chances else 1.0, node in taken)

    def calibrated(self, source: str, chances: Floats) -> Floats:
        """Measured chances that the target takes nodes of these raw chances, given that it took their parents."""
        return self._known(source).table[(chances * _CELLS).astype(np.intp)]

    def _known(self, source: str) -> _Source:
        known = self._sources.get(source)
        if known is None:
            known = self._sources[source] = _Source()
        return known
