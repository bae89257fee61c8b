"""Moves of a decoding request that do not come about, or whose request ends on the way."""

import pytest

from tests.support.benches import break_link, carry_kv
from tests.support.couple import Couple, request_of, small_stages
from tests.support.engines import SMALL
from tests.support.requests import plain
from tidemill.core import metrics
from tidemill.core.messages import (
    Cancel,
    Failed,
    Failure,
    LeaseGranted,
    Migrate,
    Refusal,
    Refused,
    Reserve,
    Stay,
    Staying,
    Submit,
)
from tidemill.core.model import Request


@pytest.fixture
def couple() -> Couple:
    return Couple()


class TestNotMoved:
    def test_the_target_has_no_room(self) -> None:
        couple = Couple(SMALL.model_copy(update={"kv_blocks": 12}))
        couple.target.send(Reserve(request_of("other", 120), 10.0))
        couple.reserve()
        assert couple.target.last(couple.NEW) == Refused(couple.NEW, Refusal.NO_BLOCKS)
        couple.target.send(Cancel("other"))
        couple.stays()

    def test_its_prompt_is_still_being_computed(self, couple: Couple) -> None:
        bench = couple.source
        bench.send(Submit(Request("long", tuple(range(3, 90)) * 3, couple.request.sampling)))
        bench.turn()
        couple.reserve()
        bench.send(Migrate("long", couple.target.granted(couple.NEW).lease, 261))
        bench.turn()
        assert isinstance(bench.last("long"), Staying)
        bench.send(Cancel("long"))
        couple.stays()

    def test_it_is_preempted(self) -> None:
        elder = Request("elder", tuple(range(3, 90)), request_of().sampling)
        couple = Couple(SMALL.model_copy(update={"kv_blocks": 16}), elder=elder)
        couple.begin(headroom=60)
        next(iter(couple.source.feeders.values())).connected = False
        while not couple.source.metrics.value(metrics.PREEMPTIONS, role="verify"):
            couple.source.turn()
        assert couple.source.last("r") == Staying("r", couple.lease.id, Stay.NOT_DECODING)
        couple.stays()

    def test_it_outgrows_its_lease(self, couple: Couple) -> None:
        couple.begin(headroom=10)
        next(iter(couple.source.feeders.values())).connected = False
        couple.source.turn(30)
        assert Staying("r", couple.lease.id, Stay.NO_ROOM) in couple.source.events("r")
        couple.stays()

    def test_it_finishes_first(self) -> None:
        couple = Couple(request=request_of(max_tokens=8))
        couple.begin()
        couple.source.drain()
        assert couple.source.tokens("r") == plain(couple.request)
        assert not couple.paused
        couple.source.send(Migrate("r", couple.lease, 100))
        couple.stays()

    @pytest.mark.parametrize("carried", [0, 1, 3])
    def test_the_link_breaks_on_the_way(self, couple: Couple, monkeypatch: pytest.MonkeyPatch, carried: int) -> None:
        small_stages(monkeypatch)
        couple.begin()
        for _ in range(carried):
            couple.source.turn()
            carry_kv(couple.source, couple.target, 1)
        couple.source.turn()
        break_link(couple.source, couple.target)
        couple.source.turn()
        couple.target.turn()
        assert Staying("r", couple.lease.id, Stay.KV_LINK) in couple.source.events("r")
        last = couple.target.last(couple.NEW)
        if carried:
            assert isinstance(last, Failed)
            assert last.failure is Failure.KV_LINK
        else:
            assert isinstance(last, LeaseGranted), "nothing has come over that link, so it knows of none"
        couple.stays()

    def test_the_link_breaks_with_the_last_blocks(self, couple: Couple) -> None:
        """Only the router may say that it decodes on: the target could have had them."""
        couple.begin()
        couple.until_paused()
        break_link(couple.source, couple.target)
        paused_at = couple.source.tokens("r")
        couple.source.turn(3)
        assert couple.source.tokens("r") == paused_at
        couple.target.turn()
        last = couple.target.last(couple.NEW)
        assert isinstance(last, Failed)
        assert last.failure is Failure.KV_LINK
        couple.stays()

    def test_the_last_blocks_get_lost_and_the_lease_expires(self, couple: Couple) -> None:
        couple.begin()
        couple.until_paused()
        next(iter(couple.source.feeders.values())).waiting.clear()
        couple.target.turn(advance_s=10.1)
        last = couple.target.last(couple.NEW)
        assert isinstance(last, Failed)
        assert last.failure is Failure.LEASE_EXPIRED
        couple.stays()

    def test_the_target_drains_before_anything_came(self, couple: Couple) -> None:
        couple.begin()
        couple.target.verify.drain()
        couple.target.turn()
        assert couple.target.last(couple.NEW) == Refused(couple.NEW, Refusal.DRAINING)
        couple.stays()

    def test_tokens_that_do_not_fit_fail_it_there(self, couple: Couple) -> None:
        """The source takes the target to know fewer than it does."""
        couple.reserve(headroom=10)
        couple.known -= 40
        couple.migrate()
        couple.until_paused()
        couple.fill()
        last = couple.target.last(couple.NEW)
        assert isinstance(last, Failed)
        assert last.failure is Failure.ENGINE
        couple.stays()


STAGES = ["reserved", "copying", "paused", "filled", "moved"]


def bring_to(couple: Couple, stage: str) -> None:
    steps = {
        "reserved": couple.reserve,
        "copying": lambda: (couple.migrate(), couple.source.turn(2)),
        "paused": couple.until_paused,
        "filled": lambda: carry_kv(couple.source, couple.target),
        "moved": couple.target.turn,
    }
    for name, step in steps.items():
        step()  # type: ignore[operator]
        if name == stage:
            return


@pytest.mark.parametrize("stage", STAGES)
class TestEndsAtAnyStage:
    def test_cancelled(self, stage: str) -> None:
        couple = Couple()
        bring_to(couple, stage)
        couple.source.send(Cancel("r"))
        couple.target.send(Cancel(couple.NEW))
        couple.assert_empty()
        carry_kv(couple.source, couple.target)
        couple.assert_empty()

    def test_called_off(self, stage: str) -> None:
        """The router stops waiting for the target."""
        couple = Couple()
        bring_to(couple, stage)
        couple.stays()

    def test_the_router_leaves(self, stage: str) -> None:
        couple = Couple()
        bring_to(couple, stage)
        for bench in (couple.source, couple.target):
            bench.mailbox.deliver(lambda bench=bench: bench.loop.detach(1))  # type: ignore[misc]
        couple.assert_empty()

    def test_the_source_gives_up(self, stage: str) -> None:
        """Whatever it held is released; the target has all of it, or fails by its link."""
        couple = Couple()
        bring_to(couple, stage)
        couple.source.verify.give_up(Failure.ENGINE, "test")
        break_link(couple.source, couple.target)
        couple.source.assert_empty()
        couple.target.send(Cancel(couple.NEW))
        couple.assert_empty()
