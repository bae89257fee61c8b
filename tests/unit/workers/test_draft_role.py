"""The draft role inside its loop: chains for what verify workers ask, and nothing left behind."""

from collections import Counter

import pytest

from tests.support.benches import Bench
from tests.support.engines import SMALL, VOCABULARY
from tests.support.requests import plain, request_of
from tests.support.workers import fixed_drafts, settings_of
from tidemill.core.messages import (
    Cancel,
    DraftAsk,
    DraftCall,
    DraftOpen,
    DraftReply,
    Failure,
    Refusal,
    Refused,
    Released,
    Submit,
)
from tidemill.core.model import Request, Role
from tidemill.core.tree import Shape, prefix_hash
from tidemill.types import SamplingParams


def ask(name: str, base: int, tokens: tuple[int, ...], depth: int = 4, ahead: int = 0) -> DraftAsk:
    return DraftAsk(name, base, tuple(tokens), Shape(depth, 2, 12), ahead)


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

    def test_a_chain_of_what_the_target_would_say(self, replies: list[DraftReply]) -> None:
        bench = Bench(Role.DRAFT, settings_of(SMALL, fixed_drafts(strategy="chain")))
        request = request_of()
        expected = plain(request)
        self.call(bench, replies, 1, opens=(request,))
        assert replies == [DraftReply(1)], "every call is answered, this one at once"
        bench.drain()
        self.call(bench, replies, 2, asks=(ask("r", 20, expected[:1]),))
        assert len(replies) == 1
        bench.drain()
        assert replies[1].round == 2
        draft = replies[1].drafts[0]
        assert (draft.base, draft.prefix) == (21, prefix_hash((*request.prompt, expected[0])))
        assert draft.tree.find(expected[1:5]) is not None
        # Three of four were right, the fourth was not: it goes on from what was committed.
        self.call(bench, replies, 3, asks=(ask("r", 21, (*expected[1:4], 5), depth=3),))
        bench.drain()
        assert replies[2].drafts[0].base == 25
        assert max(replies[2].drafts[0].tree.depths()) == 3
        self.call(bench, replies, 4, closes=("r",))
        bench.assert_empty()

    @pytest.mark.parametrize("strategy", ["beam", "heap", "static"])
    def test_trees_keep_to_their_shape(self, strategy: str, replies: list[DraftReply]) -> None:
        settings = fixed_drafts(strategy=strategy)
        bench = Bench(Role.DRAFT, settings_of(SMALL, settings))
        request = request_of()
        expected = plain(request)
        self.call(bench, replies, 1, opens=(request,))
        self.call(bench, replies, 2, asks=(DraftAsk("r", 20, expected[:1], Shape(4, 2, 7)),))
        bench.drain()
        tree = replies[-1].drafts[0].tree
        assert len(tree) <= 7
        assert max(tree.depths()) <= 4
        assert max(Counter(tree.parents).values()) <= 2
        assert tree.find(expected[1:3]) is not None

    def test_it_drafts_on_before_the_verdict(self, replies: list[DraftReply]) -> None:
        """The rest of what was drafted ahead is the next answer, and it is there at once."""
        bench = Bench(Role.DRAFT, settings_of(SMALL, fixed_drafts(strategy="chain")))
        request = request_of()
        expected = plain(request)
        self.call(bench, replies, 1, opens=(request,))
        self.call(bench, replies, 2, asks=(ask("r", 20, expected[:1], ahead=1),))
        bench.drain()
        assert [reply.round for reply in replies] == [1, 2, 2]
        assert [max(reply.drafts[0].tree.depths()) for reply in replies[1:]] == [4, 9]
        steps = bench.engine.load().steps
        self.call(bench, replies, 3, asks=(ask("r", 21, expected[1:6]),))
        assert replies[-1].round == 3
        assert replies[-1].drafts[0].base == 26
        assert replies[-1].drafts[0].tree.find(expected[6:10]) is not None
        bench.drain()
        assert bench.engine.load().steps == steps, "nothing was computed again"

    def test_a_newer_ask_takes_the_place_of_an_older(self, bench: Bench, replies: list[DraftReply]) -> None:
        request = request_of()
        expected = plain(request)
        self.call(bench, replies, 1, opens=(request,))
        bench.drain()
        self.call(bench, replies, 2, asks=(ask("r", 20, expected[:1]),))
        bench.turn()
        self.call(bench, replies, 3, asks=(ask("r", 21, expected[1:3]),))
        bench.drain()
        assert [(reply.round, len(reply.drafts)) for reply in replies] == [(1, 0), (2, 0), (3, 1)]
        assert replies[-1].drafts[0].base == 23

    def test_asking_while_the_prompt_is_being_computed(self, replies: list[DraftReply]) -> None:
        bench = Bench(Role.DRAFT, settings_of(SMALL.model_copy(update={"max_batch_tokens": 8})))
        request = request_of(tokens=60)
        self.call(bench, replies, 1, opens=(request,))
        bench.turn()
        self.call(bench, replies, 2, asks=(ask("r", 60, plain(request)[:1], depth=2),))
        bench.drain()
        assert replies[1].drafts[0].tree.find(plain(request)[1:3]) is not None

    def test_kv_that_was_taken_is_computed_again(self, replies: list[DraftReply]) -> None:
        """Another prompt takes the blocks of one that waits for its next ask."""
        bench = Bench(Role.DRAFT, settings_of(SMALL.model_copy(update={"kv_blocks": 5})))
        first, second = request_of("a", tokens=40), request_of("b", tokens=41)
        self.call(bench, replies, 1, opens=(first,))
        bench.drain()
        self.call(bench, replies, 2, opens=(second,))
        bench.drain()
        self.call(bench, replies, 3, asks=(ask("a", 40, plain(first)[:1]),))
        bench.drain()
        assert replies[-1].drafts[0].tree.find(plain(first)[1:5]) is not None

    @pytest.mark.parametrize(
        "wrong",
        [ask("other", 20, (5,)), ask("r", 22, (5,)), ask("r", 20, (VOCABULARY,))],
        ids=["unknown", "a gap", "outside the vocabulary"],
    )
    def test_what_cannot_be_answered_is_lost(self, bench: Bench, replies: list[DraftReply], wrong: DraftAsk) -> None:
        self.call(bench, replies, 1, opens=(request_of(),))
        self.call(bench, replies, 2, asks=(wrong,))
        bench.drain()
        assert replies[1] == DraftReply(2, (), (wrong.request_id,))

    def test_a_prompt_outside_the_drafts_vocabulary_is_not_opened(
        self, bench: Bench, replies: list[DraftReply]
    ) -> None:
        self.call(bench, replies, 1, opens=(Request("r", (VOCABULARY, 1), SamplingParams(seed=1)),))
        bench.assert_empty()

    def test_asks_of_several_workers_share_steps(self, replies: list[DraftReply]) -> None:
        bench = Bench(Role.DRAFT, settings_of(SMALL, fixed_drafts(strategy="chain")))
        requests = {stream: request_of("same", tokens=20 + stream) for stream in (1, 2, 3)}
        for stream, request in requests.items():
            self.call(bench, replies, 1, opens=(request,), stream=stream)
        bench.drain()
        steps = bench.engine.load().steps
        for stream, request in requests.items():
            self.call(bench, replies, 2, asks=(ask("same", 20 + stream, plain(request)[:1]),), stream=stream)
        bench.drain()
        assert bench.engine.load().steps - steps == 4
        trees = {reply.drafts[0].base: reply.drafts[0].tree for reply in replies if reply.drafts}
        assert set(trees) == {22, 23, 24}
        assert all(trees[21 + stream].find(plain(request)[1:5]) is not None for stream, request in requests.items())

    def test_the_end_of_a_stream_releases_its_requests_only(self, bench: Bench, replies: list[DraftReply]) -> None:
        for stream in (1, 2):
            self.call(bench, replies, 1, opens=(request_of("a"), request_of("b")), stream=stream)
        bench.drain()
        self.call(bench, replies, 2, asks=(ask("a", 20, (5,)),), stream=1)
        bench.draft.stream_closed(1)
        bench.drain()
        assert not any(reply.drafts for reply in replies)
        assert bench.engine.load().kv_blocks_used > 0
        bench.draft.stream_closed(2)
        bench.assert_empty()

    def test_the_least_recently_asked_is_forgotten_first(self, replies: list[DraftReply]) -> None:
        bench = Bench(Role.DRAFT, settings_of(SMALL.model_copy(update={"max_waiting": 2})))
        self.call(bench, replies, 1, opens=(request_of("a"), request_of("b")))
        self.call(bench, replies, 2, asks=(ask("a", 20, (5,)),))
        bench.drain()
        self.call(bench, replies, 3, opens=(request_of("c"),))
        self.call(bench, replies, 4, asks=tuple(ask(n, 21 if n == "a" else 20, (5,)) for n in "abc"))
        bench.drain()
        lost = [name for reply in replies for name in reply.lost]
        drafted = [draft.request_id for reply in replies if reply.round >= 3 for draft in reply.drafts]
        assert (lost, sorted(drafted)) == (["b"], ["a", "c"])

    def test_closing_what_is_being_drafted_answers_the_rest(self, bench: Bench, replies: list[DraftReply]) -> None:
        self.call(bench, replies, 1, opens=(request_of("a"), request_of("b", tokens=21)))
        self.call(bench, replies, 2, asks=(ask("a", 20, (5,)), ask("b", 21, (5,))))
        self.call(bench, replies, 3, closes=("a",))
        bench.drain()
        assert replies[-1].round == 3
        assert [draft.request_id for draft in replies[-1].drafts] == ["b"]

    def test_a_step_that_raises_loses_the_requests(
        self, bench: Bench, replies: list[DraftReply], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.call(bench, replies, 1, opens=(request_of(),))
        self.call(bench, replies, 2, asks=(ask("r", 20, (5,)),))
        with monkeypatch.context() as patch:
            patch.setattr(bench.engine, "step", lambda: 1 / 0)
            bench.turn()
        assert replies[1] == DraftReply(2, (), ("r",))
        bench.turn(advance_s=2.0)
        bench.assert_empty()

    def test_it_takes_no_requests_of_routers(self, bench: Bench) -> None:
        bench.send(Submit(request_of()))
        bench.send(Cancel("r"))
        bench.turn()
        assert bench.events("r") == [Refused("r", Refusal.WRONG_ROLE), Released("r")]
        bench.loop.role.give_up(Failure.STOPPING, "")
        bench.assert_empty()
