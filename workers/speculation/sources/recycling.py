"""Token Recycling (Luo et al. 2024): what the target found likely after a token, the last time it met the token.

A matrix [vocabulary, 8] keeps the likeliest successors of each token. A tree of fixed shape is filled from it, rank by
rank and level by level.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tidemill.core.tree import EMPTY, ROOT, Shape, TokenTree
from workers.speculation.sources.base import Rates, Source
from workers.speculation.static_tree import optimal_tree

UNSEEN = -1
# First guess at how often the next token is the recycled successor of each rank. It settles the shape for good, and the
# chances until some hundred tokens are learned.
ACCEPTANCE = (0.40, 0.12, 0.06, 0.04, 0.03, 0.02, 0.02, 0.01)
SUCCESSORS = len(ACCEPTANCE)


class Recycling(Source):
    """One tenant's matrix: 32 bytes for each token of the vocabulary."""

    name = "recycling"

    def __init__(self, vocabulary: int) -> None:
        self._successors = np.full((vocabulary, SUCCESSORS), UNSEEN, np.int32)
        self._rates = Rates(ACCEPTANCE)

    @property
    def memory_bytes(self) -> int:
        return self._successors.nbytes

    def propose(self, request_id: str, tokens: Sequence[int], shape: Shape) -> TokenTree:
        if not tokens:
            return EMPTY
        template = optimal_tree(ACCEPTANCE[: max(shape.width, 0)], shape.nodes, shape.depth)
        chances_by_rank = [self._rates[rank] for rank in range(SUCCESSORS)]
        rows = {ROOT: self._successors[tokens[-1]].tolist()}  # by the template's node
        places = {ROOT: ROOT}  # the template's node -> the tree's
        drafted: list[int] = []
        parents: list[int] = []
        chances: list[float] = []
        for node, (parent, rank) in enumerate(zip(template.parents, template.ranks, strict=True)):
            if parent not in rows or rows[parent][rank] == UNSEEN:
                continue
            token = rows[parent][rank]
            places[node] = len(drafted)
            rows[node] = self._successors[token].tolist()
            drafted.append(token)
            parents.append(places[parent])
            chances.append(chances_by_rank[rank])
        return TokenTree(tuple(drafted), tuple(parents), tuple(chances))

    def learn(self, request_id: str, tokens: Sequence[int], start: int) -> None:
        """Measures how often each rank is right. The matrix learns by `observe` alone."""
        for index in range(max(start, 1), len(tokens)):
            row = self._successors[tokens[index - 1]].tolist()
            if row[0] != UNSEEN:
                for rank, successor in enumerate(row):
                    self._rates.note(rank, successor == tokens[index])

    def observe(self, tokens: npt.NDArray[np.integer], successors: npt.NDArray[np.integer]) -> None:
        """See Source; more than 8 successors are cut off. Of a token that comes twice the last counts."""
        count = min(successors.shape[1], SUCCESSORS)
        self._successors[tokens, :count] = successors[:, :count]
        self._successors[tokens, count:] = UNSEEN
