"""One draft worker as the verify worker's engine thread sees it: calls out, replies in."""

import pytest

from tests.support.engines import VOCABULARY
from tidemill.core.messages import Draft, DraftAsk, DraftCall, DraftReply
from tidemill.core.model import Request
from tidemill.types import SamplingParams
from workers.speculation.remote import MAX_UNANSWERED, PATIENCE, RemoteDrafter, RoundResult, Want


def request_of(name: str = "r", tokens: int = 20, max_tokens: int = 24) -> Request:
    prompt = tuple(2 + i * 7 % (VOCABULARY - 2) for i in range(tokens))
    return Request(name, prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=1))


class TestRemoteDrafter:
    """Calls out, replies in; nothing else."""

    @pytest.fixture
    def remote(self) -> RemoteDrafter:
        remote = RemoteDrafter(wait_s=1.0)
        remote.open(request_of("a"))
        return remote

    def ask(self, remote: RemoteDrafter, tokens: list[int], now: float = 0.0) -> DraftCall:
        call = remote.next_call([Want("a", tokens, 4)], now)
        assert call is not None
        return call

    def reply(self, call: DraftCall, base: int, tokens: tuple[int, ...] = (7, 8)) -> DraftReply:
        return DraftReply(call.round, (Draft("a", base, tokens, tuple(range(-1, len(tokens) - 1))),))

    def test_one_call_says_everything_and_only_what_is_new(self, remote: RemoteDrafter) -> None:
        prompt = list(request_of().prompt)
        first = self.ask(remote, [*prompt, 5])
        assert [each.request.id for each in first.opens] == ["a"]
        assert first.asks == (DraftAsk("a", 20, (5,), 4),)
        remote.answered(self.reply(first, 21), 0.1)
        remote.open(request_of("b"))
        second = self.ask(remote, [*prompt, 5, 7, 9])
        assert [each.request.id for each in second.opens] == ["b"]
        assert second.asks == (DraftAsk("a", 21, (7, 9), 4),)
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
        assert remote.wait_until(0.0) is None
        call = self.ask(remote, [0] * 21)
        assert remote.wait_until(0.5) == 1.0
        result, drafts = remote.answered(self.reply(call, 21), 0.6)
        assert result is RoundResult.USED
        assert drafts[0].tokens == (7, 8)
        assert remote.wait_until(0.6) is None

    def test_a_late_answer_is_still_offered(self, remote: RemoteDrafter) -> None:
        call = self.ask(remote, [0] * 21)
        assert remote.wait_until(1.0) is None
        result, drafts = remote.answered(self.reply(call, 21), 5.0)
        assert result is RoundResult.LATE
        assert drafts

    def test_no_second_ask_before_the_answer(self, remote: RemoteDrafter) -> None:
        self.ask(remote, [0] * 21)
        assert remote.next_call([Want("a", [0] * 22, 4)], 0.1) is None

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
            assert remote.wait_until(now) == now + 1.0
            assert remote.wait_until(now + 1.0) is None
            remote.answered(self.reply(call, length), now + 2.0)
            now += 3.0
        call = self.ask(remote, [0] * 40, now)
        assert remote.wait_until(now) is None, "it has been late too often to be waited for"
        remote.answered(self.reply(call, 40), now + 0.5)
        self.ask(remote, [0] * 41, now + 1.0)
        assert remote.wait_until(now + 1.0) == now + 2.0, "it was in time again"

    def test_answers_nobody_asked_for(self, remote: RemoteDrafter) -> None:
        call = self.ask(remote, [0] * 21)
        assert remote.answered(self.reply(DraftCall(99), 21), 0.1) == (RoundResult.STALE, ())
        remote.answered(self.reply(call, 21), 0.1)
        assert remote.answered(self.reply(call, 21), 0.1) == (RoundResult.STALE, ())
        assert remote.answered(DraftReply(5), 0.1) == (None, ())

    def test_drafts_that_are_not_what_was_asked(self, remote: RemoteDrafter) -> None:
        call = self.ask(remote, [0] * 21)
        reply = DraftReply(
            call.round,
            (
                Draft("a", 20, (1,), (-1,)),
                Draft("other", 21, (1,), (-1,)),
                Draft("a", 21, (1,) * 9, tuple(range(-1, 8))),
            ),
        )
        _, drafts = remote.answered(reply, 0.1)
        assert [(draft.request_id, draft.base, draft.tokens) for draft in drafts] == [("a", 21, (1,) * 4)]

    def test_a_peer_that_lost_track_is_not_asked_again(self, remote: RemoteDrafter) -> None:
        call = self.ask(remote, [0] * 21)
        remote.answered(self.reply(call, 21, ()), 0.1)
        assert not remote.knows("a")
        closing = remote.next_call([Want("a", [0] * 22, 4)], 0.2)
        assert closing is not None
        assert (closing.asks, closing.closes) == ((), ("a",))
