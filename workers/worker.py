"""A worker: one engine thread, a control service, and the role that says what a step means.

    routers, verify workers ──gRPC──> service ──mailbox──> engine thread: role.handle, engine.step, role.after_step
    workers with KV for it ──KV links───────────^               └──> one StepReport per router and turn

Everything that touches the engine runs on its one thread, as a call from the mailbox or as a part of a step.
"""

import logging
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

import torch

from tidemill.core.channels import NodeChannels
from tidemill.core.clock import SystemClock
from tidemill.core.exposition import MetricsServer
from tidemill.core.messages import Command, DraftCall, DraftReply
from tidemill.core.metrics import WORKER_SERIES, Metrics
from tidemill.core.model import Peer, Role, WorkerId, WorkerLoad
from tidemill.core.settings import Settings
from workers.engine.base import Engine
from workers.engines import EngineFactory, Engines, make_engine
from workers.kv.link import Arrival, NotSent, Outgoing, Sent
from workers.kv.torch_dist import LinkHost
from workers.loop import EngineLoop
from workers.mailbox import Mailbox
from workers.peers import link_opener
from workers.role_switch import RoleSwitch
from workers.roles.base import Outbox, WorkerRole
from workers.roles.draft import DraftRole
from workers.roles.prefill import PrefillRole
from workers.roles.verify import VerifyRole
from workers.service import ControlService
from workers.speculation.pool import DrafterPool
from workers.speculation.step_time import StepTimes
from workers.speculation.warm_up import measure_steps

log = logging.getLogger(__name__)

Result = TypeVar("Result")
JOIN_S = 1.0  # for a link that is being closed
SWITCH_INTERVAL_S = 0.0005  # the service's thread must not wait long for the engine's Python code


