"""What followed when the last tokens were met before: in the request's own text, or in its tenant's earlier outputs.

Prompt lookup (Saxena 2023) and SuffixDecoding (Oliaro et al. 2024). The longest match decides how much is drafted, and
how often its continuations came decides what. In place of a suffix tree the text is kept flat and scanned: for texts
of this size a scan at the memory's speed costs about 20 us, nothing has to be built when a prompt comes, and the memory
is bounded by cutting off the oldest tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tidemill.core.tree import EMPTY, ROOT, Shape, TokenTree
from workers.speculation.sources.base import Rates, Recent, Source, best_first

MIN_MATCH = 2  # tokens; single ones are better served by other sources
MAX_MATCH = 8  # longer matches count as this long
BRANCHES = 8  # newest of the longest matches whose continuations are counted
GAP = -1  # between two texts


@dataclass(frozen=True, slots=True)
class Match:
    """The last `length` tokens were met before; `continuations` came next, newest first, each up to its text's end."""

    length: int  # 0: there is no match
    continuations: list[list[int]]


class History:
    """The newest tokens of a growing text: `capacity` of them at least, twice as many at most, 4 bytes each."""

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"a history keeps at least one token, not {capacity}")
        self._capacity = capacity
        self._limit = MAX_MATCH + 2 * capacity
        # Begins with gaps, so that a match may be read backwards from any token.
        self._text = np.full(min(1024, self._limit), GAP, np.int32)
        self._size = MAX_MATCH
        self.total = 0  # tokens ever added

    @property
    def memory_bytes(self) -> int:
        return self._text.nbytes

    def extend(self, tokens: Sequence[int]) -> None:
        """The text goes on with these."""
        new = np.asarray(tokens[-self._capacity :], np.int32)
        self.total += len(tokens)
        if self._size + len(new) > self._limit or len(tokens) > self._capacity:
            self._cut(self._capacity - len(new))
        size = self._size + len(new)
        if size > len(self._text):
            text = np.full(min(max(2 * len(self._text), size), self._limit), GAP, np.int32)
            text[: self._size] = self._text[: self._size]
            self._text = text
        self._text[self._size : size] = new
        self._size = size

    def _cut(self, count: int) -> None:
        """Leave the last `count` tokens."""
        kept = self.tail(count)
        self._size = MAX_MATCH + len(kept)
        self._text[MAX_MATCH : self._size] = kept

    def tail(self, count: int) -> list[int]:
        """The last `count` tokens, or as many as are kept."""
        return self._text[max(self._size - count, MAX_MATCH) : self._size].tolist()

    def find(self, context: Sequence[int], depth: int) -> Match:
        """The longest match of the end of `context`, with up to `depth` tokens of each continuation."""
        context = context[-MAX_MATCH:]
        text = self._text[: self._size]
        if len(context) < MIN_MATCH:
            return Match(0, [])
        found = (text[MAX_MATCH:-1] == context[-1]) & (text[MAX_MATCH - 1 : -2] == context[-2])
        ends = np.flatnonzero(found) + MAX_MATCH  # of matches of two tokens
        ends = ends[text[ends + 1] != GAP]
        if not len(ends):
            return Match(0, [])
        length = MIN_MATCH
        while length < len(context):
            longer = ends[text[ends - length] == context[-1 - length]]
            if not len(longer):
                break
            ends, length = longer, length + 1
        starts = (ends[-BRANCHES:] + 1)[::-1].tolist()
        return Match(length, [_until_gap(text[start : start + depth].tolist()) for start in starts])


def _until_gap(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(GAP)] if GAP in tokens else tokens


Reached = tuple[list[list[int]], int]  # continuations that share their first so many tokens


