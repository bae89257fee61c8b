"""The draft role inside its loop: chains for what verify workers ask, and nothing left behind."""

import pytest

from tests.support.benches import Bench
from tests.support.engines import SMALL, VOCABULARY, one_by_one
from tests.support.workers import settings_of
from tidemill.core.messages import (
    Cancel,
    Draft,
    DraftAsk,
    DraftCall,
    DraftOpen,
    DraftReply,
    Failure,
    Refusal,
    Refused,
    Submit,
)
from tidemill.core.model import Request, Role
from tidemill.types import SamplingParams
from workers.engine.emulated import EmulatedEngine


def request_of(name: str = "r", tokens: int = 20, max_tokens: int = 24) -> Request:
    prompt = tuple(2 + i * 7 % (VOCABULARY - 2) for i in range(tokens))
    return Request(name, prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=1))


def plain(request: Request) -> tuple[int, ...]:
    return one_by_one(EmulatedEngine(SMALL, VOCABULARY), [request])[request.id]


class TestDraftRole:
    @pytest.fixture
    def bench(self) -> Bench:
        return Bench(Role.DRAFT)

    @pytest.fixture
    def replies(self) -> list[DraftReply]:
        return []

    def call(
        self,
        bench: Bench,
        replies: list[DraftReply],
        number: int,
        opens: tuple[Request, ...] = (),
        asks: tuple[DraftAsk, ...] = (),
        closes: tuple[str, ...] = (),
        stream: int = 1,
    ) -> None:
        call = DraftCall(number, tuple(DraftOpen(each) for each in opens), asks, closes)
        bench.draft.on_call(stream, call, replies.append)

    def test_a_chain_of_what_the_target_would_say(self, bench: Bench, replies: list[DraftReply]) -> None:
        request = request_of()
        expected = plain(request)
        self.call(bench, replies, 1, opens=(request,))
        assert replies == [DraftReply(1)], "every call is answered, this one at once"
        bench.drain()
        self.call(bench, replies, 2, asks=(DraftAsk("r", 20, expected[:1], 4),))
        assert len(replies) == 1
        bench.drain()
        assert replies[1] == DraftReply(2, (Draft("r", 21, expected[1:5], (-1, 0, 1, 2)),))
        # Three of four were right, the fourth was not: it goes on from what was committed.
        self.call(bench, replies, 3, asks=(DraftAsk("r", 21, (*expected[1:4], 5), 3),))
        bench.drain()
        assert replies[2].drafts[0].base == 25
        assert len(replies[2].drafts[0].tokens) == 3
        self.call(bench, replies, 4, closes=("r",))
        bench.assert_empty()

    def test_asking_while_the_prompt_is_being_computed(self, replies: list[DraftReply]) -> None:
        bench = Bench(Role.DRAFT, settings_of(SMALL.model_copy(update={"max_batch_tokens": 8})))
        request = request_of(tokens=60)
        self.call(bench, replies, 1, opens=(request,))
        bench.turn()
        self.call(bench, replies, 2, asks=(DraftAsk("r", 60, plain(request)[:1], 2),))
        bench.drain()
        assert replies[1].drafts[0].tokens == plain(request)[1:3]

    @pytest.mark.parametrize(
        "ask",
        [DraftAsk("other", 20, (5,), 4), DraftAsk("r", 22, (5,), 4), DraftAsk("r", 20, (VOCABULARY,), 4)],
        ids=["unknown", "a gap", "outside the vocabulary"],
    )
    def test_what_cannot_be_answered_gets_an_empty_draft(
        self, bench: Bench, replies: list[DraftReply], ask: DraftAsk
    ) -> None:
        self.call(bench, replies, 1, opens=(request_of(),))
        self.call(bench, replies, 2, asks=(ask,))
        bench.drain()
        assert replies[1].drafts == (Draft(ask.request_id, ask.base + 1, (), ()),)

    def test_a_prompt_outside_the_drafts_vocabulary_is_not_opened(
        self, bench: Bench, replies: list[DraftReply]
    ) -> None:
        self.call(bench, replies, 1, opens=(Request("r", (VOCABULARY, 1), SamplingParams(seed=1)),))
        bench.assert_empty()

    def test_asks_of_several_workers_share_steps(self, bench: Bench, replies: list[DraftReply]) -> None:
        requests = {stream: request_of("same", tokens=20 + stream) for stream in (1, 2, 3)}
        for stream, request in requests.items():
            self.call(bench, replies, 1, opens=(request,), stream=stream)
        bench.drain()
        steps = bench.engine.load().steps
        for stream, request in requests.items():
            ask = DraftAsk("same", 20 + stream, plain(request)[:1], 4)
            self.call(bench, replies, 2, asks=(ask,), stream=stream)
        bench.drain()
        assert bench.engine.load().steps - steps == 4
        drafted = {reply.drafts[0].base: reply.drafts[0].tokens for reply in replies if reply.drafts}
        assert drafted == {21 + stream: plain(request)[1:5] for stream, request in requests.items()}

    def test_the_end_of_a_stream_releases_its_requests_only(self, bench: Bench, replies: list[DraftReply]) -> None:
        for stream in (1, 2):
            self.call(bench, replies, 1, opens=(request_of("a"), request_of("b")), stream=stream)
        bench.drain()
        self.call(bench, replies, 2, asks=(DraftAsk("a", 20, (5,), 4),), stream=1)
        bench.draft.stream_closed(1)
        bench.drain()
        assert not any(reply.drafts for reply in replies)
        assert bench.engine.load().kv_blocks_used > 0
        bench.draft.stream_closed(2)
        bench.assert_empty()

    def test_the_least_recently_asked_is_forgotten_first(self, replies: list[DraftReply]) -> None:
        bench = Bench(Role.DRAFT, settings_of(SMALL.model_copy(update={"max_waiting": 2})))
        self.call(bench, replies, 1, opens=(request_of("a"), request_of("b")))
        self.call(bench, replies, 2, asks=(DraftAsk("a", 20, (5,), 1),))
        bench.drain()
        self.call(bench, replies, 3, opens=(request_of("c"),))
        self.call(bench, replies, 4, asks=tuple(DraftAsk(n, 21 if n == "a" else 20, (5,), 1) for n in "abc"))
        bench.drain()
        assert [len(draft.tokens) for draft in replies[-1].drafts] == [1, 0, 1]

    def test_closing_what_is_being_drafted_answers_the_rest(self, bench: Bench, replies: list[DraftReply]) -> None:
        self.call(bench, replies, 1, opens=(request_of("a"), request_of("b", tokens=21)))
        self.call(bench, replies, 2, asks=(DraftAsk("a", 20, (5,), 4), DraftAsk("b", 21, (5,), 2)))
        self.call(bench, replies, 3, closes=("a",))
        bench.drain()
        by_round = {reply.round: reply for reply in replies}
        assert [len(draft.tokens) for draft in by_round[2].drafts] == [0, 2]

    def test_a_step_that_raises_answers_with_empty_drafts(
        self, bench: Bench, replies: list[DraftReply], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.call(bench, replies, 1, opens=(request_of(),))
        self.call(bench, replies, 2, asks=(DraftAsk("r", 20, (5,), 4),))
        with monkeypatch.context() as patch:
            patch.setattr(bench.engine, "step", lambda: 1 / 0)
            bench.turn()
        assert replies[1] == DraftReply(2, (Draft("r", 21, (), ()),))
        bench.turn(advance_s=2.0)
        bench.assert_empty()

    def test_it_takes_no_requests_of_routers(self, bench: Bench) -> None:
        bench.send(Submit(request_of()))
        bench.send(Cancel("r"))
        bench.turn()
        assert bench.events("r") == [Refused("r", Refusal.WRONG_ROLE)]
        bench.loop.role.give_up(Failure.STOPPING, "")
        bench.assert_empty()