@dataclass(frozen=True, slots=True)
class Description:
    """What a worker says of itself: to Describe, to tests, to whoever wraps it."""

    peer: Peer
    role: Role
    accepting: bool
    load: WorkerLoad
    metrics_address: str
    model: str
    engine: str
    becoming: Role | None  # the role it is on its way to


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
        self._name = name
        self._first_role = role
        self._settings = settings
        self._host = host
        self._engines = Engines(settings, engine_factory)
        self._step_times = StepTimes()  # of the target's engine
        engine = self._engines.of(role)
        if role is not Role.DRAFT and settings.speculation.enabled and settings.speculation.adaptive:
            at_once = min(settings.engine.max_running, settings.engine.max_batch_tokens)
            measure_steps(engine, self._step_times, at_once)
        self.metrics = Metrics(WORKER_SERIES)
        if engine.info.kind == "vllm":
            self.metrics.pass_through("vllm:")
        self._mailbox = Mailbox()
        self._channels = NodeChannels(settings.network.tls)
        self._service = ControlService(self, host, self._channels)
        self._links: LinkHost | None = None  # made with the first verify role
        self._feeders: list[Outgoing] = []  # the roles', which close them; waited for at the end
        self._address = ""
        self._running = False

    # --- life ---------------------------------------------------------------------------------------------------

    def start(self) -> Peer:
        """Listen, serve, and say where. Raises OSError if no port can be had."""
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self._metrics_server = MetricsServer(
            self.metrics.text, self._host, self._settings.metrics.worker_port, self._channels.metrics_context
        )
        self._address = self._service.start()
        self._loop = EngineLoop(
            self._name,
            self._first_role,
            self._engines,
            self,
            self._mailbox,
            self._service.send_report,
            self.metrics,
            SystemClock(),
        )
        self._loop.start()
        self._running = True
        log.info("worker %s serves %s at %s", self.peer.id, self._first_role, self._address)
        return self.peer

    def stop(self) -> None:
        """Give up what runs, tell the routers, close everything, end the threads. Nothing happens if not running."""
        if not self._running:
            return
        self._running = False
        self._loop.stop(self._settings.deadlines.drain_s)
        self._service.stop()
        if self._links is not None:
            self._links.close()
        for feeder in self._feeders:
            feeder.join(JOIN_S)
        self._metrics_server.stop()

    @property
    def peer(self) -> Peer:
        return Peer(self._loop.standing.worker, self._address)

    @property
    def role(self) -> Role:
        return self._loop.standing.role

    @property
    def metrics_address(self) -> str:
        return f"{self._host}:{self._metrics_server.port}"

    def describe(self) -> Description:
        """From any thread; as of the end of the last turn."""
        standing = self._loop.standing
        model = self._settings.draft if standing.role is Role.DRAFT else self._settings.target
        return Description(
            Peer(standing.worker, self._address),
            standing.role,
            standing.accepting,
            standing.load,
            self.metrics_address,
            model.served_name if model else "",
            self._loop.engine_kind,
            self._loop.becoming,
        )

    def set_role(self, role: Role, drain_s: float | None = None) -> "Future[None]":
        """Load, drain, switch, prove, publish under a new epoch. If that fails the future raises why, and the old role
        goes on. `drain_s`: how long running requests may go on before they are given up."""
        return self._switch(role, drain_s)

    def retire(self, drain_s: float | None = None) -> "Future[None]":
        """Take no more; done when what runs has ended or was given up. It is then to be stopped."""
        return self._switch(None, drain_s)

    def _switch(self, role: Role | None, drain_s: float | None) -> "Future[None]":
        switch = RoleSwitch(role, self._settings.deadlines.drain_s if drain_s is None else drain_s)
        if self._running:
            self._mailbox.deliver(lambda: self._loop.begin_switch(switch))
        else:
            switch.done.set_exception(RuntimeError(f"{self._name} is not running"))
        return switch.done

    def on_engine_thread(self, look: Callable[[EngineLoop], Result]) -> "Future[Result]":
        """Look at what belongs to the engine's thread, between two steps."""
        found: Future[Result] = Future()

        def run() -> None:
            try:
                found.set_result(look(self._loop))
            except BaseException as error:
                found.set_exception(error)

        self._mailbox.deliver(run)
        return found

    # --- workers.loop.Roles -------------------------------------------------------------------------------------

    def make(self, role: Role, engine: Engine, me: WorkerId, outbox: Outbox) -> WorkerRole:
        peer = Peer(me, self._address)
        if role is Role.DRAFT:
            return DraftRole(engine, outbox, self._settings)
        opener = link_opener(peer, self._host, engine.info.kv, self._channels, self._settings)

        def feed(to: Peer, sent: Sent, failed: NotSent) -> Outgoing:
            self._feeders = [each for each in self._feeders if not each.join(0.0)]
            self._feeders.append(Outgoing(to, sent, failed, opener))
            return self._feeders[-1]

        deliver = self._mailbox.deliver
        if role is Role.PREFILL:
            return PrefillRole(engine, outbox, self._settings, self.metrics, feed, deliver)
        if self._links is None:
            device, limits = torch.device(self._settings.engine.device), self._settings.deadlines
            self._links = LinkHost(self._host, engine.info.kv, device, limits.link_s, limits.stall_s, self._kv_came)
        drafters = DrafterPool(self._settings.speculation.wait_s, self._service.connect_drafter)
        return VerifyRole(engine, outbox, self._settings, self.metrics, peer, drafters, self._step_times, feed, deliver)

    def leave(self) -> None:
        if self._links is not None:
            self._links.cut()

    # --- from the service and the links: everything becomes a call on the engine's thread ------------------------

    def post_command(self, router: int, command: Command) -> None:
        """Raises MailboxFull."""
        self._mailbox.post(lambda: self._loop.handle(router, command))

    def router_attached(self, router: int) -> None:
        self._mailbox.deliver(lambda: self._loop.attach(router))

    def router_left(self, router: int) -> None:
        """May be said more than once."""
        self._mailbox.deliver(lambda: self._loop.detach(router))

    def post_draft_call(self, stream: int, call: DraftCall, reply: Callable[[DraftReply | None], None]) -> None:
        """`reply` is called once; with None if this is no draft worker, which ends the stream. Raises MailboxFull."""

        def run() -> None:
            role = self._loop.role
            if isinstance(role, DraftRole):
                role.on_call(stream, call, reply)
            else:
                reply(None)

        self._mailbox.post(run)

    def draft_stream_closed(self, stream: int) -> None:
        def run() -> None:
            role = self._loop.role
            if isinstance(role, DraftRole):
                role.stream_closed(stream)

        self._mailbox.deliver(run)

    def drafts_came(self, peer: Peer, reply: DraftReply) -> None:
        came_at = time.monotonic()  # a step may be under way; the draft worker is not late for that

        def run() -> None:
            role = self._loop.role
            if isinstance(role, VerifyRole):
                role.on_drafts(peer, reply, came_at)

        self._mailbox.deliver(run)

    def drafter_lost(self, peer: Peer, why: str) -> None:
        def run() -> None:
            role = self._loop.role
            if isinstance(role, VerifyRole):
                role.on_drafter_lost(peer, why)

        self._mailbox.deliver(run)

    def _kv_came(self, arrival: Arrival) -> None:
        def run() -> None:
            role = self._loop.role
            if isinstance(role, VerifyRole):
                role.on_kv(arrival, time.monotonic())
            else:
                arrival.done()

        self._mailbox.deliver(run)

    def accept_link(self, sender: Peer, receiver: WorkerId, layout: str) -> tuple[str, str]:
        """(rendezvous, group) for a worker that is about to send KV. Raises ValueError if it has the wrong one."""
        standing, links = self._loop.standing, self._links
        if receiver != standing.worker:
            raise ValueError(f"{receiver} is gone; this is {standing.worker}")
        if links is None or standing.role is not Role.VERIFY:
            raise ValueError(f"{standing.worker} is a {standing.role} worker and takes no KV")
        if layout != str(links.layout):
            raise ValueError(f"KV layouts differ: {layout} is offered, {links.layout} is used here")
        return links.rendezvous, links.accept(receiver, sender)
