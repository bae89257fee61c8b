"""Requests whose KV a role sends to leases of other workers, and the links to those. Runs on the engine's thread."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from tidemill.core import metrics
from tidemill.core.messages import Lease
from tidemill.core.metrics import Metrics
from tidemill.core.model import Peer, WorkerId
from workers.engine.base import Engine
from workers.kv.link import Feeder, FeederFactory, KvMessage

MAX_MESSAGE_BYTES = 4 << 20  # of one message; stays in the cache between the socket and the pool
LINK_IDLE_S = 300.0  # a link nobody used for so long is closed; half of what its receiver bears with

Deliver = Callable[[Callable[[], None]], None]


@dataclass(slots=True, eq=False)
class Transfer:
    """KV on its way to a lease. `next_block` is the first block not yet handed to the link."""

    request_id: str
    lease: Lease
    next_block: int
    unsent: int = 0  # messages with the link


@dataclass(slots=True, eq=False)
class _Link:
    """The way to one worker."""

    feeder: Feeder
    used_at: float


class Transfers:
    """See the module. Exported copies belong to the links; the blocks stay the engine's."""

    def __init__(
        self,
        engine: Engine,
        metrics: Metrics,
        feed: FeederFactory,
        deliver: Deliver,
        sent: Callable[[Transfer, KvMessage], None],
        failed: Callable[[Transfer, str], None],
    ) -> None:
        """`feed` makes the way to a peer; `deliver` brings a call from its thread to the engine's.

        `sent` is called for each message; `failed` at most once for a transfer, which has ended then.
        """
        self._engine = engine
        self._metrics = metrics
        self._feed = feed
        self._deliver = deliver
        self._sent = sent
        self._failed = failed
        self._transfers: dict[str, Transfer] = {}
        self._links: dict[WorkerId, _Link] = {}

    def begin(self, request_id: str, lease: Lease, now: float) -> Transfer:
        """The link is opened while the first blocks are computed."""
        transfer = self._transfers[request_id] = Transfer(request_id, lease, lease.first_block)
        self._link_to(lease.holder, now).feeder.prepare()
        return transfer

    def send(self, transfer: Transfer, end_block: int, output: tuple[int, ...] | None = None) -> None:
        """Hand blocks [next_block, end_block) to the link, in messages of a bounded size; `output` with the last."""
        feeder = self.feeder(transfer)
        at_once = max(MAX_MESSAGE_BYTES // self._engine.info.kv.block_bytes, 1)
        while transfer.next_block < end_block:
            until = min(transfer.next_block + at_once, end_block)
            kv = self._engine.export_kv(transfer.request_id, transfer.next_block, until)
            last = output if until == end_block else None
            feeder.put(KvMessage(transfer.lease.id, transfer.request_id, transfer.next_block, kv, output=last))
            transfer.next_block = until
            transfer.unsent += 1

    def send_layer(self, transfer: Transfer, layer: int, kv: Tensor) -> None:
        """Hand one layer of the next blocks to the link. With the last layer they are sent."""
        feeder = self.feeder(transfer)
        feeder.put(KvMessage(transfer.lease.id, transfer.request_id, transfer.next_block, kv, layer))
        transfer.unsent += 1
        if layer == self._engine.info.kv.layers - 1:
            transfer.next_block += kv.shape[1]

    def end(self, transfer: Transfer) -> None:
        """What the link has not begun to send is dropped."""
        if self._transfers.get(transfer.request_id) is transfer:
            del self._transfers[transfer.request_id]
            self.feeder(transfer).drop(transfer.lease.id)

    def feeder(self, transfer: Transfer) -> Feeder:
        """The link of a transfer that has not ended."""
        return self._links[transfer.lease.holder.id].feeder

    @property
    def backlog_bytes(self) -> int:
        """Exported and not yet sent, to all peers."""
        return sum(link.feeder.backlog_bytes for link in self._links.values())

    def poll(self, now: float) -> None:
        """Close links that nobody uses."""
        busy = {each.lease.holder.id for each in self._transfers.values()}
        for holder, link in list(self._links.items()):
            if holder in busy:
                link.used_at = now
            elif now - link.used_at > LINK_IDLE_S:
                self._links.pop(holder).feeder.close()

    def close(self) -> None:
        for link in self._links.values():
            link.feeder.close()
        self._links.clear()
        self._transfers.clear()

    # --- links --------------------------------------------------------------------------------------------------

    def _link_to(self, holder: Peer, now: float) -> _Link:
        if holder.id not in self._links:
            for old in [each for each in self._links if each.name == holder.id.name]:
                self._leave(old, f"{holder.id} has taken its place")
            self._links[holder.id] = _Link(
                self._feed(
                    holder,
                    lambda message, seconds: self._deliver(lambda: self._on_sent(message, seconds)),
                    lambda message, why: self._deliver(lambda: self._on_failed(message, why)),
                ),
                now,
            )
        return self._links[holder.id]

    def _leave(self, holder: WorkerId, why: str) -> None:
        for transfer in [each for each in self._transfers.values() if each.lease.holder.id == holder]:
            self._fail(transfer, f"{holder} is gone: {why}")
        self._links.pop(holder).feeder.close()

    def _transfer_of(self, message: KvMessage) -> Transfer | None:
        """None if it has ended, or has come back under another lease."""
        transfer = self._transfers.get(message.request_id)
        return transfer if transfer is not None and transfer.lease.id == message.lease_id else None

    def _on_sent(self, message: KvMessage, seconds: float) -> None:
        self._metrics.add(metrics.TRANSFER_BYTES, message.nbytes, direction="sent")
        self._metrics.observe(metrics.TRANSFER_TIME, seconds, direction="sent")
        transfer = self._transfer_of(message)
        if transfer is not None:
            transfer.unsent -= 1
            self._sent(transfer, message)

    def _on_failed(self, message: KvMessage, why: str) -> None:
        transfer = self._transfer_of(message)
        if transfer is not None:
            self._fail(transfer, why)

    def _fail(self, transfer: Transfer, why: str) -> None:
        self.end(transfer)
        self._failed(transfer, why)
