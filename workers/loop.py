"""The engine's thread: what comes in, a step, what goes out; and the changes of role between steps.

One turn:
  1 mailbox   commands, KV, drafts and ends of streams, each a call
  2 poll      deadlines
  3 step      if it is time for one, and what the role makes of its outcome
  4 switch    a change of role, if one is due
  5 publish   at most one message to each router
"""

import logging
import threading
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from tidemill.core import metrics
from tidemill.core.clock import Clock, new_epoch
from tidemill.core.lifecycle import WORKER_MOVES, Lifecycle, WorkerState
from tidemill.core.messages import (
    Cancel,
    Command,
    Failed,
    Failure,
    Migrate,
    NewWork,
    Prefill,
    Proceed,
    Refusal,
    Refused,
    Released,
    Reserve,
    Resume,
    StepReport,
    Submit,
)
from tidemill.core.metrics import Metrics
from tidemill.core.model import Request, Role, WorkerId, WorkerLoad
from workers.engine.base import Engine, StepOutput
from workers.engines import Engines
from workers.mailbox import Mailbox
from workers.reports import HEARTBEAT_S, Reports, Standing
from workers.role_switch import Move, RoleSwitch, load_beside
from workers.roles.base import Outbox, WorkerRole

log = logging.getLogger(__name__)

STALL_S = 0.005  # after a step that could advance nothing, until something comes
PROBE_S = 1.0  # between attempts to prove that an engine whose step raised works again
GAUGE_S = 0.1


class Roles(Protocol):
    """Makes and ends roles; what is outside of the engine's thread belongs to it."""

    def make(self, role: Role, engine: Engine, me: WorkerId, outbox: Outbox) -> WorkerRole: ...

    def leave(self) -> None:
        """Links made under the epoch that ends are cut."""
        ...


SendReport = Callable[[int, StepReport], None]


