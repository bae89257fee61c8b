"""A worker: one engine thread, a control service, and the role that says what a step means.

    routers, verify workers ──gRPC──> service ──mailbox──> engine thread: role.handle, engine.step, role.after_step
    prefill workers ──KV links──────────────────^               └──> one StepReport per router and turn

Everything that touches the engine runs on its one thread, as a call from the mailbox or as a part of a step.
"""

import contextlib
import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future

import torch
from prometheus_client import start_http_server

from tidemill.core import metrics
from tidemill.core.clock import new_epoch
from tidemill.core.lifecycle import WORKER_MOVES, Lifecycle, WorkerState
from tidemill.core.messages import (
    Cancel,
    Command,
    DraftCall,
    DraftReply,
    Event,
    Failed,
    Failure,
    Refusal,
    Refused,
    StepReport,
)
from tidemill.core.metrics import WORKER_SERIES, Metrics
from tidemill.core.model import Peer, Role, WorkerId, WorkerLoad
from tidemill.core.settings import Settings
from workers.engine.base import Engine, StepOutput
from workers.engines import make_engine
from workers.kv.link import Arrival
from workers.kv.torch_dist import LinkHost
from workers.mailbox import Mailbox
from workers.roles.base import WorkerRole
from workers.roles.draft import DraftRole
from workers.roles.prefill import PrefillRole
from workers.roles.verify import VerifyRole
from workers.service import ControlService
from workers.speculation.pool import DrafterPool

log = logging.getLogger(__name__)

HEARTBEAT_S = 0.5
EngineFactory = Callable[[Settings, Role], Engine]


