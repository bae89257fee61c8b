"""A verify and a draft worker together: drafts change when a token comes, never which."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.support.benches import Trio, half_right
from tests.support.engines import SMALL
from tests.support.requests import plain, request_of
from tests.support.workers import fixed_drafts, settings_of
from tidemill.core import metrics
from tidemill.core.messages import DraftReply, Submit, Tokens
from tidemill.core.model import SloClass
from tidemill.core.tree import TokenTree
from workers.speculation import pool
from workers.speculation.remote import PATIENCE

EVERY_SOURCE = ("draft", "lookup", "recycling", "trigram", "early_layers")


class TestTogether:
    """A verify worker and a draft worker that is right two times of three, under everything that can go wrong."""

    @pytest.fixture
    def trio(self) -> Trio:
        return Trio(settings_of(SMALL, fixed_drafts(wait_s=1.0)), half_right)

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

    def fate(self, trio: Trio, name: str) -> float:
        return trio.verify.metrics.value(metrics.DRAFT_TREES, fate=name)

    def test_in_time(self, trio: Trio) -> None:
        self.run(trio, lambda _: trio.drafted())
        assert self.result(trio, "answered") > 3
        assert self.fate(trio, "fresh") > 3
        assert self.result(trio, "late") == self.fate(trio, "stale") == self.fate(trio, "foreign") == 0
        assert 0 < trio.verify.metrics.value(metrics.ACCEPTED) < trio.verify.metrics.value(metrics.DRAFTED)
        trio.assert_empty()

    def test_a_step_waits_for_its_drafts_and_no_longer_than_it_may(self) -> None:
        trio = Trio(settings_of(SMALL, fixed_drafts(wait_s=1.0, ahead=0)))
        trio.verify.send(Submit(request_of(), trio.draft.me))
        trio.verify.turn()
        got = len(trio.verify.tokens("r"))
        trio.verify.turn(3, advance_s=0.3)
        assert len(trio.verify.tokens("r")) == got
        assert trio.verify.loop.wait_s(trio.verify.clock.now) == pytest.approx(0.1)
        trio.drafted()
        trio.verify.turn()
        assert len(trio.verify.tokens("r")) > got + 1, "the drafts were there"
        got = len(trio.verify.tokens("r"))
        trio.verify.turn(advance_s=1.1)
        assert len(trio.verify.tokens("r")) == got + 1, "they were not, and it went on without"

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

    def test_what_metrics_tell(self, trio: Trio) -> None:
        """Each of what an operator looks at moves under load: by source, fate, depth and class."""

        def between(index: int) -> None:
            if index % 3:
                trio.drafted()
            else:  # what is asked for now comes a step late
                trio.carry_replies()
                trio.carry_calls()

        self.run(trio, between)
        verify = trio.verify.metrics
        for fate in ("fresh", "branch"):
            assert verify.value(metrics.DRAFTS_USED, source="draft", fate=fate) > 0
        for depth in ("1", "2"):
            offered = verify.value(metrics.OFFERED_AT_DEPTH, depth=depth, source="draft")
            assert offered > verify.value(metrics.ACCEPTED_AT_DEPTH, depth=depth, source="draft") > 0
        from_workers, accepted = verify.value(metrics.ACCEPTED_FROM, source="draft"), verify.value(metrics.ACCEPTED)
        assert 0 < from_workers <= accepted
        assert accepted / verify.value(metrics.VERIFIES) > 0.3

        def of_histogram(series: metrics.Series, part: str, **labels: str) -> float:
            return verify.registry.get_sample_value(f"{series.name}_{part}", labels) or 0.0

        class_ = request_of().slo.name
        assert of_histogram(metrics.DRAFT_LENGTH, "sum", slo_class=class_) == from_workers
        assert of_histogram(metrics.SELECTION_TIME, "count") > 0
        assert of_histogram(metrics.SELECTION_TIME, "sum") > 0

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
        assert self.result(trio, "answered") == 0
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
        assert self.fate(trio, "stale") + self.fate(trio, "foreign") > 0
        assert trio.verify.metrics.value(metrics.ACCEPTED) > 0

    def test_a_step_late(self, trio: Trio) -> None:
        """Drafts come a step after they were wanted: branches of them still fit."""

        def between(_: int) -> None:
            trio.carry_replies()
            trio.carry_calls()
            trio.verify.clock.now += 1.1

        self.run(trio, between)
        assert self.fate(trio, "branch") > 0
        used = trio.verify.metrics.value(metrics.DRAFTS_USED, source="draft", fate="branch")
        assert used > 0
        assert trio.verify.metrics.value(metrics.ACCEPTED) > 0

    def test_another_prefix(self, trio: Trio) -> None:
        """A draft worker that lost an ask drafts for tokens that are not the request's."""

        def between(_: int) -> None:
            trio.carry_calls()
            trio.replies = [
                DraftReply(reply.round, tuple(replace(draft, prefix=draft.prefix ^ 1) for draft in reply.drafts))
                for reply in trio.replies
            ]
            trio.carry_replies()

        self.run(trio, between)
        assert self.fate(trio, "foreign") > 0
        assert trio.verify.metrics.value(metrics.DRAFTED) == 0

    def test_wrong(self, trio: Trio) -> None:
        def between(_: int) -> None:
            trio.carry_calls()
            trio.replies = [
                DraftReply(reply.round, tuple(replace(draft, tree=wrong(draft.tree)) for draft in reply.drafts))
                for reply in trio.replies
            ]
            trio.carry_replies()

        def wrong(tree: TokenTree) -> TokenTree:
            return TokenTree((3,) * len(tree), tree.parents, tree.chances)

        self.run(trio, between)
        assert trio.verify.metrics.value(metrics.DRAFTED) > 0

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
        used = self.result(trio, "answered")
        assert len(trio.verify.streams) == 1
        trio.verify.send(Submit(request_of("next"), trio.draft.me))
        for _ in range(40):
            trio.verify.turn()
            trio.drafted()
        assert len(trio.verify.streams) == 2
        assert self.result(trio, "answered") > used
        assert trio.verify.tokens("next") == plain(request_of("next"))

    @pytest.mark.parametrize("sources", [("draft",), EVERY_SOURCE])
    def test_whatever_is_chosen(self, sources: tuple[str, ...]) -> None:
        """Shapes, sources and nodes that follow from measurements, which differ from run to run."""
        trio = Trio(settings_of(SMALL, fixed_drafts(adaptive=True, wait_s=1.0, sources=sources)), half_right)
        self.run(trio, lambda _: trio.drafted(), requests=6)
        trio.assert_empty()

    @pytest.mark.parametrize("strategy", ["chain", "beam", "heap", "static"])
    def test_the_largest_trees_in_the_smallest_pool(self, strategy: str) -> None:
        """All sources at once, requests of several tenants, which take each other's blocks on both workers."""
        engine = SMALL.model_copy(update={"kv_blocks": 5, "max_batch_tokens": 24})
        largest = {"max_depth": 16, "width": 16, "max_nodes": 64, "ahead": 4, "early_layers": 99}
        drafts = fixed_drafts(strategy=strategy, wait_s=1.0, sources=EVERY_SOURCE, **largest)
        trio = Trio(settings_of(engine, drafts), half_right)
        wanted = [replace(request_of(f"r{i}", tokens=20 + 5 * i), tenant=f"tenant {i % 2}") for i in range(3)]
        for request in wanted:
            trio.verify.send(Submit(request, trio.draft.me))
        while not all(trio.verify.over(request.id) for request in wanted):
            trio.verify.turn()
            trio.drafted()
            trio.verify.engine.check()
            trio.draft.engine.check()
        assert {each.id: trio.verify.tokens(each.id) for each in wanted} == {each.id: plain(each) for each in wanted}
        trio.assert_empty()

    @pytest.mark.parametrize("source", ["lookup", "recycling", "trigram", "early_layers"])
    def test_drafts_without_draft_workers(self, source: str) -> None:
        trio = Trio(settings_of(SMALL, fixed_drafts(sources=(source,))), half_right)
        for number in range(2):  # the second time its tenant's texts are known
            trio.verify.send(Submit(replace(request_of(f"r{number}"), prompt=request_of().prompt), None))
            trio.verify.drain()
            assert trio.verify.tokens(f"r{number}") == plain(request_of())
        assert trio.verify.metrics.value(metrics.ACCEPTED_FROM, source=source) > 0
        assert not trio.verify.streams
        trio.verify.assert_empty()

    def test_speculation_can_be_off(self) -> None:
        trio = Trio(settings_of(SMALL, fixed_drafts(enabled=False)), half_right)
        self.run(trio, lambda _: None)
        assert not trio.verify.streams

    def test_a_goal_that_is_lost_is_reported_and_its_request_is_served_as_others_are(self) -> None:
        trio = Trio(settings_of(SMALL, fixed_drafts(adaptive=True)))
        hopeless = replace(request_of("hopeless", tokens=20), slo=SloClass("hopeless", 10.0, 1e-9))
        for request in (hopeless, request_of("other", tokens=20)):
            trio.verify.send(Submit(request, None))
        for _ in range(5):
            trio.verify.turn(advance_s=0.01)
            assert len(trio.verify.tokens("hopeless")) == len(trio.verify.tokens("other"))
        trio.verify.drain()
        assert trio.verify.tokens("hopeless") == plain(hopeless)
        assert trio.verify.metrics.value(metrics.GOALS_OUT_OF_REACH, slo_class="hopeless") > 0
        assert trio.verify.metrics.value(metrics.GOALS_OUT_OF_REACH, slo_class="default") == 0

    def test_prompts_take_their_time_while_a_request_is_behind_its_goal(self) -> None:
        """0.2 s a token leave no time to compute a prompt at once that may take 100 s."""
        trio = Trio(settings_of(SMALL, fixed_drafts(adaptive=True)))
        slow = SloClass("slow", 100.0, 0.2)
        trio.verify.send(Submit(replace(request_of("behind", tokens=100), slo=slow), None))
        trio.verify.turn(2, advance_s=0.25)
        trio.verify.send(Submit(replace(request_of("new", tokens=4), slo=slow), None))
        trio.verify.turn(2, advance_s=0.25)
        assert not trio.verify.tokens("new")
        trio.verify.drain()
        assert trio.verify.tokens("new") == plain(request_of("new", tokens=4))

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
        assert all(event.drafted <= 16 for event in events)
