"""Drafts: the draft role, the verify worker's side of the stream, and that neither ever changes a token."""

from collections.abc import Callable

import pytest
from torch import Tensor

from tests.support.benches import Bench, Trio
from tests.support.engines import SMALL, VOCABULARY, one_by_one
from tests.support.workers import settings_of
from tidemill.core import metrics
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
    Tokens,
)
from tidemill.core.model import Peer, Request, Role, WorkerId
from tidemill.core.settings import Settings, SpeculationSettings
from tidemill.types import SamplingParams
from workers.engine.base import Engine
from workers.engine.emulated import EmulatedEngine, HashModel
from workers.engine.native.batch import StepBatch
from workers.engine.native.engine import NativeEngine
from workers.speculation import pool
from workers.speculation.remote import MAX_UNANSWERED, PATIENCE, RemoteDrafter, RoundResult, Want

DRAFTER = Peer(WorkerId("draft-0", 3), "there")


def request_of(name: str = "r", tokens: int = 20, max_tokens: int = 24) -> Request:
    prompt = tuple(2 + i * 7 % (VOCABULARY - 2) for i in range(tokens))
    return Request(name, prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=1))


def plain(request: Request) -> tuple[int, ...]:
    return one_by_one(EmulatedEngine(SMALL, VOCABULARY), [request])[request.id]


class WorseModel(HashModel):
    """Agrees with the emulated target on two tokens of three."""

    def forward(self, batch: StepBatch, kv: Tensor) -> Tensor:
        logits = super().forward(batch, kv)
        best = logits.argmax(-1)
        for row, token in enumerate(best.tolist()):
            if token % 3 == 0:
                logits[row] = logits[row].roll(1)
        return logits


def worse(settings: Settings, role: Role) -> Engine:
    return NativeEngine(WorseModel(VOCABULARY, 8192), settings.engine)


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


