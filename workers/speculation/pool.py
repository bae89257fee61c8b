"""All draft workers a verify worker draws from."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from tidemill.core.messages import Draft, DraftCall, DraftReply
from tidemill.core.model import Peer, Request
from workers.speculation.remote import NextAnswer, RemoteDrafter, RoundResult, Want

IDLE_S = 60.0  # a stream nobody used for so long is closed


class DraftStream(Protocol):
    """The wire to one draft worker. Neither method blocks; replies and the stream's end are told to the verify role."""

    def send(self, call: DraftCall) -> None: ...

    def close(self) -> None: ...


DraftConnect = Callable[[Peer], DraftStream]


@dataclass(slots=True, eq=False)
class _Drafter:
    remote: RemoteDrafter
    stream: DraftStream
    used_at: float


class DrafterPool:
    """Draft workers by name@epoch, connected at the first request that names them."""

    def __init__(self, wait_s: float, connect: DraftConnect) -> None:
        """`wait_s`: longest a step waits for an answer."""
        self._wait_s = wait_s
        self._connect = connect
        self._drafters: dict[Peer, _Drafter] = {}

    def open(self, peer: Peer, request: Request, now: float) -> None:
        """Have the draft worker compute its KV beside the prefill worker; told by this turn's `poll`."""
        if peer not in self._drafters:
            self._drafters[peer] = _Drafter(RemoteDrafter(self._wait_s), self._connect(peer), now)
        self._drafters[peer].remote.open(request)

    def close_request(self, peer: Peer, request_id: str) -> None:
        """Told by the next `ask` or `poll`."""
        if peer in self._drafters:
            self._drafters[peer].remote.close_request(request_id)

    def ask(self, wants: dict[Peer, list[Want]], now: float) -> list[str]:
        """One message to each draft worker: what was committed, what is over, what is wanted.

        Returns the requests that were asked for.
        """
        asked: list[str] = []
        for peer, drafter in self._drafters.items():
            call = self._call(drafter, wants.get(peer, ()), now)
            asked += [each.request_id for each in call.asks] if call is not None else ()
        return asked

    def _call(self, drafter: _Drafter, wants: Iterable[Want], now: float) -> DraftCall | None:
        call = drafter.remote.next_call(wants, now)
        if call is not None:
            drafter.used_at = now
            drafter.stream.send(call)
        return call

    def poll(self, now: float) -> None:
        """Once a turn: say what is new, close streams that are of no more use."""
        for peer, drafter in list(self._drafters.items()):
            self._call(drafter, (), now)
            if not len(drafter.remote) and now - drafter.used_at > IDLE_S:
                self._drafters.pop(peer).stream.close()

    def knows(self, peer: Peer, request_id: str) -> bool:
        """True if the draft worker drafts for the request, as far as is known."""
        return peer in self._drafters and self._drafters[peer].remote.knows(request_id)

    def next_answer(self, now: float) -> NextAnswer | None:
        """The last one that a step may wait for; None if there is none."""
        answers = [each.remote.next_answer(now) for each in self._drafters.values()]
        return max((each for each in answers if each is not None), key=lambda each: each.deadline, default=None)

    def round_trip_s(self) -> float | None:
        """From an ask to its answer, of the slowest draft worker; None if none has answered yet."""
        times = [each.remote.round_trip_s for each in self._drafters.values()]
        return max((each for each in times if each is not None), default=None)

    def step_s(self) -> float | None:
        """Of the slowest draft worker's engine; None if none has said so yet."""
        return max((each.remote.step_s for each in self._drafters.values() if each.remote.step_s), default=None)

    def answered(self, peer: Peer, reply: DraftReply, now: float) -> tuple[list[RoundResult], tuple[Draft, ...]]:
        """See RemoteDrafter.answered."""
        drafter = self._drafters.get(peer)
        return drafter.remote.answered(reply, now) if drafter is not None else ([], ())

    def lost(self, peer: Peer) -> bool:
        """Forget a draft worker whose stream ended; True if an answer was owed. The next request tries it again."""
        drafter = self._drafters.pop(peer, None)
        return drafter is not None and drafter.remote.asked

    def close(self) -> None:
        for drafter in self._drafters.values():
            drafter.stream.close()
        self._drafters.clear()
