"""A real Prometheus (Debian's), with the project's own configuration, for as long as a test runs."""

import json
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import yaml

from cluster.head import free_port

DEPLOY = Path(__file__).parents[2] / "deploy"
Sample = dict[str, Any]


def tool(name: str) -> str:
    """Path of a program; fails the test if it is not there: these tests are not for machines without it."""
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin")
    assert path, f"{name} is not installed; `make test-deploy` installs what these tests need"
    return path


class Prometheus:
    """Scrapes each second what the lists of targets name."""

    def __init__(self, folder: Path, tidemill: Path, ray: Path) -> None:
        """`tidemill`, `ray`: the lists, which need not be there yet."""
        self._folder = folder
        config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        config["rule_files"] = [str(DEPLOY / "prometheus" / name) for name in config["rule_files"]]
        for job, targets in zip(config["scrape_configs"], (tidemill, ray), strict=True):
            job.pop("tls_config", None)
            job["file_sd_configs"] = [{"files": [str(targets)], "refresh_interval": "1s"}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        self._url = f"http://127.0.0.1:{free_port()}"

    def __enter__(self) -> "Prometheus":
        command = [
            *[tool("prometheus"), f"--config.file={self._folder}/prometheus.yml"],
            *[f"--storage.tsdb.path={self._folder}/data", f"--web.listen-address={self._url.removeprefix('http://')}"],
        ]
        with (self._folder / "prometheus.log").open("wb") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        self.wait_until(self._answers, "Prometheus to answer")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._process.terminate()
        self._process.wait(20)

    def _answers(self) -> bool:
        try:
            self.get("status/runtimeinfo")
        except OSError:
            return False
        return True

    def get(self, path: str, **parameters: str) -> Any:
        """`data` of an answer of the HTTP API."""
        url = f"{self._url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path} {parameters}: {error.read().decode()}") from error

    def query(self, expression: str) -> list[Sample]:
        """An instant query's samples."""
        result: list[Sample] = self.get("query", query=expression)["result"]
        return result

    def down(self) -> list[str]:
        """Targets that do not answer, with the reason."""
        active = self.get("targets", state="active")["activeTargets"]
        return [f"{each['labels']}: {each['lastError']}" for each in active if each["health"] != "up"]

    @staticmethod
    def wait_until(holds: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not holds():
            assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
            time.sleep(0.2)
