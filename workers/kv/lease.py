"""The leases a verify worker has granted. Only its engine thread touches the table, and only that frees blocks."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from tidemill.core.lifecycle import LEASE_MOVES, LeaseState, Lifecycle
from tidemill.core.messages import Lease


@dataclass(slots=True, eq=False)
class OpenLease:
    """A lease that waits for its blocks. They come in order, from one sender."""

    lease: Lease
    deadline: float  # monotonic seconds
    next_block: int
    lifecycle: Lifecycle[LeaseState]
    sender: str = ""  # the link it is fed by, once something came

    @property
    def filled(self) -> bool:
        return self.next_block >= self.lease.end_block


class LeaseTable:
    """Open leases by number. A lease leaves the table when it is committed, aborted or has expired."""

    def __init__(self) -> None:
        self._open: dict[int, OpenLease] = {}
        self._numbers = itertools.count(1)

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[OpenLease]:
        return iter(list(self._open.values()))

    def next_id(self) -> int:
        """Unique within this incarnation; messages for another one cannot come, links carry the epoch."""
        return next(self._numbers)

    def grant(self, lease: Lease, now: float) -> OpenLease:
        entry = OpenLease(lease, now + lease.ttl_s, lease.first_block, Lifecycle(LeaseState.GRANTED, LEASE_MOVES))
        self._open[lease.id] = entry
        return entry

    def find(self, lease_id: int) -> OpenLease | None:
        return self._open.get(lease_id)

    def of_request(self, request_id: str) -> OpenLease | None:
        return next((entry for entry in self._open.values() if entry.lease.request_id == request_id), None)

    def end(self, entry: OpenLease, state: LeaseState) -> None:
        """Move to a final state; raises IllegalMove if it is in one already."""
        entry.lifecycle.move(state)
        del self._open[entry.lease.id]

    def expired(self, now: float) -> list[OpenLease]:
        return [entry for entry in self._open.values() if entry.deadline <= now]

    def next_deadline(self) -> float | None:
        return min((entry.deadline for entry in self._open.values()), default=None)
