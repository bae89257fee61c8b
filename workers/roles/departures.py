"""Requests that leave a verify worker while they decode; a part of its role. Runs on the engine's thread.

Migrate -> each step: export full blocks, so many bytes at a time -> link -> lease on another verify worker
        -> little is left: pause between two steps, export the rest, send it with the latest tokens; Paused
Resume  -> the router calls it off: decodes on here
Cancel  -> it has gone, or ended

The staged copy is Llumnix's (Sun et al., OSDI 2024). Whether it has gone is for the router alone to say: a paused
request stays paused until it does, whatever becomes of the link.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tidemill.core import metrics
from tidemill.core.messages import Migrate, Paused, Stay, Staying
from tidemill.core.metrics import Metrics
from workers.engine.base import Engine
from workers.kv.link import FeederFactory, KvMessage
from workers.kv.transfers import Deliver, Transfer, Transfers
from workers.roles.base import Outbox

STAGE_BYTES = 1 << 20  # exported in one step, for all requests that leave: decoding waits for the copy
LINK_BACKLOG_BYTES = 4 << 20  # with one link: what is sent last must not queue behind much
LAST_BLOCKS = 2  # with fewer than that left, or as many, the request pauses


@dataclass(slots=True, eq=False)
class Departure:
    """One of them."""

    transfer: Transfer
    tokens: list[int]  # the role's own list
    known_tokens: int  # of which the other worker has been told
    paused: bool = False

    @property
    def request_id(self) -> str:
        return self.transfer.request_id

    @property
    def kv_tokens(self) -> int:
        """Those of a request that decodes whose KV is here."""
        return len(self.tokens) - 1


class Departures:
    """See the module. A request's blocks stay its own until the role releases it."""

    def __init__(
        self,
        engine: Engine,
        outbox: Outbox,
        metrics: Metrics,
        feed: FeederFactory,
        deliver: Deliver,
        on_pause: Callable[[str], None],
    ) -> None:
        """`feed` and `deliver`: see Transfers. `on_pause` is called with a request that decodes no further for now."""
        self._engine = engine
        self._outbox = outbox
        self._metrics = metrics
        self._on_pause = on_pause
        self._transfers = Transfers(engine, metrics, feed, deliver, self._on_sent, self._on_failed)
        self._leaving: dict[str, Departure] = {}

    def begin(self, command: Migrate, tokens: list[int], now: float) -> None:
        """`tokens` is the role's own list. The request must not be leaving already."""
        transfer = self._transfers.begin(command.request_id, command.lease, now)
        self._leaving[command.request_id] = Departure(transfer, tokens, command.known_tokens)

    def forget(self, request_id: str) -> bool:
        """It does not leave, or is gone: nothing more is sent. True if it was paused."""
        departure = self._leaving.pop(request_id, None)
        if departure is None:
            return False
        self._transfers.end(departure.transfer)
        return departure.paused

    def after_step(self, preempted: Iterable[str]) -> None:
        """Some steps' tokens have been emitted."""
        for request_id in preempted:
            if request_id in self._leaving:
                self._stay(self._leaving[request_id], Stay.NOT_DECODING)
        left = max(STAGE_BYTES // self._engine.info.kv.block_bytes, 1)
        for departure in list(self._leaving.values()):
            if not departure.paused:
                left -= self._advance(departure, left)

    def _advance(self, departure: Departure, most: int) -> int:
        """Send up to so many full blocks, or all that is left if that is little; returns how many were exported."""
        transfer, size = departure.transfer, self._engine.info.kv.block_size
        full, wanted = departure.kv_tokens // size, -(-departure.kv_tokens // size)
        if wanted > transfer.lease.end_block:
            self._stay(departure, Stay.NO_ROOM)
            return 0
        before = transfer.next_block
        try:
            if self._transfers.feeder(transfer).backlog_bytes < LINK_BACKLOG_BYTES:
                self._transfers.send(transfer, min(full, before + most))
            if self._is_short(transfer, wanted) and self._engine.pause(departure.request_id):
                self._transfers.send(transfer, wanted, tuple(departure.tokens[departure.known_tokens :]))
                departure.paused = True
                self._on_pause(departure.request_id)
                self._outbox.emit(Paused(departure.request_id, transfer.lease.id))
        except ValueError:  # its KV is not all here: it was preempted before it was to leave
            self._stay(departure, Stay.NOT_DECODING)
        return transfer.next_block - before

    def _is_short(self, transfer: Transfer, wanted: int) -> bool:
        """True if nothing would be waited for but the last blocks, of which there is one at least, themselves."""
        sent = transfer.unsent == 0 and self._transfers.feeder(transfer).connected
        return sent and 0 < wanted - transfer.next_block <= LAST_BLOCKS

    def _stay(self, departure: Departure, reason: Stay) -> None:
        self.forget(departure.request_id)
        self._outbox.emit(Staying(departure.request_id, departure.transfer.lease.id, reason))

    def _on_sent(self, transfer: Transfer, message: KvMessage) -> None:
        self._metrics.add(metrics.MIGRATION_BYTES, message.nbytes)

    def _on_failed(self, transfer: Transfer, why: str) -> None:
        """If it is paused the other side may have all of it: what becomes of it is decided there."""
        departure = self._leaving[transfer.request_id]
        if not departure.paused:
            self._stay(departure, Stay.KV_LINK)

    def poll(self, now: float) -> None:
        """Links that nobody uses are closed."""
        self._transfers.poll(now)

    def close(self) -> None:
        self._transfers.close()
