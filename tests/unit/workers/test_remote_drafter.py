"""One draft worker as the verify worker's engine thread sees it: calls out, replies in."""

import pytest

from tests.support.requests import request_of
from tidemill.core.messages import Draft, DraftAsk, DraftCall, DraftReply
from tidemill.core.tree import Shape, TokenTree
from workers.speculation.remote import MAX_UNANSWERED, PATIENCE, RemoteDrafter, RoundResult, Want

SHAPE = Shape(4, 2, 8)


def deadline(remote: RemoteDrafter, now: float) -> float:
    answer = remote.next_answer(now)
    assert answer is not None
    return answer.deadline


class TestRemoteDrafter:
    """Calls out, replies in; nothing else."""

    @pytest.fixture
    def remote(self) -> RemoteDrafter:
        remote = RemoteDrafter(wait_s=1.0)
        remote.open(request_of("a"))
        return remote

    def ask(self, remote: RemoteDrafter, tokens: list[int], now: float = 0.0) -> DraftCall:
        call = remote.next_call([Want("a", tokens, SHAPE, 1)], now)
        assert call is not None
        return call

    def reply(self, call: DraftCall, base: int, tokens: tuple[int, ...] = (7, 8)) -> DraftReply:
        return DraftReply(call.round, (Draft("a", base, TokenTree.chain(tokens)),))

    def test_one_call_says_everything_and_only_what_is_new(self, remote: RemoteDrafter) -> None:
        prompt = list(request_of().prompt)
        first = self.ask(remote, [*prompt, 5])
        assert [each.request.id for each in first.opens] == ["a"]
        assert first.asks == (DraftAsk("a", 20, (5,), SHAPE, 1),)
        remote.answered(self.reply(first, 21), 0.1)
        remote.open(request_of("b"))
        second = self.ask(remote, [*prompt, 5, 7, 9])
        assert [each.request.id for each in second.opens] == ["b"]
        assert second.asks == (DraftAsk("a", 21, (7, 9), SHAPE, 1),)
        remote.close_request("b")
        remote.answered(self.reply(second, 23), 0.1)
        third = remote.next_call((), 0.2)
        assert third is not None
        assert (third.opens, third.asks, third.closes) == ((), (), ("b",))
        assert remote.next_call((), 0.2) is None

    def test_what_was_never_said_need_not_be_closed(self, remote: RemoteDrafter) -> None:
        remote.close_request("a")
        assert remote.next_call((), 0.0) is None

    def test_a_step_waits_until_the_answer_or_the_deadline(self, remote: RemoteDrafter) -> None:
        assert remote.next_answer(0.0) is None
        call = self.ask(remote, [0] * 21)
        assert deadline(remote, 0.5) == 1.0
        results, drafts = remote.answered(self.reply(call, 21), 0.6)
        assert results == [RoundResult.ANSWERED]
        assert drafts[0].tree.tokens == (7, 8)
        assert remote.next_answer(0.6) is None
        assert remote.round_trip_s == 0.6

    def test_a_late_answer_is_still_offered(self, remote: RemoteDrafter) -> None:
        call = self.ask(remote, [0] * 21)
        assert remote.next_answer(1.0) is None
        results, drafts = remote.answered(self.reply(call, 21), 5.0)
        assert results == [RoundResult.LATE]
        assert drafts

    def test_a_worker_that_was_stuck_is_as_near_as_ever(self, remote: RemoteDrafter) -> None:
        for answered_at, round_trip_s in (0.01, 0.01), (5.0, 1.008), (0.03, 0.03), (0.01, 0.026):
            remote.answered(self.reply(self.ask(remote, [0] * 21), 21), answered_at)
            assert remote.round_trip_s == pytest.approx(round_trip_s)

    def test_an_answer_that_came_during_a_long_step_was_in_time(self, remote: RemoteDrafter) -> None:
        """It is read after the step, and somebody may have asked meanwhile whether there is one to wait for."""
        prompt = list(request_of().prompt)
        for length in range(2 * PATIENCE):
            call = self.ask(remote, [*prompt, *range(2, 2 + length)], 10.0 * length)
            assert remote.next_answer(10.0 * length) is not None
            assert remote.next_answer(10.0 * length + 5.0) is None
            results, _ = remote.answered(self.reply(call, 20 + length), 10.0 * length + 0.4)
            assert results == [RoundResult.ANSWERED]
        assert remote.round_trip_s == pytest.approx(0.4)

    def test_a_request_that_comes_after_an_ask_does_not_hide_it(self, remote: RemoteDrafter) -> None:
        self.ask(remote, list(request_of().prompt))
        remote.open(request_of("b"))
        assert remote.next_call((), 0.1) is not None
        assert deadline(remote, 0.2) == 1.0

    def test_asks_do_not_wait_for_each_other(self, remote: RemoteDrafter) -> None:
        """A round trip may take longer than a step."""
        calls = [self.ask(remote, [0] * (21 + n), now=0.1 * n) for n in range(3)]
        assert [call.asks[0].tokens for call in calls] == [(0,), (0,), (0,)]
        assert deadline(remote, 0.2) == pytest.approx(1.2), "the newest counts"
        assert remote.answered(self.reply(calls[1], 22), 0.4)[0] == [RoundResult.ANSWERED] * 2
        assert remote.asked
        assert remote.answered(self.reply(calls[2], 23), 0.5)[0] == [RoundResult.ANSWERED]
        assert not remote.asked

    def test_few_calls_are_under_way_however_slow_the_peer(self, remote: RemoteDrafter) -> None:
        calls = []
        for index in range(50):
            remote.open(request_of(f"r{index}"))
            calls.append(remote.next_call((), 0.0))
        assert sum(call is not None for call in calls) == MAX_UNANSWERED
        remote.answered(DraftReply(1), 0.0)
        rest = remote.next_call((), 0.0)
        assert rest is not None
        assert [each.request.id for each in rest.opens] == [f"r{index}" for index in range(MAX_UNANSWERED, 50)]

    def test_patience_ends_and_comes_back(self, remote: RemoteDrafter) -> None:
        now = 0.0
        for length in range(21, 21 + PATIENCE):
            call = self.ask(remote, [0] * length, now)
            assert deadline(remote, now) == now + 1.0
            assert remote.next_answer(now + 1.0) is None
            remote.answered(self.reply(call, length), now + 2.0)
            now += 3.0
        call = self.ask(remote, [0] * 40, now)
        assert remote.next_answer(now) is None, "it has been late too often to be waited for"
        remote.answered(self.reply(call, 40), now + 0.5)
        self.ask(remote, [0] * 41, now + 1.0)
        assert deadline(remote, now + 1.0) == now + 2.0, "it was in time again"

    def test_drafts_that_come_unasked(self, remote: RemoteDrafter) -> None:
        """What was drafted ahead comes under a round that was answered before."""
        call = self.ask(remote, [0] * 21)
        remote.answered(self.reply(call, 21), 0.1)
        results, drafts = remote.answered(self.reply(call, 21, (7, 8, 9)), 0.2)
        assert results == []
        assert len(drafts) == 1

    def test_drafts_for_requests_that_are_over(self, remote: RemoteDrafter) -> None:
        call = self.ask(remote, [0] * 21)
        remote.close_request("a")
        assert remote.answered(self.reply(call, 21), 0.1) == ([RoundResult.ANSWERED], ())

    def test_a_peer_that_lost_track_is_not_asked_again(self, remote: RemoteDrafter) -> None:
        call = self.ask(remote, [0] * 21)
        remote.answered(DraftReply(call.round, lost=("a",)), 0.1)
        assert not remote.knows("a")
        assert remote.next_call([Want("a", [0] * 22, SHAPE)], 0.2) is None
