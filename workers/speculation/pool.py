"""All draft workers a verify worker draws from."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from tidemill.core.messages import Draft, DraftCall, DraftReply
from tidemill.core.model import Peer, Request
from tidemill.core.settings import SpeculationSettings
from workers.speculation.remote import RemoteDrafter, RoundResult, Want

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


@dataclass(frozen=True, slots=True)
class Committed:
    """A request that decodes, all its tokens, and the draft worker it draws from."""

    drafter: Peer
    request: Request
    tokens: list[int]


class DrafterPool:
    """Draft workers by name@epoch, connected at the first request that names them."""

    def __init__(self, settings: SpeculationSettings, connect: DraftConnect) -> None:
        self._settings = settings
        self._connect = connect
        self._drafters: dict[Peer, _Drafter] = {}

    def open(self, peer: Peer, request: Request, now: float) -> None:
        """Have the draft worker compute its KV beside the prefill worker; told by this turn's `poll`."""
        if peer not in self._drafters:
            self._drafters[peer] = _Drafter(RemoteDrafter(self._settings.wait_s), self._connect(peer), now)
        self._drafters[peer].remote.open(request)

    def close_request(self, peer: Peer, request_id: str) -> None:
        """Told by the next `ask` or `poll`."""
        if peer in self._drafters:
            self._drafters[peer].remote.close_request(request_id)

    def ask(self, decoding: Iterable[Committed], batch: int, now: float) -> None:
        """One message to each draft worker: what was committed, what is over, what is wanted.

        No drafts are asked for when `batch`, all that decode, is so large that verifying would cost more than it saves.
        """
        wants: dict[Peer, list[Want]] = {}
        for each in decoding if batch <= self._settings.max_batch else ():
            sampling = each.request.sampling
            left = sampling.max_tokens - (len(each.tokens) - len(each.request.prompt))
            count = min(self._settings.max_draft_tokens, left - 1)  # a step yields one token anyway
            if count > 0:
                wants.setdefault(each.drafter, []).append(Want(each.request.id, each.tokens, count))
        for peer, drafter in self._drafters.items():
            self._call(drafter, wants.get(peer, ()), now)

    def _call(self, drafter: _Drafter, wants: Iterable[Want], now: float) -> None:
        call = drafter.remote.next_call(wants, now)
        if call is not None:
            drafter.used_at = now
            drafter.stream.send(call)

    def poll(self, now: float) -> None:
        """Once a turn: say what is new, close streams that are of no more use."""
        for peer, drafter in list(self._drafters.items()):
            self._call(drafter, (), now)
            if not len(drafter.remote) and now - drafter.used_at > IDLE_S:
                self._drafters.pop(peer).stream.close()

    def wait_until(self, now: float) -> float | None:
        """Until when the next step should wait for drafts; None: not at all."""
        deadlines = [each.remote.wait_until(now) for each in self._drafters.values()]
        return max((deadline for deadline in deadlines if deadline is not None), default=None)

    def answered(self, peer: Peer, reply: DraftReply, now: float) -> tuple[RoundResult | None, tuple[Draft, ...]]:
        """See RemoteDrafter.answered."""
        drafter = self._drafters.get(peer)
        return drafter.remote.answered(reply, now) if drafter is not None else (None, ())

    def lost(self, peer: Peer) -> bool:
        """Forget a draft worker whose stream ended; True if an answer was owed. The next request tries it again."""
        drafter = self._drafters.pop(peer, None)
        return drafter is not None and drafter.remote.asked

    def close(self) -> None:
        for drafter in self._drafters.values():
            drafter.stream.close()
        self._drafters.clear()
