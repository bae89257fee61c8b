"""The controller: watches the workers and tells the router who is there.

It holds nothing that cannot be asked for again, so it may die and be restarted at any time: requests go on without it.
"""

import logging
import threading
import time
from collections.abc import Mapping, Sequence

import ray
from ray.exceptions import RayError

from cluster.pools import CONTROLLER, ROUTER, WorkerReport, describe_workers, find
from tidemill.core.model import Member

log = logging.getLogger(__name__)

PERIOD_S = 0.5
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

    def __init__(self, workers: Sequence[str]) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        self._workers = list(workers)
        self._membership = Membership()
        self._published: tuple[Member, ...] = ()
        self._reports: dict[str, WorkerReport | None] = {}
        threading.Thread(target=self._run, name="controller", daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                self._round()
            except (RayError, ValueError) as error:
                log.warning("the router cannot be reached: %s", error)
            time.sleep(PERIOD_S)

    def _round(self) -> None:
        self._reports = describe_workers(self._workers)
        members = self._membership.update(self._reports)
        if members != self._published:
            log.info("members: %s", ", ".join(f"{member.peer.id} {member.role}" for member in members))
            ray.get(find(ROUTER).set_members.remote(members))
            self._published = members

    def reports(self) -> dict[str, WorkerReport | None]:
        """Of the last round."""
        return self._reports


def start_controller(workers: Sequence[str]) -> None:
    """Make the controller's actor; Ray restarts it with the same arguments if it dies."""
    actor = ray.remote(ControllerActor)
    actor.options(name=CONTROLLER, lifetime="detached", num_cpus=0, max_restarts=-1).remote(workers)
