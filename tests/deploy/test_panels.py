"""A cluster in an existing Ray, a real Prometheus, load: no panel is empty, and targets follow the workers."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.head import free_port, stop_head
from dashboards.pages import PAGES, Panel
from tests.support.operator import Operator
from tests.support.prometheus import Prometheus
from tidemill import Client

pytestmark = pytest.mark.timeout(240)
LOAD_S = 12.0
RATE_INTERVAL = "10s"


@dataclass(frozen=True, slots=True)
class Scene:
    operator: Operator
    prometheus: Prometheus
    targets: Path


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """Ray with its dashboard, because that keeps the list of Ray's own targets."""
    folder, ray_folder = tmp_path_factory.mktemp("panels"), tmp_path_factory.mktemp("r")
    operator, port = Operator(folder), free_port()
    operator.env |= {"RAY_AUTH_MODE": "disabled"}
    ray = subprocess.Popen(
        [
            *[str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1"],
            *[f"--port={port}", "--include-dashboard=true", f"--dashboard-port={free_port()}", "--num-cpus=8"],
            *["--disable-usage-stats", f"--temp-dir={ray_folder}"],
        ],
        env=operator.env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    targets = folder / "targets" / "test.json"
    operator.write(
        ray={"address": f"127.0.0.1:{port}"},
        metrics={"targets_file": str(targets)},
        slo={"default": {"ttft_s": 2.0, "tpot_s": 0.2}, "hurried": {"ttft_s": 0.001, "tpot_s": 0.2}},
    )
    try:
        Prometheus.wait_until((ray_folder / "ray_current_cluster").exists, "Ray to start")
        done = operator.run("up", "-c", str(operator.config))
        assert done.returncode == 0, done.stderr
        with Prometheus(folder, targets, ray_folder / "prom_metrics_service_discovery.json") as prometheus:
            yield Scene(operator, prometheus, targets)
        done = operator.run("down", "--name", "test")
        assert done.returncode == 0, done.stderr
        assert not targets.exists(), "Prometheus would scrape a cluster that is gone"
    finally:
        stop_head(ray.pid)
        ray.wait(10)


@pytest.fixture(scope="module")
def loaded(scene: Scene, prompts: list[str]) -> Scene:
    """Prompts short and long, both classes, for some scrapes."""
    until = time.monotonic() + LOAD_S

    def send(number: int) -> None:
        while time.monotonic() < until:
            prompt = prompts[number % len(prompts)] * (1 + number % 3)
            client.generate(prompt[-3000:], max_tokens=24, slo=("default", "hurried")[number % 2])

    with Client(f"127.0.0.1:{scene.operator.port}") as client, ThreadPoolExecutor(4) as threads:
        list(threads.map(send, range(4)))
    return scene


def _values(prometheus: Prometheus, expression: str) -> list[float]:
    text = expression.replace("$cluster", "test").replace("$__rate_interval", RATE_INTERVAL)
    assert "$" not in text
    return [float(sample["value"][1]) for sample in prometheus.query(text)]


def test_every_panel_has_data(loaded: Scene) -> None:
    """Each query at once after the load, so that none is looked at when its window has passed."""

    def empty(panel: Panel) -> list[str]:
        queries = [(legend, _values(loaded.prometheus, expr.text)) for expr, legend in panel.queries]
        return [legend for legend, values in queries if not any(math.isfinite(value) for value in values)]

    panels = [(page.title, panel) for page in PAGES for panel in page.panels if not panel.only_with]
    found = {f"{title} / {panel.title}": empty(panel) for title, panel in panels}
    assert len(found) > 30
    assert not {title: legends for title, legends in found.items() if legends}


def test_what_the_load_did_is_what_is_seen(loaded: Scene) -> None:
    seen = {
        (sample["metric"]["slo_class"], sample["metric"]["verdict"]): float(sample["value"][1])
        for sample in loaded.prometheus.query("tidemill_slo_requests_total")
    }
    assert seen["default", "met"] > 0
    assert seen["hurried", "met"] == 0
    assert seen["hurried", "ttft_missed"] > 0
    assert seen["default", "failed"] == seen["hurried", "failed"] == 0
    roles = _values(loaded.prometheus, 'sum by (role) (tidemill_worker_role{cluster="$cluster"})')
    assert sorted(roles) == [1, 1, 2]


def test_rules_are_evaluated(loaded: Scene) -> None:
    groups = loaded.prometheus.get("rules")["groups"]
    health = {rule["name"]: (rule["health"], rule.get("lastError", "")) for group in groups for rule in group["rules"]}
    assert len(health) == 10
    assert set(health.values()) == {("ok", "")}


def test_targets_follow_a_worker_that_comes_back_elsewhere(scene: Scene) -> None:
    Prometheus.wait_until(lambda: not scene.prometheus.down(), "all targets to answer")
    before = json.loads(scene.targets.read_text())
    victim = next(worker for worker in scene.operator.status()["workers"] if worker["worker"].startswith("verify-1@"))
    os.kill(victim["pid"], signal.SIGKILL)
    Prometheus.wait_until(lambda: json.loads(scene.targets.read_text()) != before, "the worker to come back")
    after = json.loads(scene.targets.read_text())
    assert [group["labels"] for group in after] == [group["labels"] for group in before]
    Prometheus.wait_until(lambda: not scene.prometheus.down(), "all targets to answer again")
