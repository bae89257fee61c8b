"""Prometheus' list of targets: routers, workers and controller, as file_sd reads them, kept fresh by the controller.

    controller, each round: Targets.refresh(...) -> tidemill.json, if it changed -> Prometheus, within seconds

Ray keeps a list of its own agents by itself. Labels name a worker, not its incarnation: a restart continues its series.
"""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path

from cluster.pools import WorkerReport
from tidemill.core.settings import Settings

log = logging.getLogger(__name__)


def targets(cluster: str, scheme: str, heads: Mapping[str, str], workers: Mapping[str, str]) -> str:
    """The file's text. `heads` are routers and controller; all by name, host:port of metrics, empty: not known."""
    listed = [
        *((name.partition("-")[0], name, heads[name]) for name in sorted(heads)),
        *(("worker", name, workers[name]) for name in sorted(workers)),
    ]
    groups = [
        {
            "targets": [address],
            "labels": {"__scheme__": scheme, "cluster": cluster, "component": component, "worker": name},
        }
        for component, name, address in listed
        if address
    ]
    return json.dumps(groups, indent=1) + "\n"


class Targets:
    """The file of one cluster, written when its text changes. Belongs to the controller."""

    def __init__(self, settings: Settings) -> None:
        self._path = settings.metrics.targets_file
        self._cluster = settings.name
        self._scheme = "https" if settings.network.tls else "http"
        self._workers: dict[str, str] = {}
        self._written: str | None = None

    def refresh(self, heads: Mapping[str, str], reports: Mapping[str, WorkerReport | None]) -> None:
        """A worker that says nothing for a moment keeps its place: Prometheus shall see it as down, not as gone.

        A folder that cannot be written is logged and tried again with the next change.
        """
        if self._path is None:
            return
        said = {name: report.metrics_address for name, report in reports.items() if report is not None}
        self._workers = {name: said.get(name, self._workers.get(name, "")) for name in reports}
        text = targets(self._cluster, self._scheme, heads, self._workers)
        if text == self._written:
            return
        self._written = text
        try:
            write_atomically(self._path, text)
        except OSError as error:
            log.warning("%s: the targets cannot be written: %s", self._path, error)

    def remove(self) -> None:
        """The cluster ends."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Whoever reads finds the old text or the new one, never a part. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)
