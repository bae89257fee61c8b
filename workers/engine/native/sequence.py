"""One sequence inside the engine."""

from dataclasses import dataclass, field
from enum import StrEnum

from tidemill.core.model import Request
from tidemill.core.text import TextStream
from tidemill.types import FinishReason


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
    state: SequenceState = SequenceState.WAITING
    computed: int = 0  # tokens whose KV is in `blocks`
    blocks: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)  # of the leading full blocks, published or found in the cache
    draft: tuple[int, ...] = ()  # to be verified in the next step
    text: TextStream | None = None  # only where stop strings are looked for

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt)

    @property
    def goal(self) -> int:
        """Tokens whose KV is wanted now: all, or all but the last if nothing is to be decoded."""
        return len(self.tokens) - (1 if self.quota == 0 else 0)

    @property
    def todo(self) -> int:
        """Rows until the goal."""
        return self.goal - self.computed

    @property
    def decoding(self) -> bool:
        """True if its next row yields a token."""
        return self.state is SequenceState.RUNNING and self.quota != 0 and self.todo == 1

    @property
    def room(self) -> int:
        """Tokens that may still be decoded, by `max_tokens` or the quota."""
        if self.quota is not None:
            return self.quota
        return self.request.sampling.max_tokens - (len(self.tokens) - self.prompt_length)

    def append(self, token: int, eos: frozenset[int], context_length: int) -> FinishReason | None:
        """Add a decoded token; says whether the output ends with it."""
        self.tokens.append(token)
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
