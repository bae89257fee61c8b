"""Workers on a virtual clock: their own roles around emulated engines, whose steps take what the latency model says.

What happens is what would happen on machines where nothing but steps and messages takes time, and the same each time.
"""

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tidemill.core.messages import DraftCall, DraftReply, Event, Submit
from tidemill.core.metrics import WORKER_SERIES, Metrics
from tidemill.core.model import Peer, Request, Role, WorkerId
from tidemill.core.settings import Settings
from workers.engine.emulated import EmulatedEngine
from workers.engine.latency import latency_model
from workers.kv.link import Feeder, NotSent, Sent
from workers.loop import STALL_S
from workers.roles.base import WorkerRole
from workers.roles.draft import DraftRole
from workers.roles.verify import VerifyRole
from workers.speculation.pool import DrafterPool
from workers.speculation.step_time import StepTimes
from workers.speculation.warm_up import measure_steps

NEVER = float("inf")
DRAFTER = Peer(WorkerId("draft-0", 1), "draft-0")
Emit = Callable[[Event, float], None]


class _Clock:
    """A worker's own time: it sleeps through its steps."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class _Worker:
    """A worker's loop (workers/loop.py) in a time of its own: mail, a step if it is time for one."""

    def __init__(self, engine: EmulatedEngine, clock: _Clock, turn_s: float) -> None:
        self.engine = engine
        self.clock = clock
        self.role: WorkerRole
        self._turn_s = turn_s
        self._mail: list[tuple[float, int, Callable[[float], None]]] = []
        self._numbers = itertools.count()
        self._rest_until = 0.0

    def post(self, at: float, call: Callable[[float], None]) -> None:
        heapq.heappush(self._mail, (at, next(self._numbers), call))

    @property
    def next_at(self) -> float:
        now = self.clock.now
        step_at = self.role.next_step_at(now)
        step_at = NEVER if step_at is None else max(step_at, self._rest_until)
        return max(min(step_at, self._mail[0][0] if self._mail else NEVER), now)

    def turn(self, now: float) -> None:
        self.clock.now = now
        while self._mail and self._mail[0][0] <= now:
            heapq.heappop(self._mail)[2](now)
            self._rest_until = 0.0
        self.role.poll(now)
        step_at = self.role.next_step_at(now)
        if step_at is not None and max(step_at, self._rest_until) <= now:
            self.role.before_step(now)
            output = self.engine.step()
            if output.batch_tokens or output.progress:
                self.clock.now += self._turn_s
            else:
                self._rest_until = now + STALL_S
            self.role.after_step(output, self.clock.now)


@dataclass
class _Outbox:
    """Hands a verify worker's events on, with the time of the step that made them."""

    clock: _Clock
    told: Emit

    def emit(self, event: Event) -> None:
        self.told(event, self.clock.now)

    def forget(self, request_id: str) -> None:
        """Nothing is remembered."""


class _Stream:
    """From the verify worker to the draft worker and back, `link_s` each way."""

    def __init__(self, verify: _Worker, draft: _Worker, link_s: float) -> None:
        self._verify, self._draft, self._link_s = verify, draft, link_s

    def send(self, call: DraftCall) -> None:
        role = self._draft.role
        assert isinstance(role, DraftRole)
        self._draft.post(self._verify.clock.now + self._link_s, lambda _: role.on_call(0, call, self._reply))

    def _reply(self, reply: DraftReply) -> None:
        role = self._verify.role
        assert isinstance(role, VerifyRole)
        came_at = self._draft.clock.now + self._link_s
        self._verify.post(came_at, lambda _: role.on_drafts(DRAFTER, reply, came_at))

    def close(self) -> None:
        """Nobody waits for it."""


def _no_link(peer: Peer, sent: Sent, not_sent: NotSent) -> Feeder:
    raise AssertionError(f"nothing moves to {peer}: there is one verify worker")


class VirtualPair:
    """A verify worker and its draft worker."""

    def __init__(self, settings: Settings, told: Emit, *, link_s: float = 0.5e-3, turn_s: float = 0.5e-3) -> None:
        """`turn_s`: what a turn of a worker's loop takes beside the step."""
        torch.set_num_threads(1)
        self.metrics = Metrics(WORKER_SERIES)
        self.verify = self._worker(settings, Role.VERIFY, turn_s)
        self.draft = self._worker(settings, Role.DRAFT, turn_s / 2)
        self.times = StepTimes()
        if settings.speculation.enabled and settings.speculation.adaptive:
            measure_steps(self.verify.engine, self.times, settings.engine.max_running)
        self.verify.clock.now = 0.0
        pool = DrafterPool(settings.speculation.wait_s, lambda _: _Stream(self.verify, self.draft, link_s))
        outbox = _Outbox(self.verify.clock, told)
        self.verify.role = VerifyRole(
            self.verify.engine,
            outbox,
            settings,
            self.metrics,
            Peer(WorkerId("verify-0", 1), ""),
            pool,
            self.times,
            _no_link,
            lambda call: self.verify.post(self.verify.clock.now, lambda _: call()),
        )
        self.draft.role = DraftRole(self.draft.engine, _Outbox(self.draft.clock, told), settings)

    @staticmethod
    def _worker(settings: Settings, role: Role, turn_s: float) -> _Worker:
        emulated, clock, drafts = settings.emulated, _Clock(), role is Role.DRAFT
        engine = EmulatedEngine(
            settings.engine,
            emulated.vocab_size or 512,
            emulated.context_length or 4096,
            agreement=emulated.agreement if drafts else 1.0,
            latency=latency_model(emulated.draft if drafts else emulated.target),
            clock=clock,
            sleep=clock.sleep,
        )
        return _Worker(engine, clock, turn_s)

    def submit(self, at: float, request: Request) -> None:
        self.verify.post(at, lambda now: self.verify.role.handle(Submit(request, DRAFTER), now))

    def run(self, until: float = NEVER) -> None:
        """Whoever is first to have something to do does it, until nobody has, or time is up."""
        while True:
            worker = min((self.verify, self.draft), key=lambda each: each.next_at)
            now = worker.next_at
            if now >= until:
                return
            worker.turn(now)
