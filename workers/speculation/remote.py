"""Drafts from a draft worker, as a verify worker's engine thread sees them.

At most one call is under way with a draft worker, so nothing queues up when it is slow. What it is told, and what it
answers, only ever changes when a token comes, never which: a draft that does not fit is ignored.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from tidemill.core.messages import DraftAsk, DraftCall, DraftOpen, DraftReply
from tidemill.core.model import Peer, Request

PATIENCE = 3  # late answers in a row after which steps no longer wait for this peer, until it answers in time again


class RoundResult(StrEnum):
    """What became of a call; metric label."""

    USED = "used"
    LATE = "late"
    STALE = "stale"
    LOST = "lost"


class DraftStream(Protocol):
    """The wire to one draft worker. `send` never blocks; replies and the end of the stream are posted back."""

    def send(self, call: DraftCall) -> None: ...

    def close(self) -> None: ...


@dataclass(slots=True)
class _Told:
    """What the draft worker knows of a request: it has all tokens before `tokens`."""

    request: Request
    told: int


@dataclass(slots=True)
class _Round:
    number: int
    deadline: float
    late: bool = False


@dataclass(slots=True)
class RemoteDrafter:
    """One draft worker. Opens and closes wait here for the next call."""

    peer: Peer
    stream: DraftStream
    _known: dict[str, _Told] = field(default_factory=dict)
    _opens: list[DraftOpen] = field(default_factory=list)
    _closes: list[str] = field(default_factory=list)
    _round: _Round | None = None
    _rounds: int = 0
    _misses: int = 0

    def open(self, request: Request) -> None:
        """Have it compute its own KV of the request's tokens, beside the prefill worker."""
        self._known[request.id] = _Told(request, len(request.tokens))
        self._opens.append(DraftOpen(request))
        self.flush()

    def close_request(self, request_id: str) -> None:
        if self._known.pop(request_id, None) is not None:
            self._opens = [each for each in self._opens if each.request.id != request_id]
            self._closes.append(request_id)
            self.flush()

    def knows(self, request_id: str) -> bool:
        return request_id in self._known

    @property
    def busy(self) -> bool:
        """True while an answer is owed."""
        return self._round is not None

    def flush(self) -> None:
        """Say what waits to be said, unless an answer is owed."""
        self.call({}, 0.0, 0.0)

    def call(self, committed: dict[str, tuple[list[int], int]], now: float, wait_s: float) -> None:
        """Say what is new. `committed`: request -> (all its tokens, drafts wanted). Nothing is sent while busy."""
        if self._round is not None or not (committed or self._opens or self._closes):
            return
        asks = []
        for request_id, (tokens, want) in committed.items():
            told = self._known[request_id]
            asks.append(DraftAsk(request_id, told.told, tuple(tokens[told.told :]), want))
            told.told = len(tokens)
        self._rounds += 1
        call = DraftCall(self._rounds, tuple(self._opens), tuple(asks), tuple(self._closes))
        self._opens, self._closes = [], []
        if asks:  # only asks are answered
            self._round = _Round(self._rounds, now + wait_s)
        self.stream.send(call)

    def wait_until(self, now: float) -> float | None:
        """Until when the next step should wait for the answer; None if there is none to wait for."""
        if self._round is None or self._round.late:
            return None
        if now >= self._round.deadline or self._misses >= PATIENCE:
            self._round.late = True
            self._misses += 1
            return None
        return self._round.deadline

    def answered(self, reply: DraftReply) -> RoundResult:
        """Take note of a reply; its drafts count if this returns USED (or LATE, where they may still fit)."""
        if self._round is None or reply.round != self._round.number:
            return RoundResult.STALE
        late, self._round = self._round.late, None
        self.flush()
        if late:
            return RoundResult.LATE
        self._misses = 0
        return RoundResult.USED