class Worker:
    """Made by cluster/pools.py inside a Ray actor, or by a test in its own process."""

    def __init__(
        self,
        name: str,
        role: Role,
        settings: Settings,
        *,
        host: str = "127.0.0.1",
        engine_factory: EngineFactory = make_engine,
    ) -> None:
        """Loads the engine of its role; raises what the engine factory raises."""
        self._settings = settings
        self._host = host
        self._engine_factory = engine_factory
        self._engines: dict[bool, Engine] = {}  # by whether it is the draft model's
        self._engine = self._engine_of(role)
        self.metrics = Metrics(WORKER_SERIES)
        self._mailbox = Mailbox()
        self._lifecycle = Lifecycle(WorkerState.STARTING, WORKER_MOVES)
        self._service = ControlService(self, host)
        self._name = name
        self._address = ""
        self._epoch = new_epoch()
        self._first_role = role
        self._links: LinkHost | None = None  # made with the first verify role
        self._owners: dict[str, int] = {}  # request -> router stream
        self._events: dict[int, list[Event]] = {}  # router stream -> what it will hear at the end of this turn
        self._sequences: dict[int, int] = {}  # router stream -> reports sent
        self._switch: tuple[Role, float, Future[None]] | None = None
        self._last_report = 0.0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"engine-{name}", daemon=True)

    # --- life ---------------------------------------------------------------------------------------------------

    def start(self) -> Peer:
        """Listen, serve, and say where. Raises OSError if no port can be had."""
        sys.setswitchinterval(0.0005)  # the service's thread must not wait for the engine's Python code
        self._metrics_server, self._metrics_thread = start_http_server(0, self._host, self.metrics.registry)
        self._address = self._service.start()
        self._role = self._make_role(self._first_role)
        self._lifecycle.move(WorkerState.SERVING)
        self._thread.start()
        log.info("worker %s serves %s at %s", self.peer.id, self._first_role, self._address)
        return self.peer

    def stop(self) -> None:
        """Give up what runs, close everything, end the threads."""
        if self._lifecycle.state is WorkerState.STOPPED:
            return
        self._stopping.set()
        with contextlib.suppress(Exception):
            self._mailbox.post(lambda: None)
        self._thread.join(self._settings.deadlines.drain_s)
        self._service.stop()
        self._metrics_server.shutdown()
        self._metrics_server.server_close()
        self._lifecycle.move(WorkerState.STOPPED)

    @property
    def peer(self) -> Peer:
        return Peer(WorkerId(self._name, self._epoch), self._address)

    @property
    def role(self) -> Role:
        return self._role.role

    @property
    def accepting(self) -> bool:
        return self._lifecycle.state is WorkerState.SERVING

    @property
    def metrics_address(self) -> str:
        return f"{self._host}:{self._metrics_server.server_port}"

    @property
    def settings(self) -> Settings:
        return self._settings

    @property
    def engine_kind(self) -> str:
        return self._engine.info.kind

    def load(self) -> WorkerLoad:
        """Counts now; exact on the engine's thread, and close to it on others."""
        return self._engine.load()

    def _engine_of(self, role: Role) -> Engine:
        is_draft = role is Role.DRAFT
        if is_draft not in self._engines:
            self._engines[is_draft] = self._engine_factory(self._settings, role)
        return self._engines[is_draft]

    def _make_role(self, role: Role) -> WorkerRole:
        if role is Role.PREFILL:
            opener = self._service.link_opener(self.peer, self._engine.info.kv, self._settings)
            return PrefillRole(self._engine, self, self._settings, self.metrics, opener, self._mailbox.post)
        if role is Role.DRAFT:
            return DraftRole(self._engine, self, self._settings)
        if self._links is None:
            device, timeout_s = torch.device(self._settings.engine.device), self._settings.deadlines.link_s
            self._links = LinkHost(self._host, self._engine.info.kv, device, timeout_s, self._on_arrival)
        drafters = DrafterPool(self._settings.speculation, self._service.connect_drafter)
        return VerifyRole(self._engine, self, self._settings, self.metrics, self.peer, drafters)

    # --- from other threads: everything becomes a call on the engine's -------------------------------------------

    def post_command(self, router: int, command: Command) -> None:
        """Raises MailboxFull."""
        self._mailbox.post(lambda: self._handle(router, command))

    def post_router(self, router: int, *, attached: bool) -> None:
        """A router's stream opened or ended. What an ended one had asked for is released at once."""
        self._mailbox.post(lambda: self._attach(router) if attached else self._detach(router))

    def post_draft_call(self, stream: int, call: DraftCall, reply: Callable[[DraftReply], None]) -> None:
        def run() -> None:
            if isinstance(self._role, DraftRole):
                self._role.on_call(stream, call, reply)
            else:
                reply(DraftReply(call.round))

        self._mailbox.post(run)

    def post_draft_stream_closed(self, stream: int) -> None:
        self._mailbox.post(lambda: self._role.stream_closed(stream) if isinstance(self._role, DraftRole) else None)

    def post_drafts(self, peer: Peer, reply: DraftReply) -> None:
        self._mailbox.post(lambda: self._role.on_drafts(peer, reply) if isinstance(self._role, VerifyRole) else None)

    def post_drafter_lost(self, peer: Peer, why: str) -> None:
        self._mailbox.post(
            lambda: self._role.on_drafter_lost(peer, why) if isinstance(self._role, VerifyRole) else None
        )

    def _on_arrival(self, arrival: Arrival) -> None:
        def run() -> None:
            if isinstance(self._role, VerifyRole):
                self._role.on_kv(arrival, time.monotonic())

        self._mailbox.post_arrival(run)

    def accept_link(self, sender: Peer, receiver: WorkerId, layout: str) -> tuple[str, str]:
        """(rendezvous, group) for a prefill worker that is about to send. Raises ValueError if it has the wrong one."""
        if receiver != self.peer.id:
            raise ValueError(f"{receiver} is gone; this is {self.peer.id}")
        if self._links is None or self.role is not Role.VERIFY:
            raise ValueError(f"{self.peer.id} is a {self.role} worker and takes no KV")
        if layout != str(self._engine.info.kv):
            raise ValueError(f"KV layouts differ: {layout} is offered, {self._engine.info.kv} is used here")
        return self._links.rendezvous, self._links.accept(self.peer.id, sender)

    def set_role(self, role: Role, drain_s: float | None = None) -> "Future[None]":
        """Drain, switch, prove, publish under a new epoch. If that fails, so does the future; the old role goes on."""
        done: Future[None] = Future()
        deadline = time.monotonic() + (self._settings.deadlines.drain_s if drain_s is None else drain_s)

        def begin() -> None:
            if self._switch is not None or not self.accepting:
                done.set_exception(RuntimeError(f"{self.peer.id} is changing its role already"))
            elif role is self.role:
                done.set_result(None)
            else:
                self._lifecycle.move(WorkerState.DRAINING)
                self._switch = (role, deadline, done)

        self._mailbox.post(begin)
        return done

    # --- the engine's thread ------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stopping.is_set():
            now = time.monotonic()
            step_at = self._role.next_step_at(now)
            wait_s = HEARTBEAT_S if step_at is None else min(max(step_at - now, 0.0), HEARTBEAT_S)
            if self._switch is not None:
                wait_s = min(wait_s, 0.01)
            self._mailbox.run(wait_s)
            self._turn(time.monotonic())
        self._role.give_up(Failure.STOPPING, f"{self.peer.id} is stopping")
        self._report(time.monotonic())
        self._role.close()

    def _turn(self, now: float) -> None:
        """One turn: deadlines, a step if it is time, a role switch if one is due, the reports."""
        self._role.poll(now)
        step_at = self._role.next_step_at(now)
        if step_at is not None and step_at <= now and self._engine.has_work():
            self._step(now)
        if self._switch is not None:
            self._try_switch(*self._switch)
        self._report(now)

    def _step(self, now: float) -> None:
        self._role.before_step(now)
        try:
            output = self._engine.step()
        except Exception:
            log.exception("engine step failed on %s", self.peer.id)
            self._role.engine_failed(traceback.format_exc(limit=1).splitlines()[-1])
            return
        self._count(output)
        self._role.after_step(output, time.monotonic())

    def _count(self, output: StepOutput) -> None:
        role = self.role
        self.metrics.add(metrics.STEPS, role=role)
        self.metrics.observe(metrics.STEP_TIME, output.seconds, role=role)
        self.metrics.observe(metrics.STEP_TOKENS, output.batch_tokens, role=role)
        if output.preempted:
            self.metrics.add(metrics.PREEMPTIONS, len(output.preempted), role=role)

    def _handle(self, router: int, command: Command) -> None:
        if isinstance(command, Cancel):
            if self._owners.get(command.request_id) == router:
                self._role.cancel(command.request_id)
            return
        request_id = command.request.id
        if router not in self._events:
            return  # its stream ended meanwhile
        if request_id in self._owners:
            self._events[router].append(Failed(request_id, Failure.ENGINE, "this request is here already"))
        elif not self.accepting:
            self._events[router].append(Refused(request_id, Refusal.DRAINING))
        else:
            self._owners[request_id] = router
            self._role.handle(command, time.monotonic())

    def _attach(self, router: int) -> None:
        self._events[router] = []
        self._sequences[router] = 0
        self._last_report = 0.0  # a new router hears of the load at once

    def _detach(self, router: int) -> None:
        for request_id in [each for each, owner in self._owners.items() if owner == router]:
            self._role.cancel(request_id)
        self._events.pop(router, None)
        self._sequences.pop(router, None)

    # --- Outbox -------------------------------------------------------------------------------------------------

    def emit(self, event: Event) -> None:
        """See workers.roles.base.Outbox."""
        router = self._owners.get(event.request_id)
        if router in self._events:
            self._events[router].append(event)

    def forget(self, request_id: str) -> None:
        """See workers.roles.base.Outbox."""
        self._owners.pop(request_id, None)

    def _report(self, now: float) -> None:
        """At most one message to each router: its events and the load, or the load alone as a heartbeat."""
        heartbeat = now - self._last_report >= HEARTBEAT_S
        if not heartbeat and not any(self._events.values()):
            return
        load = self._engine.load()
        if heartbeat:
            self._last_report = now
            self._gauge(load)
        for router, events in self._events.items():
            if events or heartbeat:
                report = StepReport(
                    self.peer.id, self.role, self.accepting, self._sequences[router], load, tuple(events)
                )
                self._sequences[router] += 1
                self._events[router] = []
                self.metrics.add(metrics.REPORTS)
                self._service.send_report(router, report)

    def _gauge(self, load: WorkerLoad) -> None:
        role = self.role
        self.metrics.set(metrics.WORKER_QUEUED, load.queued_requests, role=role)
        self.metrics.set(metrics.WORKER_RUNNING, load.running_requests, role=role)
        self.metrics.set(metrics.KV_BLOCKS, load.kv_blocks_total, role=role)
        self.metrics.set(metrics.KV_BLOCKS_USED, load.kv_blocks_used, role=role)
        self.metrics.set(metrics.KV_BLOCKS_LEASED, load.kv_blocks_leased, role=role)

    # --- role switch --------------------------------------------------------------------------------------------

    def _try_switch(self, to: Role, deadline: float, done: "Future[None]") -> None:
        if not self._role.idle:
            if time.monotonic() < deadline:
                return
            self._role.give_up(Failure.ROLE_CHANGED, f"{self.peer.id} becomes a {to} worker")
        self._switch = None
        self._lifecycle.move(WorkerState.SWITCHING)
        before = self.role
        self._role.close()
        self._epoch = max(new_epoch(), self._epoch + 1)
        try:
            self._become(to)
            done.set_result(None)
        except Exception as error:
            log.exception("switching %s from %s to %s failed", self._name, before, to)
            self._become(before)
            done.set_exception(error)
        self._lifecycle.move(WorkerState.SERVING)
        self._last_report = 0.0

    def _become(self, role: Role) -> None:
        self._engine = self._engine_of(role)
        self._role = self._make_role(role)
        self._role.probe()
