"""What followed the last two tokens before: the trigram drafts of ADED (2024), searched best first.

The paper walks the trigrams by Monte-Carlo tree search, starting from tables of a corpus; here counts are of the
tenant's own outputs, and the likeliest paths are found exactly.
"""

from collections import OrderedDict
from collections.abc import Sequence
from operator import itemgetter

from tidemill.core.tree import EMPTY, Shape, TokenTree
from workers.speculation.sources.base import Source, best_first

Context = tuple[int, int]
SUCCESSORS = 8  # counted for one context
_count_of = itemgetter(1)


class Trigram(Source):
    """Counts of successors for at most `contexts` pairs of tokens; the pair not met for the longest gives way."""

    name = "trigram"

    def __init__(self, contexts: int = 65_536) -> None:
        self._limit = contexts
        self._counts: OrderedDict[Context, dict[int, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._counts)

    def propose(self, request_id: str, tokens: Sequence[int], shape: Shape) -> TokenTree:
        if len(tokens) < 2:
            return EMPTY
        return best_first((tokens[-2], tokens[-1]), self._expand, shape)

    def _expand(self, context: Context) -> list[tuple[int, float, Context]]:
        """Chance = count / (counts in all + different tokens): method C of PPM (Moffat 1990) leaves some to others."""
        counts = self._counts.get(context)
        if counts is None:
            return []
        total = sum(counts.values()) + len(counts)
        ranked = sorted(counts.items(), key=_count_of, reverse=True)
        return [(token, count / total, (context[1], token)) for token, count in ranked]

    def learn(self, request_id: str, tokens: Sequence[int], start: int) -> None:
        for index in range(max(start, 2), len(tokens)):
            self._count((tokens[index - 2], tokens[index - 1]), tokens[index])

    def _count(self, context: Context, token: int) -> None:
        counts = self._counts.setdefault(context, {})
        if token not in counts and len(counts) >= SUCCESSORS:
            del counts[min(counts, key=counts.__getitem__)]
        counts[token] = counts.get(token, 0) + 1
        self._counts.move_to_end(context)
        if len(self._counts) > self._limit:
            self._counts.popitem(last=False)
