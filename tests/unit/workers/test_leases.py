"""Leases: each ends once, whatever happens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.requests import request_of
from tidemill.core.lifecycle import LEASE_MOVES, LeaseState
from tidemill.core.model import Peer, WorkerId
from workers.engine.base import Reservation
from workers.kv.lease import LeaseTable


class TestLeaseTable:
    HOLDER = Peer(WorkerId("v", 5), "here")

    def test_a_lease_ends_once(self) -> None:
        table = LeaseTable(self.HOLDER)
        for state in LEASE_MOVES[LeaseState.GRANTED]:
            entry = table.grant(request_of(), Reservation(1, 3), 10.0, 100.0)
            assert table.find(entry.lease.id) is table.of_request("r") is entry
            assert table.next_deadline() == 110.0
            table.end(entry, state)
            assert len(table) == 0
            assert table.find(entry.lease.id) is table.of_request("r") is None
            with pytest.raises(RuntimeError):
                table.end(entry, LeaseState.ABORTED)

    def test_numbers_are_of_their_epoch(self) -> None:
        first = LeaseTable(self.HOLDER)
        second = LeaseTable(Peer(WorkerId("v", 6), "here"))
        ids = [
            t.grant(request_of(str(i)), Reservation(0, 1), 1.0, 0.0).lease.id for t in (first, second) for i in range(9)
        ]
        assert len(set(ids)) == 18
        assert (
            max(
                LeaseTable(Peer(WorkerId("v", 1 << 42), "")).grant(request_of(), Reservation(0, 1), 1.0, 0.0).lease.id,
                0,
            )
            < 1 << 63
        )

    def test_expired(self) -> None:
        table = LeaseTable(self.HOLDER)
        entries = [table.grant(request_of(str(i)), Reservation(0, 1), float(i), 0.0) for i in range(1, 4)]
        assert table.expired(2.0) == entries[:2]


LEASE_EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("grant"), st.integers(0, 5)),
        st.tuples(st.just("blocks"), st.integers(0, 5)),
        st.tuples(st.sampled_from(sorted(LEASE_MOVES[LeaseState.GRANTED])), st.integers(0, 5)),
        st.tuples(st.just("time"), st.integers(1, 8)),
    ),
    max_size=60,
)


@given(LEASE_EVENTS)
def test_whatever_happens_to_leases_each_block_has_one_owner_and_each_lease_one_end(
    events: list[tuple[str, int]],
) -> None:
    """Against a plain picture of what is open: request -> its lease's (number, deadline, blocks that came)."""
    table, now, size = LeaseTable(TestLeaseTable.HOLDER), 0.0, 4
    model: dict[str, tuple[int, float, int]] = {}
    numbers: set[int] = set()
    for what, which in events:
        request, entry = request_of(str(which)), table.of_request(str(which))
        match what:
            case "grant" if entry is None:
                lease = table.grant(request, Reservation(0, size), 10.0, now).lease
                assert lease.id not in numbers, "a number is used once"
                numbers.add(lease.id)
                model[request.id] = (lease.id, now + 10.0, 0)
            case "blocks" if entry is not None and not entry.filled:
                entry.take(1, 0, 2, 2)
                number, deadline, came = model[request.id]
                model[request.id] = (number, deadline, came + 1)
            case "time":
                now += which
                for late in table.expired(now):
                    table.end(late, LeaseState.EXPIRED)
                    assert model.pop(late.lease.request_id)[1] <= now
            case LeaseState() as end if entry is not None:
                table.end(entry, end)
                with pytest.raises(RuntimeError):
                    table.end(entry, LeaseState.ABORTED)
                del model[request.id]
        found = {each.lease.request_id: (each.lease.id, each.deadline, each.next_block) for each in table}
        assert found == model
        assert all(each.filled == (each.next_block == size) for each in table)
        assert table.next_deadline() == min((deadline for _, deadline, _ in model.values()), default=None)
