"""The controller: watches the workers, tells the routers who is there, and moves workers between roles.

One round:
  1 workers   who is there, and what each says of itself          -> the routers
  2 picture   what the routers saw of requests and workers
  3 decide    rebalancing -> changes of role, levelling -> moves of requests; each in the background
  4 tidy      switches that ended; workers that have drained and may go

It holds nothing that cannot be asked for again, so it may die and be restarted at any time: requests go on without it.
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Mapping
from itertools import chain
from typing import Any

import ray
from ray.exceptions import RayError

from cluster.discovery import Targets
from cluster.policy.levelling import LevellingConfig, level
from cluster.policy.scaling import UNKNOWN, Plan, Staff, plan
from cluster.pools import (
    CONTROLLER,
    Pools,
    WorkerReport,
    describe_workers,
    find,
    first_role,
    here,
    worker_names,
)
from cluster.routers import Routers
from cluster.steering import Steering, describe_decisions
from cluster.telemetry import holders, merge
from tidemill.core.channels import NodeChannels
from tidemill.core.exposition import MetricsServer
from tidemill.core.metrics import CONTROLLER_SERIES, Metrics
from tidemill.core.model import Decision, Member, Role
from tidemill.core.settings import Settings
from tidemill.core.telemetry import Decoding, RouterTelemetry

log = logging.getLogger(__name__)

ROUND_TIMEOUT_S = 5.0
SILENT_ROUNDS = 6  # a worker that says nothing for so many rounds is no member until it speaks again
SHOWN_DECISIONS = 12  # on the status page and in `tidemill top`


class Membership:
    """Pure: from what workers say, round by round, to who is a member."""

    def __init__(self) -> None:
        self._members: dict[str, Member] = {}
        self._silent: dict[str, int] = {}

    def update(self, reports: Mapping[str, WorkerReport | None]) -> tuple[Member, ...]:
        """One that is busy or stopped for a moment stays; one that restarted is replaced by its new incarnation; one
        that is not there any more goes at once.
        """
        for name in [each for each in self._silent if each not in reports]:
            self._members.pop(name, None)
            del self._silent[name]
        for name, report in reports.items():
            if report is not None:
                self._members[name] = Member(report.peer, report.role)
                self._silent[name] = 0
            else:
                self._silent[name] = self._silent.get(name, 0) + 1
                if self._silent[name] >= SILENT_ROUNDS:
                    self._members.pop(name, None)
        return tuple(self._members.values())


class ControllerActor:
    """Runs for as long as the cluster does, on a thread that begins again when Ray restarts the actor."""

    def __init__(self, settings: Settings) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        self._settings = settings
        self._membership = Membership()
        self._targets = Targets(settings)
        self._heads: dict[str, str] = {}  # routers and controller, and where their metrics are
        self._published: tuple[Member, ...] = ()
        self._routers = Routers()
        self._reports: dict[str, WorkerReport | None] = {}
        self._metrics = Metrics(CONTROLLER_SERIES)
        self._steering = Steering(settings, self._metrics)
        self._switching: dict[str, Any] = {}  # worker -> its answer, to come
        where = settings.metrics
        context = NodeChannels(settings.network.tls).metrics_context
        server = MetricsServer(self._metrics.text, where.host, where.controller_port, context)
        self._metrics_address = f"{where.host}:{server.port}"
        self._scaling = threading.Lock()  # one at a time: each counts what the one before it started
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="controller", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._round()
            except (RayError, ValueError) as error:
                log.warning("a round was cut short: %s", error)
            except Exception:
                log.exception("a round failed")
            self._stopping.wait(self._settings.controller.period_s)

    def _round(self) -> None:
        self._reports = describe_workers(worker_names())
        self._routers.look()
        self._publish()
        self._list_targets()
        self._settle()
        pictures: dict[str, RouterTelemetry] = self._routers.ask("telemetry")
        if pictures:
            picture = merge(list(pictures.values()))
            self._steer(picture)
            if self._settings.controller.level:
                self._level(picture)
        for name, report in self._reports.items():
            if report is not None and report.retired:
                log.info("%s has drained and goes", name)
                _end(name)

    def _list_targets(self) -> None:
        """For Prometheus. A router that says nothing for a moment keeps its place, as workers do."""
        described = self._routers.ask("describe") if self._settings.metrics.targets_file else {}
        said = {name: str(each["metrics_address"]) for name, each in described.items()}
        known = {name: said.get(name, self._heads.get(name, "")) for name in self._routers.names}
        self._heads = known | {CONTROLLER: self._metrics_address}
        self._targets.refresh(self._heads, self._reports)

    def _publish(self) -> None:
        """Each round, changed or not: a router that was restarted knows nobody."""
        members = self._membership.update(self._reports)
        if members != self._published:
            log.info("members: %s", ", ".join(f"{member.peer.id} {member.role}" for member in members))
            self._published = members
        self._routers.ask("set_members", members)

    def _steer(self, picture: RouterTelemetry) -> None:
        said = {name: report.becoming for name, report in self._reports.items() if report is not None}
        becoming = {name: role for name, role in said.items() if role is not None}
        for change in self._steering.decide(picture, time.monotonic(), time.time(), becoming):
            self._switching[change.worker] = find(change.worker).set_role.remote(str(change.to))
        self._routers.ask("set_decisions", tuple(self._steering.recent)[-SHOWN_DECISIONS:])

    def _level(self, picture: RouterTelemetry) -> None:
        """The routers move the requests, and say in their metrics what became of it."""
        held: dict[str, list[Decoding]] = self._routers.ask("held")
        decision = level(holders(picture.workers, chain.from_iterable(held.values())), LevellingConfig())
        if not decision.choice:
            return
        log.info("levelling: %s, %s", decision.reason, ", ".join(map(str, decision.choice)))
        serves = {each.request_id: router for router, theirs in held.items() for each in theirs}
        at = {each.worker.name: each.worker for each in picture.workers}
        for move in decision.choice:
            self._routers.tell(serves[move.request_id], "level", move.request_id, at[move.destination])

    def _settle(self) -> None:
        now = time.monotonic()
        answers = list(self._switching.values())
        done, _ = ray.wait(answers, num_returns=len(answers), timeout=0) if answers else ([], [])
        for worker, reference in list(self._switching.items()):
            if reference in done:
                del self._switching[worker]
                self._steering.ended(worker, _error_of(reference), now)
        for worker in self._steering.overdue(now):
            del self._switching[worker]
            self._steering.ended(worker, "it took too long", now)

    # --- asked from outside -------------------------------------------------------------------------------------

    def stop(self) -> None:
        """What others are told of the cluster ends with it."""
        self._stopping.set()
        self._thread.join(ROUND_TIMEOUT_S)
        self._targets.remove()

    def reports(self) -> dict[str, WorkerReport | None]:
        """Of the last round."""
        return self._reports

    def describe(self) -> dict[str, Any]:
        """For `tidemill status`."""
        return {
            "metrics_address": self._metrics_address,
            "pid": os.getpid(),
            "rebalance": self._settings.controller.rebalance,
            "switching": {name: str(each.change.to) for name, each in self._steering.under_way.items()},
            "decisions": describe_decisions(self._steering.recent),
        }

    def scale(self, wanted: Mapping[str, int]) -> Decision[Plan]:
        """Start workers, and tell others to drain and go; returns at once, with who does what."""
        with self._scaling:
            return self._scale(wanted)

    def _scale(self, wanted: Mapping[str, int]) -> Decision[Plan]:
        workers = [staff_of(name, report) for name, report in sorted(describe_workers(worker_names()).items())]
        decision = plan(workers, {Role(role): count for role, count in wanted.items()})
        chosen = decision.choice
        log.info("scale %s: %s, start %s, leave %s", dict(wanted), decision.reason, chosen.start, chosen.leave)
        pools = Pools(self._settings)
        pools.request_room(len([each for each in workers if not each.leaving]) + len(chosen.start) - len(chosen.leave))
        for name, role in chosen.start:
            pools.start_worker(name, role)
        for name in chosen.leave:
            find(name).retire.remote()
        return decision


def staff_of(name: str, report: WorkerReport | None) -> Staff:
    """Who says nothing is being started, or restarted, in its first role, and then has to be counted too."""
    if report is None:
        return Staff(name, first_role(name), UNKNOWN)
    return Staff(name, report.becoming or report.role, report.residual, report.leaving)


def _error_of(reference: Any) -> str | None:
    try:
        ray.get(reference)
    except RayError as error:
        lines = [line for line in str(error).strip().splitlines() if line.strip()]
        return lines[-1].strip() if lines else type(error).__name__
    return None


def _end(name: str) -> None:
    with contextlib.suppress(ValueError, RayError):
        ray.kill(find(name), no_restart=True)


def start_controller(settings: Settings) -> None:
    """Make the controller's actor; Ray restarts it with the same arguments if it dies."""
    actor = ray.remote(ControllerActor)
    actor.options(
        name=CONTROLLER, lifetime="detached", num_cpus=0, max_restarts=-1, max_concurrency=8, scheduling_strategy=here()
    ).remote(settings)
