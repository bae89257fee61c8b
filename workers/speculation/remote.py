"""One draft worker as a verify worker's engine thread sees it: a state machine, calls out and replies in.

What a draft worker is told, and what it answers, changes when a token comes, never which: a draft that does not fit is
ignored. Asks do not wait for each other's answers, since a round trip may take longer than a step; yet nothing queues
up when the draft worker is slow, because few calls are under way in all.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from tidemill.core.messages import Draft, DraftAsk, DraftCall, DraftOpen, DraftReply
from tidemill.core.model import Request
from tidemill.core.tree import Shape

PATIENCE = 3  # late answers in a row after which steps no longer wait for this peer, until it answers in time again
MAX_UNANSWERED = 8  # calls under way; more that has to be said waits and goes as one
MEMORY = 0.2  # weight of the newest round trip in their average
AGAIN = 0.1  # of that average: an answer so soon says that the draft worker was stuck, and is not any more


class RoundResult(StrEnum):
    """What became of an ask; metric label."""

    ANSWERED = "answered"
    LATE = "late"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class Want:
    """Drafts wanted for a request, all of whose tokens are `tokens`; see DraftAsk."""

    request_id: str
    tokens: list[int]
    shape: Shape
    ahead: int = 0


@dataclass(frozen=True, slots=True)
class NextAnswer:
    """The answer to the newest ask, which a step may wait for. Monotonic seconds."""

    expected_at: float
    deadline: float  # nobody waits longer


@dataclass(slots=True)
class _Known:
    """What the draft worker has been told of a request: all tokens before `told`."""

    request: Request
    told: int
    opened: bool = False  # it has been sent, so its end has to be sent too


@dataclass(slots=True)
class _Call:
    """A call that awaits its answer."""

    round: int
    sent_at: float
    asks: bool
    missed: bool = False  # its deadline has passed, and was counted


class RemoteDrafter:
    """See the module. Times are monotonic seconds."""

    def __init__(self, wait_s: float) -> None:
        """`wait_s`: longest a step waits for an answer."""
        self._wait_s = wait_s
        self._known: dict[str, _Known] = {}
        self._closes: list[str] = []  # of requests it has been told of, so bounded by what was open
        self._rounds = 0
        self._calls: deque[_Call] = deque()
        self._misses = 0
        self.round_trip_s: float | None = None  # from an ask to its first answer, drafting included; a moving average
        self.step_s: float | None = None  # of the draft worker's engine, as it says

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
        if len(self._calls) >= MAX_UNANSWERED:
            return None
        asks = self._asks(wants)
        opens = [each for each in self._known.values() if not each.opened]
        closes = tuple(self._closes)
        if not (asks or opens or closes):
            return None
        self._rounds += 1
        self._calls.append(_Call(self._rounds, now, bool(asks)))
        self._closes = []
        for each in opens:
            each.opened = True
        return DraftCall(self._rounds, tuple(DraftOpen(each.request) for each in opens), asks, closes)

    def _asks(self, wants: Iterable[Want]) -> tuple[DraftAsk, ...]:
        asks = []
        for want in wants:
            known = self._known.get(want.request_id)
            if known is not None:
                new = tuple(want.tokens[known.told :])
                asks.append(DraftAsk(want.request_id, known.told, new, want.shape, want.ahead))
                known.told = len(want.tokens)
        return tuple(asks)

    @property
    def asked(self) -> bool:
        """True while an ask awaits its answer."""
        return any(call.asks for call in self._calls)

    def next_answer(self, now: float) -> NextAnswer | None:
        """None if there is none to wait for."""
        self._note_deadlines(now)
        newest = next((call for call in reversed(self._calls) if call.asks), None)
        if newest is None or newest.missed or self._misses >= PATIENCE:
            return None
        usual_s = self._wait_s if self.round_trip_s is None else min(self.round_trip_s, self._wait_s)
        return NextAnswer(newest.sent_at + usual_s, newest.sent_at + self._wait_s)

    def _note_deadlines(self, now: float) -> None:
        for call in self._calls:
            if call.asks and not call.missed and now >= call.sent_at + self._wait_s:
                call.missed = True
                self._misses += 1

    def answered(self, reply: DraftReply, came_at: float) -> tuple[list[RoundResult], tuple[Draft, ...]]:
        """What became of the asks that a reply answers, and its drafts for requests that are still drafted for.

        `came_at` may be long ago, if a step was under way; its deadline may have been noted since, and was not missed.
        """
        self._note_deadlines(came_at)
        results = []
        while self._calls and self._calls[0].round <= reply.round:
            call = self._calls.popleft()
            if call.asks:
                took = came_at - call.sent_at
                late = took >= self._wait_s
                results.append(RoundResult.LATE if late else RoundResult.ANSWERED)
                self._misses = self._misses if late else 0
                self._took(took)
        self.step_s = reply.step_s or self.step_s
        for request_id in reply.lost:
            self._known.pop(request_id, None)  # it would have to be told everything again
        return results, tuple(draft for draft in reply.drafts if self.knows(draft.request_id))

    def _took(self, round_trip_s: float) -> None:
        before = self.round_trip_s
        if before is None or round_trip_s < AGAIN * before:
            self.round_trip_s = round_trip_s
        else:
            self.round_trip_s = before + MEMORY * (round_trip_s - before)
