"""Workers taken apart: an engine loop without its thread, links and draft streams that do what the test says.

Time stands still unless a test moves it; nothing runs but by a call.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from tests.support.engines import SMALL, VOCABULARY
from tests.support.workers import settings_of
from tidemill.core.messages import (
    Cancel,
    Command,
    DraftCall,
    DraftReply,
    Event,
    Failed,
    LeaseGranted,
    Prefill,
    Refused,
    StepReport,
    Tokens,
)
from tidemill.core.metrics import WORKER_SERIES, Metrics
from tidemill.core.model import Peer, Role, WorkerId
from tidemill.core.settings import Settings
from workers.engine.base import Engine
from workers.engine.emulated import EmulatedEngine
from workers.engine.native.engine import NativeEngine
from workers.engines import Engines
from workers.kv.link import Arrival, KvMessage, NotSent, Sent
from workers.loop import EngineLoop
from workers.mailbox import Mailbox
from workers.roles.base import Outbox, WorkerRole
from workers.roles.draft import DraftRole
from workers.roles.prefill import PrefillRole
from workers.roles.verify import VerifyRole
from workers.speculation.pool import DrafterPool
from workers.speculation.step_time import StepTimes


@dataclass
class ManualClock:
    now: float = 100.0

    def monotonic(self) -> float:
        return self.now


@dataclass
class ManualFeeder:
    """A link that sends when told."""

    to: Peer
    sent: Sent
    failed: NotSent
    waiting: list[KvMessage] = field(default_factory=list)
    backlog_bytes: int = 0
    prepared: bool = False
    connected: bool = True
    closed: bool = False

    def prepare(self) -> None:
        self.prepared = True

    def put(self, message: KvMessage) -> None:
        assert not self.closed
        self.waiting.append(message)
        self.backlog_bytes += message.nbytes

    def drop(self, lease_id: int) -> None:
        self.waiting = [each for each in self.waiting if each.lease_id != lease_id]
        self.backlog_bytes = sum(each.nbytes for each in self.waiting)

    def close(self) -> None:
        self.closed = True
        self.waiting.clear()

    def pop(self) -> KvMessage:
        message = self.waiting.pop(0)
        self.backlog_bytes -= message.nbytes
        return message

    def break_link(self, why: str = "cut") -> None:
        lost, self.waiting = self.waiting, []
        self.backlog_bytes = 0
        for message in lost:
            self.failed(message, why)


@dataclass
class ManualDraftStream:
    """Calls wait here until the test has them answered."""

    peer: Peer
    calls: list[DraftCall] = field(default_factory=list)
    closed: bool = False

    def send(self, call: DraftCall) -> None:
        assert not self.closed
        self.calls.append(call)

    def close(self) -> None:
        self.closed = True


class Bench:
    """One worker's loop. `roles` of several benches know each other only by what a test carries between them."""

    def __init__(
        self,
        role: Role,
        settings: Settings | None = None,
        make_engine: Callable[[Settings, Role], Engine] | None = None,
        name: str = "",
    ) -> None:
        self.settings = settings or settings_of(SMALL)
        self.clock = ManualClock()
        self.metrics = Metrics(WORKER_SERIES)
        self.mailbox = Mailbox()
        self.feeders: dict[WorkerId, ManualFeeder] = {}
        self.streams: list[ManualDraftStream] = []
        self.times = StepTimes()
        self.left = 0  # how often links were cut by a change of role
        self.sent: list[tuple[int, StepReport]] = []
        engines = Engines(self.settings, make_engine or (lambda s, _: EmulatedEngine(s.engine, VOCABULARY)))
        name = name or f"{role}-0"
        self.loop = EngineLoop(
            name, role, engines, self, self.mailbox, lambda *report: self.sent.append(report), self.metrics, self.clock
        )
        self.loop.attach(1)

    # --- workers.loop.Roles -------------------------------------------------------------------------------------

    def make(self, role: Role, engine: Engine, me: WorkerId, outbox: Outbox) -> WorkerRole:
        deliver = self.mailbox.deliver
        if role is Role.PREFILL:
            return PrefillRole(engine, outbox, self.settings, self.metrics, self._feed, deliver)
        if role is Role.DRAFT:
            return DraftRole(engine, outbox, self.settings)
        pool = DrafterPool(self.settings.speculation.wait_s, self._connect)
        peer = Peer(me, "here")
        return VerifyRole(engine, outbox, self.settings, self.metrics, peer, pool, self.times, self._feed, deliver)

    def leave(self) -> None:
        self.left += 1

    def _feed(self, to: Peer, sent: Sent, failed: NotSent) -> ManualFeeder:
        self.feeders[to.id] = ManualFeeder(to, sent, failed)
        return self.feeders[to.id]

    def _connect(self, peer: Peer) -> ManualDraftStream:
        self.streams.append(ManualDraftStream(peer))
        return self.streams[-1]

    # --- driving ------------------------------------------------------------------------------------------------

    @property
    def engine(self) -> NativeEngine:
        engine = self.loop.engine
        assert isinstance(engine, NativeEngine)
        return engine

    @property
    def verify(self) -> VerifyRole:
        assert isinstance(self.loop.role, VerifyRole)
        return self.loop.role

    @property
    def draft(self) -> DraftRole:
        assert isinstance(self.loop.role, DraftRole)
        return self.loop.role

    @property
    def me(self) -> Peer:
        return Peer(self.loop.standing.worker, "here")

    def send(self, command: Command, router: int = 1) -> None:
        self.mailbox.post(lambda: self.loop.handle(router, command))

    def turn(self, turns: int = 1, advance_s: float = 0.0) -> None:
        for _ in range(turns):
            self.clock.now += advance_s
            self.mailbox.run(0.0)
            self.loop.turn(self.clock.now)
            self.engine.check()

    def drain(self, most: int = 500) -> None:
        """Turns until nothing is left to do. Time passes only where a step waits for drafts."""
        for _ in range(most):
            self.turn()
            step_at = self.loop.role.next_step_at(self.clock.now)
            if step_at is None:
                return
            self.clock.now = max(self.clock.now, step_at)
        raise AssertionError("it does not come to rest")

    def events(self, request_id: str, router: int = 1) -> list[Event]:
        """All events of a request so far."""
        reports = [report for to, report in self.sent if to == router]
        return [event for report in reports for event in report.events if event.request_id == request_id]

    def tokens(self, request_id: str) -> tuple[int, ...]:
        return sum((each.tokens for each in self.events(request_id) if isinstance(each, Tokens)), ())

    def last(self, request_id: str) -> Event:
        return self.events(request_id)[-1]

    def over(self, request_id: str) -> bool:
        """True if the worker has said its last word."""
        return any(
            isinstance(each, Failed | Refused) or (isinstance(each, Tokens) and each.finish is not None)
            for each in self.events(request_id)
        )

    def granted(self, request_id: str) -> LeaseGranted:
        return next(each for each in self.events(request_id) if isinstance(each, LeaseGranted))

    def assert_empty(self) -> None:
        """Nothing is held at any stage, and the books balance."""
        self.turn()
        assert self.loop.holds_nothing, self.engine.load()
        self.engine.check()


