"""The application of deploy/kuberay/rayservice on a real Ray Serve, deployed as KubeRay does: by its dashboard."""

import importlib.util
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from cluster.head import answers, free_port, stop_head
from tests.support.operator import Operator
from tests.support.prometheus import DEPLOY
from tidemill import Client

pytestmark = pytest.mark.timeout(600)
BIN = Path(sys.executable).parent


@dataclass(frozen=True, slots=True)
class Serve:
    """A Ray with its dashboard, and what `serve` says of it."""

    operator: Operator
    dashboard: str
    folder: Path

    def run(self, *arguments: str) -> str:
        command = [str(BIN / "serve"), *arguments, "--address", self.dashboard]
        done = subprocess.run(command, env=self.operator.env, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def deploy(self) -> None:
        """The config of the manifest, with the settings of this machine and ports of its own."""
        manifest = yaml.safe_load((DEPLOY / "kuberay" / "rayservice" / "rayservice.yaml").read_text())
        config = yaml.safe_load(manifest["spec"]["serveConfigV2"])
        config["http_options"] = {"host": "127.0.0.1", "port": free_port()}
        config["applications"][0]["args"]["config"] = str(self.operator.config)
        (self.folder / "serve.yaml").write_text(json.dumps(config))
        self.run("deploy", str(self.folder / "serve.yaml"))

    def status(self) -> dict[str, Any]:
        """Of the application: its own status, and its replicas by their states."""
        found: dict[str, Any] = yaml.safe_load(self.run("status"))["applications"]["tidemill"]
        return found

    def is_running(self) -> bool:
        found = self.status()
        assert found["status"] in ("DEPLOYING", "RUNNING", "UNHEALTHY"), found
        return bool(found["status"] == "RUNNING")


def wait_until(holds: Callable[[], bool], seconds: float = 150.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.5)


@pytest.fixture
def serve(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    ray_folder = tmp_path_factory.mktemp("s")  # short: Ray puts sockets there
    assert importlib.util.find_spec("fastapi"), "Ray Serve is not installed; `make test-serve` installs what it needs"
    operator, port, dashboard = Operator(tmp_path), free_port(), free_port()
    operator.env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    operator.write(ray={"address": f"127.0.0.1:{port}"})
    ray = subprocess.Popen(
        [
            *[str(BIN / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}"],
            *["--include-dashboard=true", f"--dashboard-port={dashboard}", "--dashboard-agent-listen-port=0"],
            *[f"--ray-client-server-port={free_port()}", "--num-cpus=8", "--disable-usage-stats"],
            f"--temp-dir={ray_folder}",
        ],
        env=operator.env | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_until(lambda: answers(f"127.0.0.1:{dashboard}"))
        yield Serve(operator, f"http://127.0.0.1:{dashboard}", tmp_path)
    finally:
        stop_head(ray.pid)
        ray.wait(10)


def test_serve_brings_it_up_keeps_it_and_takes_it_down(serve: Serve) -> None:
    """Its replica may be killed: the next one finds the cluster serving, and the same workers."""
    operator = serve.operator
    serve.deploy()
    wait_until(serve.is_running)
    with Client(f"127.0.0.1:{operator.port}") as client:
        answer = client.generate("def f(x):", max_tokens=20).text
        workers = {each["worker"] for each in operator.status()["workers"]}
        killed = keepers(serve)
        for each in killed:
            each.send_signal(signal.SIGKILL)
        assert client.generate("def f(x):", max_tokens=20).text == answer
        wait_until(lambda: bool(keepers(serve) - killed) and serve.is_running())
        assert {each["worker"] for each in operator.status()["workers"]} == workers
        assert client.generate("def f(x):", max_tokens=20).text == answer
    serve.run("shutdown", "--yes")
    wait_until(lambda: not answers(f"127.0.0.1:{operator.port}"))
    wait_until(lambda: "no cluster 'test' is up" in operator.run("status", "--name", "test").stderr)


def keepers(serve: Serve) -> set[psutil.Process]:
    """The replica's process; there is none while it is being replaced. Not of another Ray on this machine."""
    named = [each for each in psutil.process_iter() if "Keeper" in each.name()]
    return {each for each in named if each.environ().get("RAY_AUTH_TOKEN") == serve.operator.env["RAY_AUTH_TOKEN"]}
