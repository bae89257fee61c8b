"""A decoding request moves from one verify worker to another; a router's part, and the link's, are played by hand."""

from dataclasses import replace

import pytest

from tests.support.benches import Bench, break_link, carry_kv
from tests.support.engines import SMALL, VOCABULARY, one_by_one
from tests.support.workers import settings_of
from tidemill.core import metrics
from tidemill.core.messages import (
    Cancel,
    Failed,
    Failure,
    LeaseGranted,
    Migrate,
    Paused,
    Refusal,
    Refused,
    Reserve,
    Resume,
    Stay,
    Staying,
    Submit,
    Tokens,
)
from tidemill.core.model import Peer, Request, Role, WorkerId
from tidemill.core.settings import EngineSettings
from tidemill.types import SamplingParams
from workers.engine.emulated import EmulatedEngine
from workers.roles import departures
from workers.roles.departures import LAST_BLOCKS
from workers.speculation import remote

DRAFTER = Peer(WorkerId("draft-0", 1), "nowhere")
BLOCK_BYTES = EmulatedEngine(SMALL, VOCABULARY).info.kv.block_bytes


def request_of(name: str = "r", tokens: int = 100, max_tokens: int = 60) -> Request:
    prompt = tuple(2 + i * 7 % (VOCABULARY - 2) for i in range(tokens))
    sampling = SamplingParams(
        max_tokens=max_tokens, temperature=1.0, frequency_penalty=0.5, repetition_penalty=1.1, ignore_eos=True, seed=1
    )
    return Request(name, prompt, sampling)


def plain(request: Request) -> tuple[int, ...]:
    return one_by_one(EmulatedEngine(SMALL, VOCABULARY), [request])[request.id]


class Couple:
    """Two verify workers, and one request that decodes on the first. `NEW` is its name on the second."""

    NEW = "r/moved"

    def __init__(
        self,
        engine: EngineSettings = SMALL,
        request: Request | None = None,
        drafter: Peer | None = None,
        elder: Request | None = None,
    ) -> None:
        """`elder` came to the first worker before it."""
        self.source = Bench(Role.VERIFY, settings_of(engine), name="verify-0")
        self.target = Bench(Role.VERIFY, settings_of(engine), name="verify-1")
        self.request = request or request_of()
        self.drafter = drafter
        if elder is not None:
            self.source.send(Submit(elder))
            self.source.turn(2)
        self.source.send(Submit(self.request, drafter))
        self.source.turn(6, advance_s=0.0 if drafter is None else 0.3)  # nobody answers, so nobody is waited for
        assert len(self.source.tokens("r")) == 5

    def reserve(self, headroom: int = 40, ttl_s: float = 10.0) -> None:
        request = replace(self.request, id=self.NEW, output=self.source.tokens("r"))
        self.known = len(request.tokens)
        self.target.send(Reserve(request, ttl_s, self.drafter, headroom))
        self.target.turn()

    def migrate(self) -> None:
        self.lease = self.target.granted(self.NEW).lease
        self.source.send(Migrate("r", self.lease, self.known))
        self.source.turn()

    def begin(self, headroom: int = 40, ttl_s: float = 10.0) -> None:
        self.reserve(headroom, ttl_s)
        self.migrate()

    @property
    def paused(self) -> bool:
        return Paused("r", self.lease.id) in self.source.events("r")

    def until_paused(self, most: int = 50) -> int:
        """Carry what comes; returns how many turns that took. The last messages are left with the link."""
        for turn in range(most):
            if self.paused:
                return turn
            carry_kv(self.source, self.target)
            self.source.turn()
        raise AssertionError(f"it does not pause: {self.source.events('r')[-3:]}")

    def fill(self) -> None:
        """The last blocks come."""
        carry_kv(self.source, self.target)
        self.target.turn()

    def arrived(self) -> None:
        """The router has the first token of the target."""
        assert self.target.tokens(self.NEW)
        self.source.send(Cancel("r"))
        self.source.turn()

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.source.tokens("r") + self.target.tokens(self.NEW)

    def stays(self) -> None:
        """What a router does when a move has failed; then the request must go on as if nothing had been."""
        self.target.send(Cancel(self.NEW))
        self.source.send(Resume("r"))
        self.target.turn()
        self.source.drain()
        assert self.source.tokens("r") == plain(self.request)
        self.assert_empty()

    def assert_empty(self) -> None:
        self.source.assert_empty()
        self.target.assert_empty()


@pytest.fixture
def couple() -> Couple:
    return Couple()


def small_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """One block a step."""
    monkeypatch.setattr(departures, "STAGE_BYTES", BLOCK_BYTES)


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
