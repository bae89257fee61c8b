"""The leases a verify worker has granted. Only its engine thread touches the table, and only that frees blocks."""

from collections.abc import Iterator
from dataclasses import dataclass

from tidemill.core.lifecycle import LEASE_MOVES, LeaseState, Lifecycle
from tidemill.core.messages import Lease
from tidemill.core.model import Peer, Request
from workers.engine.base import Reservation

LEASES_PER_EPOCH = 1 << 20


@dataclass(slots=True, eq=False)
class OpenLease:
    """A lease that waits for its blocks. They come in order, over one link; the layers of some blocks too."""

    lease: Lease
    deadline: float  # monotonic seconds
    next_block: int
    lifecycle: Lifecycle[LeaseState]
    moving: bool  # the request decodes elsewhere; which block is the last is said when it comes
    link: str = ""  # what feeds it, once something came
    next_layer: int = 0  # of the blocks from `next_block` on

    def take(self, blocks: int, first_layer: int, layers: int, of_layers: int) -> None:
        """So many blocks came, or layers of them."""
        self.next_layer = first_layer + layers
        if self.next_layer == of_layers:
            self.next_layer = 0
            self.next_block += blocks

    @property
    def filled(self) -> bool:
        return not self.moving and self.next_block >= self.lease.end_block


class LeaseTable:
    """Open leases by number. A lease leaves the table when it is committed, aborted or has expired."""

    def __init__(self, holder: Peer) -> None:
        self._holder = holder
        self._open: dict[int, OpenLease] = {}
        self._by_request: dict[str, OpenLease] = {}
        # Later epochs start above everything this one numbers, so KV for a lease of an earlier role finds none.
        self._next_id = holder.id.epoch * LEASES_PER_EPOCH & (1 << 62) - 1

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[OpenLease]:
        return iter(list(self._open.values()))

    def grant(
        self, request: Request, blocks: Reservation, ttl_s: float, now: float, *, moving: bool = False
    ) -> OpenLease:
        """Enter a lease on blocks the engine has reserved; if it is moving, how many are needed is not known yet."""
        self._next_id += 1
        lease = Lease(self._next_id, request.id, self._holder, blocks.first_block, blocks.end_block, ttl_s)
        lifecycle = Lifecycle(LeaseState.GRANTED, LEASE_MOVES)
        entry = OpenLease(lease, now + ttl_s, blocks.first_block, lifecycle, moving)
        self._open[lease.id] = self._by_request[request.id] = entry
        return entry

    def find(self, lease_id: int) -> OpenLease | None:
        return self._open.get(lease_id)

    def of_request(self, request_id: str) -> OpenLease | None:
        return self._by_request.get(request_id)

    def end(self, entry: OpenLease, state: LeaseState) -> None:
        """Move to a final state; raises IllegalMove if it is in one already."""
        entry.lifecycle.move(state)
        del self._open[entry.lease.id], self._by_request[entry.lease.request_id]

    def expired(self, now: float) -> list[OpenLease]:
        return [entry for entry in self._open.values() if entry.deadline <= now]

    def next_deadline(self) -> float | None:
        return min((entry.deadline for entry in self._open.values()), default=None)
