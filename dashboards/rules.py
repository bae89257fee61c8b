"""Recording rules and alerts for Prometheus, made from declared series.

Burn rates follow the multi-window scheme of the SRE Workbook, chapter 5: an alert needs a long window, so that it is
no blip, and a short one, so that it ends soon after the trouble does.
"""

from dataclasses import dataclass
from typing import Any

import yaml

from dashboards.promql import Expr, PromQL, combine
from tidemill.core import metrics

OBJECTIVE = 0.99  # share of requests that keep their class's goal
BUDGET = 1 - OBJECTIVE
WINDOWS = ("5m", "30m", "1h", "6h")
RUNBOOK = "docs/runbook.md"
CLASS, WORKER = ("cluster", "slo_class"), ("cluster", "worker")


@dataclass(frozen=True, slots=True)
class Alert:
    """`patience`: how long it must hold. `summary` may use the labels that `expr` leaves."""

    name: str
    expr: str
    patience: str
    severity: str  # page: somebody gets up; ticket: somebody looks tomorrow
    summary: str

    @property
    def anchor(self) -> str:
        """Of its paragraph in the runbook."""
        return self.name.lower()


def missed_name(window: str) -> str:
    """The recorded share of requests that missed their goal."""
    return f"tidemill:slo_missed:ratio_{window}"


def _missed(window: str) -> Expr:
    q = PromQL(window)
    return combine(
        "1 - {met} / {all}",
        met=q.rate(metrics.SLO_REQUESTS, CLASS, verdict="met"),
        all=q.rate(metrics.SLO_REQUESTS, CLASS),
    )


def _burning(factor: float, long: str, short: str) -> str:
    limit = f"{factor * BUDGET:.4g}"
    return f"{missed_name(long)} > {limit} and {missed_name(short)} > {limit}"


def _stalled() -> Expr:
    """Draft workers may hold requests that nobody asks them about."""
    q = PromQL("1m")
    return combine(
        "{running} > 0 unless {steps} > 0",
        running=q.value(metrics.WORKER_RUNNING, WORKER, role="!draft"),
        steps=q.increase(metrics.STEPS, WORKER),
    )


def _leaked() -> Expr:
    """No lease lives as long as the window: blocks still leased, and none given back in it, are nobody's."""
    q = PromQL("10m")
    return combine(
        "{leased} > 0 unless {ended} > 0",
        leased=q.over_time("min_over_time", metrics.KV_BLOCKS_LEASED, WORKER, "sum"),
        ended=q.increase(metrics.LEASES, WORKER),
    )


def _useless_drafts() -> Expr:
    q = PromQL("10m")
    return combine(
        "{accepted} / {verified} < 0.2 and {verified} > 1 and {drafters} > 0",
        accepted=q.rate(metrics.ACCEPTED, ("cluster",)),
        verified=q.rate(metrics.VERIFIES, ("cluster",)),
        drafters=q.value(metrics.WORKER_ROLE, ("cluster",), role="draft"),
    )


def _flapping() -> Expr:
    q = PromQL("30m")
    return combine("{changes} > 6", changes=q.over_time("changes", metrics.WORKER_ROLE, WORKER, "max"))


ALERTS = (
    Alert(
        "TidemillErrorBudgetBurnsFast", _burning(14.4, "1h", "5m"), "2m", "page",
        "Class {{ $labels.slo_class }} of {{ $labels.cluster }} misses its goal so often that a month's error budget "
        "is gone in two days.",
    ),
    Alert(
        "TidemillErrorBudgetBurns", _burning(6, "6h", "30m"), "15m", "ticket",
        "Class {{ $labels.slo_class }} of {{ $labels.cluster }} misses its goal so often that a month's error budget "
        "is gone in five days.",
    ),
    Alert(
        "TidemillWorkerStalled", _stalled().text, "30s", "page",
        "{{ $labels.worker }} of {{ $labels.cluster }} holds requests and has made no step for a minute.",
    ),
    Alert(
        "TidemillLeaseLeaked", _leaked().text, "1m", "ticket",
        "{{ $labels.worker }} of {{ $labels.cluster }} keeps {{ $value }} KV blocks under leases that nobody ends.",
    ),
    Alert(
        "TidemillDraftPoolUseless", _useless_drafts().text, "10m", "ticket",
        "Draft workers of {{ $labels.cluster }} run, and {{ $value }} of their tokens are accepted per verify step.",
    ),
    Alert(
        "TidemillRolesFlap", _flapping().text, "0m", "ticket",
        "{{ $labels.worker }} of {{ $labels.cluster }} changed its role {{ $value }} times within half an hour.",
    ),
)  # fmt: skip


def recording_rules() -> str:
    """deploy/prometheus/rules.yaml"""
    rules = [{"record": missed_name(window), "expr": _missed(window).text} for window in WINDOWS]
    return _yaml([{"name": "tidemill-slo", "rules": rules}])


def alerting_rules() -> str:
    """deploy/prometheus/alerts.yaml"""
    return _yaml([{"name": "tidemill-alerts", "rules": [_alert(alert) for alert in ALERTS]}])


def _alert(alert: Alert) -> dict[str, Any]:
    return {
        "alert": alert.name,
        "expr": alert.expr,
        "for": alert.patience,
        "labels": {"severity": alert.severity},
        "annotations": {"summary": alert.summary, "runbook_url": f"{RUNBOOK}#{alert.anchor}"},
    }


def _yaml(groups: list[dict[str, Any]]) -> str:
    note = "# Written by dashboards/build.py; `make docs` writes it again.\n"
    return note + yaml.safe_dump({"groups": groups}, sort_keys=False, width=120, allow_unicode=True)
