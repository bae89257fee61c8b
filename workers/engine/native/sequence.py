"""One sequence inside the engine."""

from dataclasses import dataclass
from enum import StrEnum

from tidemill.core.model import Request
from tidemill.core.text import TextStream
from tidemill.types import FinishReason
from workers.engine.native.table import BlockTable
from workers.engine.sampling import Sampler


class SequenceState(StrEnum):
    """See workers/engine/base.py."""

    WAITING = "waiting"
    RUNNING = "running"
    HELD = "held"
    RECEIVING = "receiving"


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens, and how far their KV is in the pool. The engine's thread owns it and its blocks."""

    request: Request
    tokens: list[int]
    quota: int | None  # tokens still to decode before it is held; None: decode until it finishes
    kv: BlockTable
    sampler: Sampler
    text: TextStream | None = None  # only where stop strings are looked for
    state: SequenceState = SequenceState.WAITING
    draft: tuple[int, ...] = ()  # to be verified in the next step
    turn: int = 0  # when it last got rows; the lowest is the one that waited longest

    @property
    def goal(self) -> int:
        """Tokens whose KV is wanted now: all, or all but the last if nothing is to be decoded."""
        return len(self.tokens) - (1 if self.quota == 0 else 0)

    @property
    def todo(self) -> int:
        """Rows until the goal."""
        return len(self.tokens) - self.kv.computed - (1 if self.quota == 0 else 0)

    @property
    def decoding(self) -> bool:
        """True if its next row yields a token."""
        return self.quota != 0 and self.kv.computed == len(self.tokens) - 1 and self.state is SequenceState.RUNNING

    @property
    def room(self) -> int:
        """Tokens that may still be decoded, by `max_tokens` or the quota."""
        if self.quota is not None:
            return self.quota
        return self.request.sampling.max_tokens - (len(self.tokens) - len(self.request.prompt))

    def append(self, token: int, eos: frozenset[int], context_length: int) -> FinishReason | None:
        """Add a decoded token; says whether the output ends with it."""
        self.tokens.append(token)
        self.sampler.add(token)
        full = len(self.tokens) >= context_length
        if self.quota is not None:
            self.quota = 0 if full else self.quota - 1
            return None
        sampling = self.request.sampling
        if token in sampling.stop_token_ids or (token in eos and not sampling.ignore_eos):
            return FinishReason.STOP_TOKEN
        if self.text is not None:
            self.text.push((token,))
            if self.text.stopped:
                return FinishReason.STOP_STRING
        return FinishReason.LENGTH if full or self.room <= 0 else None

    def replace_output(self, output: list[int], quota: int) -> None:
        """Other tokens after the prompt, and `quota` to decode after them. Keeps the KV that still fits."""
        tokens = [*self.request.prompt, *output]
        common = common_prefix(self.tokens, tokens)
        self.tokens, self.quota, self.draft = tokens, quota, ()
        self.sampler = Sampler(self.request.sampling, self.request.prompt, output)
        self.kv.diverge(common, len(tokens) - 1)

    def take_blocks(self) -> None:
        """Give its KV up; the tokens stay."""
        self.kv.clear()
        self.draft = ()


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