class TestTogether:
    """A verify worker and a draft worker that is right two times of three, under everything that can go wrong."""

    @pytest.fixture
    def trio(self) -> Trio:
        return Trio(settings_of(SMALL, SpeculationSettings(wait_s=1.0)), worse)

    def run(self, trio: Trio, between: Callable[[int], None], requests: int = 3) -> None:
        wanted = [request_of(f"r{index}", tokens=20 + 9 * index) for index in range(requests)]
        for request in wanted:
            trio.verify.send(Submit(request, trio.draft.me))
        for index in range(400):
            trio.verify.turn()
            if all(trio.verify.over(request.id) for request in wanted):
                break
            between(index)
        for request in wanted:
            assert trio.verify.tokens(request.id) == plain(request)

    def result(self, trio: Trio, name: str) -> float:
        return trio.verify.metrics.value(metrics.DRAFT_ROUNDS, result=name)

    def test_in_time(self, trio: Trio) -> None:
        self.run(trio, lambda _: trio.drafted())
        assert self.result(trio, "used") > 3
        assert self.result(trio, "late") == self.result(trio, "stale") == 0
        drafted = trio.verify.metrics.value(metrics.DRAFTED)
        assert 0.2 * drafted < trio.verify.metrics.value(metrics.ACCEPTED) < 0.9 * drafted
        trio.assert_empty()

    def test_one_message_a_step_each_way(self, trio: Trio) -> None:
        """However many requests draft."""
        calls = 0

        def between(_: int) -> None:
            nonlocal calls
            calls += sum(len(stream.calls) for stream in trio.verify.streams)
            trio.drafted()

        self.run(trio, between, requests=6)
        # The opens are one call, each step's asks another, and what ended is told with the next.
        assert calls <= trio.verify.metrics.value(metrics.STEPS, role="verify") + 1

    def test_late(self, trio: Trio) -> None:
        def between(index: int) -> None:
            trio.carry_calls()
            if index % 3 == 2:
                trio.verify.clock.now += 1.5
                trio.verify.turn()
                trio.carry_replies()

        self.run(trio, between)
        assert self.result(trio, "late") > 0

    def test_never(self, trio: Trio) -> None:
        started = trio.verify.clock.now
        self.run(trio, lambda _: setattr(trio.verify.clock, "now", trio.verify.clock.now + 0.25))
        assert self.result(trio, "used") == 0
        assert trio.verify.clock.now - started < 24 * 0.25 + 2 * PATIENCE * 1.25, "a silent peer is not waited for long"

    def test_twice_and_out_of_date(self, trio: Trio) -> None:
        old: list[DraftReply] = []

        def between(_: int) -> None:
            trio.carry_calls()
            replies = list(trio.replies)
            trio.replies = [*old[-2:], *replies, *replies]
            trio.carry_replies()
            old.extend(replies)

        self.run(trio, between)
        assert self.result(trio, "stale") > 0
        assert self.result(trio, "used") > 0

    def test_wrong(self, trio: Trio) -> None:
        def between(_: int) -> None:
            trio.carry_calls()
            trio.replies = [
                DraftReply(
                    reply.round,
                    tuple(
                        Draft(d.request_id, d.base, (3,) * len(d.tokens), d.parents) for d in reply.drafts if d.tokens
                    ),
                )
                for reply in trio.replies
            ]
            trio.carry_replies()

        self.run(trio, between)
        assert self.result(trio, "used") > 0

    def test_the_stream_breaks_and_the_next_request_tries_again(self, trio: Trio) -> None:
        def between(index: int) -> None:
            if index == 5:
                trio.verify.verify.on_drafter_lost(trio.draft.me, "cut")
                trio.draft.draft.stream_closed(1)
                trio.replies.clear()
                trio.stream.calls.clear()
            trio.drafted()

        self.run(trio, between)
        assert self.result(trio, "lost") == 1
        used = self.result(trio, "used")
        assert len(trio.verify.streams) == 1
        trio.verify.send(Submit(request_of("next"), trio.draft.me))
        for _ in range(40):
            trio.verify.turn()
            trio.drafted()
        assert len(trio.verify.streams) == 2
        assert self.result(trio, "used") > used
        assert trio.verify.tokens("next") == plain(request_of("next"))

    def test_no_drafts_for_a_large_batch(self) -> None:
        trio = Trio(settings_of(SMALL, SpeculationSettings(wait_s=1.0, max_batch=2)), worse)
        asked: list[int] = []

        def between(_: int) -> None:
            decoding = sum(not trio.verify.over(f"r{i}") and bool(trio.verify.tokens(f"r{i}")) for i in range(3))
            if any(call.asks for call in trio.stream.calls):
                asked.append(decoding)
            trio.drafted()

        self.run(trio, between)
        assert asked
        assert max(asked) <= 2

    def test_speculation_can_be_off(self) -> None:
        trio = Trio(settings_of(SMALL, SpeculationSettings(enabled=False)), worse)
        self.run(trio, lambda _: None)
        assert not trio.verify.streams

    def test_a_stream_nobody_uses_is_closed(self, trio: Trio) -> None:
        self.run(trio, lambda _: trio.drafted())
        trio.verify.turn()
        trio.carry_calls()
        trio.carry_replies()
        trio.verify.turn(advance_s=pool.IDLE_S + 1)
        trio.verify.turn(advance_s=pool.IDLE_S + 1)
        assert trio.stream.closed
        trio.assert_empty()

    def test_the_last_token_is_not_drafted(self, trio: Trio) -> None:
        """A step yields a token anyway, so the last one wanted needs no draft."""
        self.run(trio, lambda _: trio.drafted(), requests=1)
        events = [event for event in trio.verify.events("r0") if isinstance(event, Tokens)]
        assert events[0].drafted == 0
        assert sum(len(event.tokens) for event in events) == 24
        assert all(event.drafted <= 4 for event in events)