class EngineLoop:
    """See the module. Other threads call what is grouped as theirs, and leave calls of the rest in the mailbox."""

    def __init__(
        self,
        name: str,
        role: Role,
        engines: Engines,
        roles: Roles,
        mailbox: Mailbox,
        send: SendReport,
        metrics: Metrics,
        clock: Clock,
    ) -> None:
        self._name = name
        self._engines = engines
        self._roles = roles
        self._mailbox = mailbox
        self._send = send
        self._metrics = metrics
        self._clock = clock
        self._reports = Reports(metrics)
        self._lifecycle = Lifecycle(WorkerState.STARTING, WORKER_MOVES)
        self._switch: RoleSwitch | None = None
        self._rest_until = 0.0  # no step before that unless something comes: the last one could do nothing
        self._probe_at: float | None = None  # the engine's step raised, and no probe has passed since
        self._gauge_at = 0.0
        self._busy_s = 0.0  # in steps, since the worker began
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"engine-{name}", daemon=True)
        self._standing: Standing
        self._become(role, new_epoch())
        self._lifecycle.move(WorkerState.SERVING)
        self._take_stock()

    # --- from other threads -------------------------------------------------------------------------------------

    @property
    def standing(self) -> Standing:
        """As of the end of the last turn."""
        return self._standing

    @property
    def becoming(self) -> Role | None:
        """The role that a switch under way will give it; None if there is none, or if the worker leaves."""
        switch = self._switch
        return switch.to if switch is not None else None

    @property
    def engine_kind(self) -> str:
        return self._engine.info.kind

    def start(self) -> None:
        self._thread.start()

    def stop(self, patience_s: float) -> None:
        """Give up what runs, tell the routers, end the thread."""
        self._stopping.set()
        self._mailbox.deliver(lambda: None)
        self._thread.join(patience_s)

    @property
    def stopping(self) -> bool:
        return self._stopping.is_set()

    # --- turns --------------------------------------------------------------------------------------------------

    @property
    def role(self) -> WorkerRole:
        return self._role

    @property
    def engine(self) -> Engine:
        return self._engine

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._mailbox.run(self.wait_s(self._clock.monotonic()))
                self.turn(self._clock.monotonic())
            except Exception:  # an engine that cannot even count its blocks; the thread must not end silently
                log.exception("a turn of %s failed", self._standing.worker)
                self._stopping.wait(PROBE_S)
        self.end()

    def wait_s(self, now: float) -> float:
        """How long the mailbox may stay empty before something is due."""
        step_at = self._role.next_step_at(now)
        due = [
            now + HEARTBEAT_S,
            self._role.next_poll_at(),
            None if step_at is None else max(step_at, self._rest_until),
            None if self._switch is None else self._switch.deadline,
            self._probe_at,
        ]
        return max(min(at for at in due if at is not None) - now, 0.0)

    def turn(self, now: float) -> None:
        """Everything after the mailbox. What a step or a role raises costs the requests, not the worker."""
        try:
            self._role.poll(now)
            step_at = self._role.next_step_at(now)
            if step_at is not None and step_at <= now:
                self._step(now)
            if self._switch is not None:
                self._advance_switch(self._switch, now)
        except Exception as error:
            self._engine_failed(error, now)
        self._probe_if_due(now)
        self._publish(self._clock.monotonic())

    def _step(self, now: float) -> None:
        self._role.before_step(now)
        output = self._engine.step()
        if output.batch_tokens or output.progress:
            now = self._clock.monotonic()
        else:
            self._rest_until = now + STALL_S
        self._count(output)
        self._role.after_step(output, now)

    def _count(self, output: StepOutput) -> None:
        role = self._role.role
        if output.preempted:
            self._metrics.add(metrics.PREEMPTIONS, len(output.preempted), role=role)
        self._busy_s += output.seconds
        if output.batch_tokens:
            self._metrics.add(metrics.STEPS, role=role)
            self._metrics.observe(metrics.STEP_TIME, output.seconds, role=role)
            self._metrics.observe(metrics.STEP_TOKENS, output.batch_tokens, role=role)

    def _engine_failed(self, error: Exception, now: float) -> None:
        """Every request is given up and released; new ones are taken once a probe has passed."""
        log.exception("the engine of %s failed", self._standing.worker)
        detail = traceback.format_exception_only(error)[-1].strip()[:200]
        self._role.give_up(Failure.ENGINE, detail)
        self._probe_at = now

    def _probe_if_due(self, now: float) -> None:
        if self._probe_at is None or now < self._probe_at:
            return
        try:
            self._role.probe()
            self._probe_at = None
        except Exception:
            log.exception("the engine of %s does not work; next try in %s s", self._standing.worker, PROBE_S)
            self._probe_at = now + PROBE_S

    # --- routers ------------------------------------------------------------------------------------------------

    def attach(self, router: int) -> None:
        self._reports.attach(router)

    def detach(self, router: int) -> None:
        """A router's stream ended. What it had asked for is released at once."""
        for request_id in self._reports.detach(router):
            self._role.cancel(request_id)
            self._reports.forget(request_id)

    def handle(self, router: int, command: Command) -> None:
        """A router's command; what is wrong with it is answered, but for requests that are unknown, or another's."""
        match command:
            case Reserve(request) | Submit(request) | Prefill(request):
                self._take_new(router, command, request)
            case Cancel(request_id):
                owner = self._reports.owner(request_id)
                if owner == router:
                    self._role.cancel(request_id)
                if owner in {router, None}:
                    self._reports.tell(router, Released(request_id))
            case Proceed(request_id) | Migrate(request_id) | Resume(request_id):
                if self._reports.owner(request_id) == router:
                    self._take(command, request_id)

    def _take_new(self, router: int, command: NewWork, request: Request) -> None:
        if not self._accepts:
            self._reports.tell(router, Refused(request.id, Refusal.DRAINING))
        elif max(request.tokens, default=0) >= self._engine.info.vocab_size:
            self._reports.tell(router, Failed(request.id, Failure.ENGINE, "a token is outside the model's vocabulary"))
        elif not self._reports.take(request.id, router):
            self._reports.tell(router, Failed(request.id, Failure.ENGINE, "this request is here already"))
        else:
            self._take(command, request.id)

    def _take(self, command: Command, request_id: str) -> None:
        try:
            self._role.handle(command, self._clock.monotonic())
        except Exception as error:
            log.exception("request %s could not be taken", request_id)
            self._reports.emit(Failed(request_id, Failure.ENGINE, repr(error)[:200]))
            self._role.cancel(request_id)
            self._reports.forget(request_id)

    @property
    def holds_nothing(self) -> bool:
        """No request at any stage, no block and no lease; for tests and for whoever drains a worker."""
        load = self._engine.load()
        return self._role.idle and self._reports.idle and not (load.kv_blocks_used or load.kv_blocks_leased)

    # --- what others see ----------------------------------------------------------------------------------------

    @property
    def _accepts(self) -> bool:
        serving = self._lifecycle.state is WorkerState.SERVING and not self._stopping.is_set()
        return serving and self._probe_at is None

    def _take_stock(self) -> None:
        load = replace(self._engine.load(), busy_s=self._busy_s)
        self._standing = Standing(self._standing.worker, self._role.role, self._accepts, load)

    def _publish(self, now: float) -> None:
        self._take_stock()
        for router, report in self._reports.collect(self._standing, now):
            self._send(router, report)
        if now >= self._gauge_at:
            self._gauge_at = now + GAUGE_S
            self._gauge(self._standing.load)

    def _gauge(self, load: WorkerLoad) -> None:
        role = self._role.role
        for each in Role:
            self._metrics.set(metrics.WORKER_ROLE, each is role, role=each)
        self._metrics.set(metrics.WORKER_QUEUED, load.queued_requests, role=role)
        self._metrics.set(metrics.WORKER_RUNNING, load.running_requests, role=role)
        self._metrics.set(metrics.KV_BLOCKS, load.kv_blocks_total, role=role)
        self._metrics.set(metrics.KV_BLOCKS_USED, load.kv_blocks_used, role=role)
        self._metrics.set(metrics.KV_BLOCKS_LEASED, load.kv_blocks_leased, role=role)

    # --- change of role, and end --------------------------------------------------------------------------------

    def begin_switch(self, switch: RoleSwitch) -> None:
        if self._switch is not None or self._lifecycle.state is not WorkerState.SERVING or self.stopping:
            switch.done.set_exception(RuntimeError(f"{self._standing.worker} is changing its role, or stopping"))
        elif switch.to is self._role.role:
            switch.done.set_result(None)
        else:
            self._switch = switch
            load_beside(switch, self._engines, self._mailbox.deliver)

    def _advance_switch(self, switch: RoleSwitch, now: float) -> None:
        match switch.next_move(now, idle=self._role.idle):
            case Move.DRAIN:
                self._lifecycle.move(WorkerState.DRAINING)
                self._role.drain()
                switch.drain(now)
                self._advance_switch(switch, now)
            case Move.ABANDON:
                self._switch = None
                switch.done.set_exception(switch.error or RuntimeError("the engine was not loaded"))
            case Move.SWITCH:
                self._switch = None
                self._carry_out(switch)
            case Move.WAIT:
                pass

    def _carry_out(self, switch: RoleSwitch) -> None:
        """What is left is given up under the old epoch; the new one is published with the next report. Who leaves takes
        no more, and waits to be stopped.
        """
        me, before = self._standing.worker, self._role.role
        if switch.to is None:
            self._role.give_up(Failure.STOPPING, f"{me} leaves")
            self._publish(self._clock.monotonic())
            switch.done.set_result(None)
            return
        self._role.give_up(Failure.ROLE_CHANGED, f"{me} becomes a {switch.to} worker")
        self._publish(self._clock.monotonic())
        self._lifecycle.move(WorkerState.SWITCHING)
        self._leave_role()
        error: Exception | None = None
        try:
            self._become(switch.to, max(new_epoch(), me.epoch + 1))
            self._role.probe()
        except Exception as raised:
            log.exception("%s could not become a %s worker and stays %s", me, switch.to, before)
            error = raised
            self._leave_role()
            self._become(before, self._standing.worker.epoch + 1)
        self._lifecycle.move(WorkerState.SERVING)
        self._take_stock()
        if error is None:
            switch.done.set_result(None)
        else:
            switch.done.set_exception(error)

    def _leave_role(self) -> None:
        self._role.close()
        self._roles.leave()
        self._gauge(WorkerLoad())

    def _become(self, role: Role, epoch: int) -> None:
        self._engine = self._engines.of(role)
        me = WorkerId(self._name, epoch)
        self._role = self._roles.make(role, self._engine, me, self._reports)
        self._standing = Standing(me, role, False, self._engine.load())

    def end(self) -> None:
        """The last thing that happens on the thread."""
        self._mailbox.run(0.0)
        self._role.give_up(Failure.STOPPING, f"{self._standing.worker} is stopping")
        self._publish(self._clock.monotonic())
        self._leave_role()
        self._lifecycle.move(WorkerState.STOPPED)
        if self._switch is not None:
            self._switch.done.set_exception(RuntimeError(f"{self._standing.worker} is stopping"))
