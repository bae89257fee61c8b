"""One draft worker as a verify worker's engine thread sees it: a state machine, calls out and replies in.

What a draft worker is told, and what it answers, changes when a token comes, never which: a draft that does not fit is
ignored. Nothing queues up when it is slow: at most one ask awaits its answer, and few calls are under way in all.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from tidemill.core.messages import Draft, DraftAsk, DraftCall, DraftOpen, DraftReply
from tidemill.core.model import Request

PATIENCE = 3  # late answers in a row after which steps no longer wait for this peer, until it answers in time again
MAX_UNANSWERED = 4  # calls under way; more that has to be said waits and goes as one


class RoundResult(StrEnum):
    """What became of an ask; metric label."""

    USED = "used"
    LATE = "late"
    STALE = "stale"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class Want:
    """Drafts wanted for a request, all of whose tokens are `tokens`."""

    request_id: str
    tokens: list[int]
    count: int


@dataclass(slots=True)
class _Known:
    """What the draft worker has been told of a request: all tokens before `told`."""

    request: Request
    told: int
    opened: bool = False  # it has been sent, so its end has to be sent too


@dataclass(frozen=True, slots=True)
class _Ask:
    """An ask that awaits its answer."""

    round: int
    deadline: float
    wanted: dict[str, tuple[int, int]]  # request -> committed tokens at the time, drafts wanted


class RemoteDrafter:
    """See the module. Times are monotonic seconds."""

    def __init__(self, wait_s: float) -> None:
        """`wait_s`: longest a step waits for an answer."""
        self._wait_s = wait_s
        self._known: dict[str, _Known] = {}
        self._closes: list[str] = []  # of requests it has been told of, so bounded by what was open
        self._rounds = 0
        self._unanswered = 0
        self._ask: _Ask | None = None
        self._missed = False  # the deadline of the current ask has passed, and was counted
        self._misses = 0

    def __len__(self) -> int:
        return len(self._known)

    def open(self, request: Request) -> None:
        """Have it compute its own KV of the request's tokens, beside the prefill worker."""
        self._known[request.id] = _Known(request, len(request.tokens))

    def close_request(self, request_id: str) -> None:
        known = self._known.pop(request_id, None)
        if known is not None and known.opened:
            self._closes.append(request_id)

    def knows(self, request_id: str) -> bool:
        return request_id in self._known

    def next_call(self, wants: Iterable[Want], now: float) -> DraftCall | None:
        """What to send now; None if there is nothing to say, or too much of it is unanswered."""
        if self._unanswered >= MAX_UNANSWERED:
            return None
        asks = self._asks(wants) if self._ask is None else ()
        opens = [each for each in self._known.values() if not each.opened]
        closes = tuple(self._closes)
        if not (asks or opens or closes):
            return None
        self._rounds += 1
        self._unanswered += 1
        self._closes = []
        for each in opens:
            each.opened = True
        if asks:
            wanted = {ask.request_id: (ask.base + len(ask.tokens), ask.want) for ask in asks}
            self._ask, self._missed = _Ask(self._rounds, now + self._wait_s, wanted), False
        return DraftCall(self._rounds, tuple(DraftOpen(each.request) for each in opens), asks, closes)

    def _asks(self, wants: Iterable[Want]) -> tuple[DraftAsk, ...]:
        asks = []
        for want in wants:
            known = self._known.get(want.request_id)
            if known is not None:
                asks.append(DraftAsk(want.request_id, known.told, tuple(want.tokens[known.told :]), want.count))
                known.told = len(want.tokens)
        return tuple(asks)

    def wait_until(self, now: float) -> float | None:
        """Until when the next step should wait for the answer; None if there is none to wait for."""
        if self._ask is None:
            return None
        self._note_deadline(now)
        return None if self._missed or self._misses >= PATIENCE else self._ask.deadline

    def _note_deadline(self, now: float) -> None:
        if self._ask is not None and not self._missed and now >= self._ask.deadline:
            self._missed = True
            self._misses += 1

    def answered(self, reply: DraftReply, now: float) -> tuple[RoundResult | None, tuple[Draft, ...]]:
        """What a reply means, and those of its drafts that answer what was asked. None: it answers no ask.

        USED is a promise of the peer's punctuality only; whether the drafts still fit is the engine's to say.
        """
        self._unanswered = max(self._unanswered - 1, 0)
        if self._ask is None or reply.round != self._ask.round:
            return (RoundResult.STALE, ()) if reply.drafts else (None, ())
        self._note_deadline(now)
        ask, self._ask = self._ask, None
        if not self._missed:
            self._misses = 0
        drafts = []
        for draft in reply.drafts:
            base, count = ask.wanted.get(draft.request_id, (-1, 0))
            if not draft.tokens:
                self.close_request(draft.request_id)  # it has lost track, and would have to be told everything again
            elif draft.base == base:
                drafts.append(Draft(draft.request_id, base, draft.tokens[:count], draft.parents[:count]))
        return (RoundResult.LATE if self._missed else RoundResult.USED), tuple(drafts)

    @property
    def asked(self) -> bool:
        """True while an ask awaits its answer."""
        return self._ask is not None
