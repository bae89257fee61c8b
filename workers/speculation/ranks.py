"""How often the target takes a draft's likeliest token, its second likeliest, and so on: for static trees."""

from collections.abc import Sequence

from tidemill.core.tree import ROOT, Shape, TokenTree
from workers.speculation.static_tree import Template, optimal_tree

# Largest template, since finding the best one takes (nodes * nodes * levels * ranks) operations.
MAX_NODES, MAX_DEPTH = 64, 16
STEP = 0.05  # chances are told apart by this much, so that templates are found seldom
PRIOR = (0.7, 0.1, 0.04, 0.02, 0.01, 0.005, 0.005, 0.005)
PRIOR_WEIGHT, MEMORY = 20.0, 2000.0  # observations the prior counts for, and after which old ones fade


class RankAcceptance:
    """Measured by whoever drafts, from the tokens that were committed after its trees."""

    def __init__(self) -> None:
        self._hits = [chance * PRIOR_WEIGHT for chance in PRIOR]
        self._seen = PRIOR_WEIGHT

    def observe(self, tree: TokenTree, tokens: Sequence[int]) -> None:
        """`tokens` were committed after the tree's root. Counts every node on their way that has children."""
        node = ROOT
        for token in tokens:
            children = [child for child, parent in enumerate(tree.parents) if parent == node]
            if not children:
                return
            rank = next((rank for rank, child in enumerate(children) if tree.tokens[child] == token), None)
            self._count(rank)
            if rank is None:
                return
            node = children[rank]

    def _count(self, rank: int | None) -> None:
        self._seen += 1.0
        if rank is not None and rank < len(self._hits):
            self._hits[rank] += 1.0
        if self._seen > MEMORY:
            self._seen /= 2
            self._hits = [hits / 2 for hits in self._hits]

    @property
    def chances(self) -> tuple[float, ...]:
        """By rank, from 0."""
        return tuple(hits / self._seen for hits in self._hits)

    def template(self, shape: Shape) -> Template:
        """The best static tree within the shape."""
        rounded = tuple(max(round(chance / STEP) * STEP, STEP / 10) for chance in self.chances[: shape.width])
        return optimal_tree(rounded, min(shape.nodes, MAX_NODES), min(shape.depth, MAX_DEPTH))
