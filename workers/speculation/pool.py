"""All draft workers a verify worker draws from."""

from collections.abc import Iterable
from typing import Protocol

from tidemill.core.messages import DraftReply
from tidemill.core.model import Peer, Request
from tidemill.core.settings import SpeculationSettings
from workers.speculation.remote import DraftStream, RemoteDrafter, RoundResult


class DraftConnect(Protocol):
    """Opens a stream to a draft worker. Never blocks; replies and the stream's end come back to the verify role."""

    def __call__(self, peer: Peer) -> DraftStream: ...


class DrafterPool:
    """Draft workers by name@epoch, connected at the first request that names them."""

    def __init__(self, settings: SpeculationSettings, connect: DraftConnect) -> None:
        self._settings = settings
        self._connect = connect
        self._drafters: dict[Peer, RemoteDrafter] = {}

    def open(self, peer: Peer, request: Request) -> None:
        """Tell the draft worker of a new request at once, so that it computes its KV beside the prefill worker."""
        if peer not in self._drafters:
            self._drafters[peer] = RemoteDrafter(peer, self._connect(peer))
        self._drafters[peer].open(request)

    def close_request(self, peer: Peer, request_id: str) -> None:
        if peer in self._drafters:
            self._drafters[peer].close_request(request_id)

    def call(self, committed: Iterable[tuple[Peer, Request, list[int]]], now: float) -> None:
        """One message to each draft worker that has none under way: what is new, what is over, what is wanted."""
        by_peer: dict[Peer, dict[str, tuple[list[int], int]]] = {peer: {} for peer in self._drafters}
        for peer, request, tokens in committed:
            drafter = self._drafters.get(peer)
            left = request.sampling.max_tokens - (len(tokens) - len(request.prompt))
            want = min(self._settings.max_draft_tokens, left - 1)
            if drafter is not None and drafter.knows(request.id) and want > 0:
                by_peer[peer][request.id] = (tokens, want)
        for peer, asks in by_peer.items():
            self._drafters[peer].call(asks, now, self._settings.wait_s)

    def wait_until(self, now: float) -> float | None:
        """Until when the next step should wait for drafts; None: not at all."""
        deadlines = [drafter.wait_until(now) for drafter in self._drafters.values()]
        return max((deadline for deadline in deadlines if deadline is not None), default=None)

    def answered(self, peer: Peer, reply: DraftReply) -> RoundResult:
        drafter = self._drafters.get(peer)
        return drafter.answered(reply) if drafter is not None else RoundResult.STALE

    def lost(self, peer: Peer) -> bool:
        """Forget a draft worker whose stream ended; True if it was known."""
        return self._drafters.pop(peer, None) is not None

    def close(self) -> None:
        for drafter in self._drafters.values():
            drafter.stream.close()
        self._drafters.clear()
