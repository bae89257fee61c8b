"""One sequence inside the engine."""

from dataclasses import dataclass
from enum import StrEnum

from tidemill.core.model import Request
from tidemill.core.text import TextStream
from tidemill.core.tree import EMPTY, TokenTree
from tidemill.types import FinishReason
from workers.engine.native.growth import Growth
from workers.engine.native.table import BlockTable
from workers.engine.sampling import Sampler


class SequenceState(StrEnum):
    """See workers/engine/base.py."""

    WAITING = "waiting"
    RUNNING = "running"
    HELD = "held"
    RECEIVING = "receiving"
    PAUSED = "paused"


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens, and how far their KV is in the pool. The engine's thread owns it and its blocks."""

    request: Request
    tokens: list[int]
    decodes: bool  # until it finishes; False: it is held once the KV of all tokens but the last is here
    kv: BlockTable
    sampler: Sampler
    text: TextStream | None = None  # only where stop strings are looked for
    state: SequenceState = SequenceState.WAITING
    draft: TokenTree = EMPTY  # to be verified in the next step
    growth: Growth | None = None  # the tree drafted after its tokens
    turn: int = 0  # when it last got rows; the lowest is the one that waited longest

    @property
    def goal(self) -> int:
        """Tokens whose KV is wanted now: all, or all but the last if nothing is to be decoded."""
        return len(self.tokens) - (not self.decodes)

    @property
    def todo(self) -> int:
        """Rows until the goal."""
        return len(self.tokens) - self.kv.computed - (not self.decodes)

    @property
    def decoding(self) -> bool:
        """True if its next row yields a token."""
        return self.decodes and self.kv.computed == len(self.tokens) - 1 and self.state is SequenceState.RUNNING

    @property
    def room(self) -> int:
        """Tokens that may still be decoded, by `max_tokens`."""
        return self.request.sampling.max_tokens - (len(self.tokens) - len(self.request.prompt))

    def append(self, token: int, eos: frozenset[int], context_length: int) -> FinishReason | None:
        """Add a decoded token; says whether the output ends with it."""
        self.tokens.append(token)
        self.sampler.add(token)
        full = len(self.tokens) >= context_length
        sampling = self.request.sampling
        if token in sampling.stop_token_ids or (token in eos and not sampling.ignore_eos):
            return FinishReason.STOP_TOKEN
        if self.text is not None:
            self.text.push((token,))
            if self.text.stopped:
                return FinishReason.STOP_STRING
        return FinishReason.LENGTH if full or self.room <= 0 else None

    def follow(self, output: list[int]) -> None:
        """Its output is this now. Keeps the KV that still fits, and what of its tree still follows."""
        tokens = [*self.request.prompt, *output]
        common, last = common_prefix(self.tokens, tokens), len(tokens) - 1
        computed = self.kv.computed
        if common == len(self.tokens):
            added = tokens[common:]
            if self.growth is not None:
                computed += self.growth.follow(added)
            for token in added:
                self.sampler.add(token)
        else:
            self.drop_growth()
            self.sampler = Sampler(self.request.sampling, self.request.prompt, output)
            self.kv.diverge(common, last)
            computed = self.kv.computed
        self.tokens = tokens
        self.kv.advance(tokens, min(computed, last))

    def take_blocks(self) -> None:
        """Give its KV up; the tokens stay."""
        self.drop_growth()
        self.kv.clear()
        self.draft = EMPTY

    def drop_growth(self) -> None:
        """Forget the tree and free its branches."""
        if self.growth is not None:
            self.growth.clear()
            self.growth = None


def common_prefix(left: list[int], right: list[int]) -> int:
    """Length of the common prefix: bisection, because comparing slices is far cheaper than comparing tokens."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
