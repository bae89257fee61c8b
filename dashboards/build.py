"""Writes Grafana's dashboards and Prometheus's rules from the declarations: python -m dashboards.build"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from dashboards.grafana import dashboard_json
from dashboards.pages import PAGES
from dashboards.rules import alerting_rules, recording_rules

ROOT = Path(__file__).parents[1]

# Every generated file, and what makes its text.
FILES: dict[Path, Callable[[], str]] = {
    ROOT / "dashboards" / f"{page.uid}.json": partial(dashboard_json, page) for page in PAGES
} | {
    ROOT / "deploy" / "prometheus" / "rules.yaml": recording_rules,
    ROOT / "deploy" / "prometheus" / "alerts.yaml": alerting_rules,
}

if __name__ == "__main__":
    for path, make in FILES.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(make(), encoding="utf-8")
