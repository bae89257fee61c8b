"""The rules as Prometheus reads them, and every alert fired and not fired, by Prometheus' own tool."""

import subprocess
from pathlib import Path

from tests.support.prometheus import DEPLOY, tool


def promtool(*arguments: str | Path) -> None:
    done = subprocess.run(
        [tool("promtool"), *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_configuration_and_rules_are_valid() -> None:
    promtool("check", "rules", DEPLOY / "prometheus" / "rules.yaml", DEPLOY / "prometheus" / "alerts.yaml")
    promtool("check", "config", "--syntax-only", DEPLOY / "prometheus" / "prometheus.yml")


def test_alerts_fire_when_they_should_and_only_then() -> None:
    promtool("test", "rules", Path(__file__).parent / "alerts.yaml")
