"""Dashboards, rules and alerts say what the declarations say, and nothing that nobody declared."""

import json
import re
from pathlib import Path

import pytest
import yaml

from dashboards import foreign
from dashboards.build import FILES, ROOT
from dashboards.pages import PAGES
from dashboards.promql import PromQL
from dashboards.rules import ALERTS, WINDOWS, missed_name
from tidemill.core import metrics
from tidemill.core.metrics import ROUTER_SERIES, WORKER_SERIES, Kind

DECLARED = {each.name: each for each in (*ROUTER_SERIES, *WORKER_SERIES, *foreign.FOREIGN_SERIES)}
SUFFIXES = {Kind.HISTOGRAM: ("_bucket", "_sum", "_count"), Kind.COUNTER: ("",), Kind.GAUGE: ("",)}
SAMPLES = {name + suffix for name, each in DECLARED.items() for suffix in SUFFIXES[each.kind]}
RECORDED = {missed_name(window) for window in WINDOWS}
NAMES = re.compile(r"\b(?:tidemill[_:]|ray_|process_|vllm:)\w[\w:]*|\bup\b")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_generated_file_is_current(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == FILES[path](), "run `make docs`"


def test_there_is_no_dashboard_that_nobody_generates() -> None:
    assert set((ROOT / "dashboards").glob("*.json")) <= set(FILES)


def _expressions() -> list[str]:
    found = []
    for path in FILES:
        if path.suffix == ".json":
            panels = json.loads(path.read_text())["panels"]
            found += [target["expr"] for panel in panels for target in panel.get("targets", ())]
        else:
            groups = yaml.safe_load(path.read_text())["groups"]
            found += [rule["expr"] for group in groups for rule in group["rules"]]
    return found


def test_every_name_in_every_expression_is_declared() -> None:
    named = {name for text in _expressions() for name in NAMES.findall(text)}
    assert len(named) > 30
    assert named <= SAMPLES | RECORDED


def test_panels_have_ids_of_their_own_and_say_what_they_show() -> None:
    for page in PAGES:
        panels = json.loads((ROOT / "dashboards" / f"{page.uid}.json").read_text())["panels"]
        assert len({panel["id"] for panel in panels}) == len(panels)
        assert all("When it moves" in panel["description"] for panel in panels if panel["type"] != "row")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda q: q.rate(metrics.REQUESTS, ("role",)), "tidemill_requests_total has no label role"),
        (lambda q: q.rate(metrics.REQUESTS, (), tenant="a"), "has no label tenant"),
        (lambda q: q.rate(metrics.WORKER_QUEUED, ()), "is a gauge, and a counter is needed"),
        (lambda q: q.value(metrics.REQUESTS, ()), "is a counter, and a gauge is needed"),
        (lambda q: q.quantile(0.5, metrics.REQUESTS), "is a counter, and a histogram is needed"),
    ],
)
def test_a_query_that_would_find_nothing_cannot_be_made(make: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make(PromQL("5m"))  # type: ignore[operator]


def test_expressions() -> None:
    q = PromQL("5m", {"cluster": "c"})
    assert q.rate(metrics.REQUESTS, ("outcome",), outcome="!length").text == (
        'sum by (outcome) (rate(tidemill_requests_total{cluster="c", outcome!="length"}[5m]))'
    )
    assert q.quantile(0.99, metrics.TTFT, ("slo_class",)).text == (
        "histogram_quantile(0.99, sum by (le, slo_class) "
        '(rate(tidemill_time_to_first_token_seconds_bucket{cluster="c"}[5m])))'
    )


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert.name)
def test_every_alert_has_a_paragraph_in_the_runbook(alert: object) -> None:
    text = (ROOT / "docs" / "runbook.md").read_text()
    paragraphs = dict(re.findall(r"^## (\w+)\n(.+?)(?=\n## |\Z)", text, re.MULTILINE | re.DOTALL))
    assert len(paragraphs[alert.name].split()) > 30  # type: ignore[attr-defined]
    assert set(paragraphs) == {each.name for each in ALERTS}


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert.name)
def test_every_alert_is_tested_both_ways(alert: object) -> None:
    """promtool runs them in tests/deploy."""
    tests = yaml.safe_load((ROOT / "tests" / "deploy" / "alerts.yaml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"] if case["alertname"] == alert.name]  # type: ignore[attr-defined]
    assert {bool(case["exp_alerts"]) for case in cases} == {True, False}
