"""The controller: watches the workers and tells the router who is there.

It holds nothing that cannot be asked for again, so it may die and be restarted at any time: requests go on without it.
"""

import logging
import threading
from collections.abc import Mapping, Sequence

import ray
from ray.exceptions import RayError

from cluster.discovery import Targets
from cluster.pools import CONTROLLER, ROUTER, WorkerReport, describe_workers, find, here
from tidemill.core.model import Member
from tidemill.core.settings import Settings

log = logging.getLogger(__name__)

PERIOD_S = 0.5
ROUND_TIMEOUT_S = 5.0
SILENT_ROUNDS = 6  # a worker that says nothing for so many rounds is no member until it speaks again


class Membership:
    """Pure: from what workers say, round by round, to who is a member."""

    def __init__(self) -> None:
        self._members: dict[str, Member] = {}
        self._silent: dict[str, int] = {}

    def update(self, reports: Mapping[str, WorkerReport | None]) -> tuple[Member, ...]:
        """One that is busy or stopped for a moment stays; one that restarted is replaced by its new incarnation."""
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

    def __init__(self, settings: Settings, workers: Sequence[str]) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        self._workers = list(workers)
        self._membership = Membership()
        self._targets = Targets(settings)
        self._router_metrics = ""
        self._published: tuple[Member, ...] = ()
        self._reports: dict[str, WorkerReport | None] = {}
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="controller", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._round()
            except (RayError, ValueError) as error:
                log.warning("the router cannot be reached: %s", error)
            self._stopping.wait(PERIOD_S)

    def _round(self) -> None:
        self._reports = describe_workers(self._workers)
        members = self._membership.update(self._reports)
        if not self._router_metrics:
            self._router_metrics = ray.get(find(ROUTER).describe.remote())["metrics_address"]
        self._targets.refresh(self._router_metrics, self._reports)
        if members != self._published:
            log.info("members: %s", ", ".join(f"{member.peer.id} {member.role}" for member in members))
            ray.get(find(ROUTER).set_members.remote(members))
            self._published = members

    def stop(self) -> None:
        """What others are told of the cluster ends with it."""
        self._stopping.set()
        self._thread.join(ROUND_TIMEOUT_S)
        self._targets.remove()

    def reports(self) -> dict[str, WorkerReport | None]:
        """Of the last round."""
        return self._reports


def start_controller(settings: Settings, workers: Sequence[str]) -> None:
    """Make the controller's actor; Ray restarts it with the same arguments if it dies."""
    actor = ray.remote(ControllerActor)
    actor.options(
        name=CONTROLLER, lifetime="detached", num_cpus=0, max_restarts=-1, max_concurrency=2, scheduling_strategy=here()
    ).remote(settings, workers)