def carry_kv(sender: Bench, receiver: Bench, most: int = 10**9) -> int:
    """Deliver up to so many messages of the link between them; returns how many. The sender hears of it in its turn."""
    feeder = sender.feeders.get(receiver.me.id)
    carried = 0
    while feeder is not None and feeder.waiting and carried < most:
        message = feeder.pop()
        arrival = Arrival(
            "link",
            str(sender.me.id),
            message.lease_id,
            message.first_block,
            message.kv,
            message.first_layer,
            message.output,
        )
        receiver.verify.on_kv(arrival, receiver.clock.monotonic())
        feeder.sent(message, 0.001)
        carried += 1
    return carried


def break_link(sender: Bench, receiver: Bench) -> None:
    """Both ends learn of it."""
    receiver.verify.on_kv(Arrival("link", str(sender.me.id), error="cut"), receiver.clock.monotonic())
    feeder = sender.feeders.get(receiver.me.id)
    if feeder is not None:
        feeder.break_link()


@dataclass
class Trio:
    """A prefill, a verify and a draft worker, and what is on its way between them."""

    settings: Settings = field(default_factory=settings_of)
    draft_engine: Callable[[Settings, Role], Engine] | None = None

    def __post_init__(self) -> None:
        self.prefill = Bench(Role.PREFILL, self.settings)
        self.verify = Bench(Role.VERIFY, self.settings)
        self.draft = Bench(Role.DRAFT, self.settings, self.draft_engine)
        self.replies: list[DraftReply] = []  # drafted, not yet delivered

    @property
    def benches(self) -> tuple[Bench, Bench, Bench]:
        return self.prefill, self.verify, self.draft

    @property
    def stream(self) -> ManualDraftStream:
        return self.verify.streams[-1]

    def start_prefill(self, request_id: str) -> bool:
        """Pass a granted lease on, as a router does; False if nothing has to be sent."""
        request = self.verify.verify._requests[request_id].request
        lease = self.verify.granted(request_id).lease
        if lease.first_block == lease.end_block:
            return False
        self.prefill.send(Prefill(request, lease))
        return True

    def carry_kv(self, most: int = 10**9) -> int:
        """Deliver up to so many messages of the link; returns how many."""
        return carry_kv(self.prefill, self.verify, most)

    def break_link(self) -> None:
        """Both ends learn of it."""
        break_link(self.prefill, self.verify)

    def carry_calls(self) -> None:
        """Deliver the verify worker's calls and let the draft worker finish them; the replies wait in `replies`."""
        for stream in self.verify.streams:
            for call in stream.calls:
                self.draft.draft.on_call(1, call, self.replies.append)
            stream.calls.clear()
        self.draft.drain()

    def carry_replies(self) -> None:
        replies, self.replies = self.replies, []
        for reply in replies:
            self.verify.verify.on_drafts(self.draft.me, reply, self.verify.clock.now)

    def drafted(self) -> None:
        """A whole round of drafting, in time."""
        self.carry_calls()
        self.carry_replies()

    def cancel_all(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self.prefill.send(Cancel(request_id))
            self.verify.send(Cancel(request_id))
        for bench in (self.prefill, self.verify):
            bench.turn()

    def assert_empty(self) -> None:
        self.carry_calls()
        for bench in self.benches:
            bench.assert_empty()


def half_right(settings: Settings, role: Role) -> Engine:
    """Agrees with the emulated target on two tokens of three."""
    return EmulatedEngine(settings.engine, VOCABULARY, agreement=2 / 3)
