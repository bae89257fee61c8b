"""Pages as Grafana's JSON, by Grafana's own library."""

import itertools
import json

from grafana_foundation_sdk.builders import dashboard as grafana
from grafana_foundation_sdk.builders.common import StackingConfig
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.builders.statetimeline import Panel as Timeline
from grafana_foundation_sdk.builders.timeseries import Panel as Timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import StackingMode
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    ValueMap,
    ValueMappingResult,
)

from dashboards.pages import ROLE_CODES, Look, Page, Panel
from tidemill.core import metrics

SOURCE = DataSourceRef("prometheus", "tidemill-prometheus")  # as in deploy/grafana/provisioning/datasources
COLUMNS, HEIGHT = 24, 8
MAX_IN_A_ROW = 3
COLORS = ("blue", "orange", "green")  # of the roles


def dashboard_json(page: Page) -> str:
    """One dashboard, as Grafana imports it."""
    made = (
        grafana.Dashboard(page.title)
        .uid(page.uid)
        .tags(["tidemill", "generated"])
        .readonly()
        .refresh("10s")
        .time("now-30m", "now")
        .timezone("browser")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .with_variable(
            grafana.QueryVariable("cluster")
            .datasource(SOURCE)
            .query(f"label_values({metrics.ROUTER_ACTIVE.name}, cluster)")
        )
    )
    ids = itertools.count(1)
    for row in page.rows:
        made = made.with_row(grafana.Row(row.title).id(next(ids)))
        in_a_row = min(len(row.panels), MAX_IN_A_ROW) if len(row.panels) != 4 else 2
        for panel in row.panels:
            made = made.with_panel(_panel(panel).id(next(ids)).span(COLUMNS // in_a_row).height(HEIGHT))
    return json.dumps(made.build(), cls=JSONEncoder, indent=1, sort_keys=True) + "\n"


def _panel(panel: Panel) -> Timeseries | Timeline:
    made: Timeseries | Timeline = _timeline() if panel.look is Look.TIMELINE else Timeseries()
    made = made.title(panel.title).description(panel.description).datasource(SOURCE).unit(panel.unit)
    if isinstance(made, Timeseries):
        made = made.min(0)
        if panel.look is Look.STACKED:
            made = made.stacking(StackingConfig().mode(StackingMode.NORMAL)).fill_opacity(30)
    for index, (expr, legend) in enumerate(panel.queries):
        made = made.with_target(
            Dataquery().ref_id(chr(ord("A") + index)).expr(expr.text).legend_format(legend).datasource(SOURCE).range()
        )
    return made


def _timeline() -> Timeline:
    names = {
        str(code): ValueMappingResult(text=str(role), color=color)
        for (role, code), color in zip(ROLE_CODES.items(), COLORS, strict=True)
    }
    return Timeline().mappings([ValueMap(names)]).row_height(0.8)
