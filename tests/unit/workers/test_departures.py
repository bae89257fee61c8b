"""A decoding request moves from one verify worker to another; a router's part, and the link's, are played by hand."""

from dataclasses import replace

import pytest

from tests.support.benches import carry_kv
from tests.support.couple import BLOCK_BYTES, DRAFTER, Couple, request_of, small_stages
from tests.support.requests import plain
from tidemill.core import metrics
from tidemill.core.messages import Cancel, Migrate, Paused, Reserve, Resume, Submit, Tokens
from workers.roles.departures import LAST_BLOCKS
from workers.speculation import remote


@pytest.fixture
def couple() -> Couple:
    return Couple()


def test_it_decodes_while_it_is_copied_and_goes_on_elsewhere(couple: Couple, monkeypatch: pytest.MonkeyPatch) -> None:
    small_stages(monkeypatch)
    couple.begin()
    before = len(couple.source.tokens("r"))
    couple.until_paused()
    assert len(couple.source.tokens("r")) >= before + 6, "six full blocks, one a step"
    assert not couple.source.loop.engine.has_work()
    paused_at = couple.source.tokens("r")
    couple.source.turn(3)
    assert couple.source.tokens("r") == paused_at
    couple.target.drain()
    assert not couple.target.tokens(couple.NEW), "the last blocks are still on their way"
    couple.fill()
    couple.arrived()
    assert couple.source.engine.load().kv_blocks_used == 0
    couple.target.drain()
    assert couple.tokens == plain(couple.request)
    couple.assert_empty()
    assert couple.target.metrics.value(metrics.LEASES, end="committed") == 1
    assert couple.source.metrics.value(metrics.MIGRATION_BYTES) == 7 * BLOCK_BYTES


def test_the_last_stage_is_short_and_nothing_is_computed_twice(couple: Couple) -> None:
    couple.begin()
    couple.until_paused()
    (feeder,) = couple.source.feeders.values()
    assert sum(each.kv.shape[1] for each in feeder.waiting) <= LAST_BLOCKS
    events = couple.source.events("r")
    assert isinstance(events[-2], Tokens), "the pause is said with the last tokens"
    sent = {report.events[-2:] for _, report in couple.source.sent if events[-1] in report.events}
    assert sent == {(events[-2], events[-1])}
    couple.fill()
    assert len(couple.target.tokens(couple.NEW)) == 1
    rows = couple.target.metrics.registry.get_sample_value("tidemill_worker_step_tokens_sum", {"role": "verify"})
    assert rows == 1


def test_room_that_was_not_needed_is_given_back(couple: Couple) -> None:
    couple.begin(headroom=50)
    assert couple.target.engine.load().kv_blocks_leased == -(-(104 + 50) // 16)
    couple.until_paused()
    couple.fill()
    assert couple.target.engine.load().kv_blocks_used == -(-len(request_of().prompt + couple.tokens) // 16)
    couple.arrived()
    couple.target.send(Cancel(couple.NEW))
    couple.assert_empty()


def test_room_is_never_asked_beyond_what_the_request_can_have(couple: Couple) -> None:
    couple.reserve(headroom=10_000)
    assert couple.target.granted(couple.NEW).lease.end_block == -(-(100 + 60 - 1) // 16)


def test_what_the_target_has_is_not_sent(couple: Couple) -> None:
    couple.target.send(Submit(replace(couple.request, id="same")))
    couple.target.turn(3)
    couple.target.send(Cancel("same"))
    couple.begin()
    assert couple.lease.first_block == 6
    couple.until_paused()
    couple.fill()
    couple.arrived()
    couple.target.drain()
    assert couple.tokens == plain(couple.request)
    assert couple.source.metrics.value(metrics.MIGRATION_BYTES) == BLOCK_BYTES


def test_back_and_forth(couple: Couple) -> None:
    """Each time under a new name; what is left in the prefix cache need not travel again."""
    benches, names, name = [couple.source, couple.target], ["r"], "r"
    got = couple.source.tokens("r")
    for index in range(1, 7):
        source, target = benches[(index - 1) % 2], benches[index % 2]
        new = f"r#{index}"
        target.send(Reserve(replace(couple.request, id=new, output=got), 10.0, None, 40))
        target.turn()
        lease = target.granted(new).lease
        source.send(Migrate(name, lease, len(couple.request.prompt + got)))
        before = len(source.tokens(name))
        while Paused(name, lease.id) not in source.events(name):
            source.turn()
            carry_kv(source, target)
        carry_kv(source, target)
        since = source.tokens(name)[before:]
        target.turn()
        source.send(Cancel(name))
        source.turn()
        got += since + target.tokens(new)
        name = new
        names.append(new)
    benches[0].drain()
    everything = benches[0].tokens(name)
    assert got[:-1] + everything == plain(couple.request)
    couple.assert_empty()


def test_drafts_move_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The target's draft worker begins meanwhile; the source's forgets it, and hears of it again if it stays."""
    monkeypatch.setattr(remote, "MAX_UNANSWERED", 1000)
    couple = Couple(drafter=DRAFTER)
    couple.begin()
    couple.until_paused()
    couple.source.turn()
    couple.target.turn()
    assert [each.request.id for call in couple.target.streams[-1].calls for each in call.opens] == [couple.NEW]
    said = couple.source.streams[-1].calls
    assert [name for call in said for name in call.closes] == ["r"]
    said.clear()
    couple.source.send(Resume("r"))
    couple.source.turn()
    (reopened,) = [each.request for call in said for each in call.opens]
    assert reopened.output == couple.source.tokens("r")[: len(reopened.output)]
    assert len(reopened.output) >= 5


def test_a_newer_lease_replaces_an_older_one(couple: Couple) -> None:
    couple.begin()
    couple.until_paused()
    couple.target.send(Cancel(couple.NEW))
    couple.target.turn()
    couple.NEW = "r/again"  # type: ignore[misc]
    couple.begin()
    couple.until_paused()
    couple.fill()
    couple.arrived()
    couple.target.drain()
    assert couple.tokens == plain(couple.request)
    couple.assert_empty()