def draft(match: Match, rates: Rates, shape: Shape) -> TokenTree:
    """The commonest continuations. `rates[m]`: chance that a match of m tokens goes on as it did before."""

    def expand(state: Reached) -> list[tuple[int, float, Reached]]:
        texts, at = state
        followed: dict[int, list[list[int]]] = {}
        for text in texts:
            if at < len(text):
                followed.setdefault(text[at], []).append(text)
        # A token that is taken makes the match longer by one.
        trust = rates[min(match.length + at, MAX_MATCH)] / len(texts)
        ranked = sorted(followed.items(), key=lambda item: -len(item[1]))
        return [(token, trust * len(some), (some, at + 1)) for token, some in ranked]

    return best_first((match.continuations, 0), expand, shape) if match.length else EMPTY


@dataclass(slots=True)
class _Draft:
    """A draft whose outcome is not known yet: made after `base` tokens, by a match of `length`, judged in `rates`."""

    base: int
    length: int
    tree: TokenTree
    rates: Rates


@dataclass(slots=True)
class _Text:
    """A request's own: prompt and output so far. `prompt` tokens were there before the first output was learned."""

    history: History
    prompt: int = 0
    draft: _Draft | None = None


class Lookup(Source):
    """One tenant's earlier outputs, and the text of each of its requests under way.

    A draft has at most match length · `factor` + `offset` nodes. An output joins the shared text when its request is
    forgotten, together with the last tokens before it, which tell how it began.
    """

    name = "lookup"

    def __init__(
        self,
        *,
        own_tokens: int = 32_768,
        shared_tokens: int = 32_768,
        requests: int = 1024,
        factor: float = 2.0,
        offset: float = 0.0,
    ) -> None:
        """`own_tokens`, `shared_tokens`: see History. `requests`: under way at most, others are no longer known."""
        self._shared = History(shared_tokens)
        self._texts: Recent[_Text] = Recent(lambda: _Text(History(own_tokens)), requests)
        self._factor = factor
        self._offset = offset
        # Of matches by length; the same guess for both, until it is known how good they are. No match: never.
        self._own_rates = Rates(length / (length + 3) for length in range(MAX_MATCH + 1))
        self._shared_rates = Rates(length / (length + 3) for length in range(MAX_MATCH + 1))

    @property
    def memory_bytes(self) -> int:
        """Of the shared text and those of requests under way."""
        return self._shared.memory_bytes + sum(text.history.memory_bytes for text in self._texts.things())

    def propose(self, request_id: str, tokens: Sequence[int], shape: Shape) -> TokenTree:
        text = self._texts.peek(request_id)
        match, rates = self._shared.find(tokens, shape.depth), self._shared_rates
        if text is not None:
            own = text.history.find(tokens, shape.depth)
            if self._own_rates[own.length] >= rates[match.length]:
                match, rates = own, self._own_rates
        nodes = min(shape.nodes, int(match.length * self._factor + self._offset))
        tree = draft(match, rates, replace(shape, nodes=nodes))
        if text is not None and text.history.total == len(tokens):  # else the tokens are not what will be committed
            text.draft = _Draft(len(tokens), match.length, tree, rates)
        return tree

    def learn(self, request_id: str, tokens: Sequence[int], start: int) -> None:
        """As Source says; where a request is new, or has given way to others, `tokens[:start]` counts as its prompt."""
        text = self._texts.get(request_id)
        if text.history.total == 0:
            text.prompt = start
        if text.draft is not None:
            _judge(text.draft, tokens[text.draft.base :])
            text.draft = None
        text.history.extend(tokens[text.history.total :])

    def forget(self, request_id: str) -> None:
        text = self._texts.pop(request_id)
        if text is not None and text.history.total > text.prompt:
            output = text.history.total - text.prompt
            self._shared.extend([GAP, *text.history.tail(output + min(text.prompt, MAX_MATCH))])


def _judge(made: _Draft, tokens: Sequence[int]) -> None:
    """Note for each level that was reached whether one of its tokens came."""
    tree = made.tree
    inner = set(tree.parents)
    node: int | None = ROOT
    for depth, token in enumerate(tokens):
        if node not in inner:
            return
        node = tree.child(node, token)
        made.rates.note(min(made.length + depth, MAX_MATCH), node is not None)
