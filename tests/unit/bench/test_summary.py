"""Attainment, goodput and percentiles of a load worked out by hand, and how they are shown and written."""

import csv
import math
from collections.abc import Iterable
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from cluster.bench import report
from cluster.bench.arrivals import Arrival
from cluster.bench.summary import (
    ALL,
    CANCELLED,
    DROPPED,
    OK,
    ClassSummary,
    Exchange,
    failures,
    percentiles,
    summarise,
)
from tidemill import Slo

GOALS = {"tight": Slo(0.5, 0.05), "relaxed": Slo(2.0, 0.2)}
results = st.sampled_from([OK, OK, DROPPED, CANCELLED, "overloaded"])


def exchange(
    number: int, slo_class: str, result: str = OK, ttft_s: float | None = 0.1, tpot_s: float | None = 0.01
) -> Exchange:
    if result != OK:
        ttft_s = tpot_s = None
    tokens = 20 if result == OK else 0
    return Exchange(
        number, 2.0, Arrival(number / 2, 100, 20, slo_class), result, 0.0, ttft_s, tpot_s, 1.0, output_tokens=tokens
    )


def some() -> list[Exchange]:
    """Of `tight`: 6 due, 4 answered, 2 of them in time. Of `relaxed`: 2 due, both in time."""
    return [
        exchange(0, "tight"),
        exchange(1, "tight", ttft_s=0.5, tpot_s=0.05),
        exchange(2, "tight", ttft_s=0.6),
        exchange(3, "tight", tpot_s=0.06),
        exchange(4, "tight", "overloaded"),
        exchange(5, "tight", DROPPED),
        exchange(6, "tight", CANCELLED),
        exchange(7, "relaxed", ttft_s=0.6),
        exchange(8, "relaxed", tpot_s=0.06),
    ]


class TestSummary:
    def test_by_hand(self) -> None:
        tight, relaxed, everything = summarise(some(), GOALS, 2.0, duration_s=4.0)
        assert (tight.slo_class, tight.due, tight.sent, tight.ok) == ("tight", 6, 5, 4)
        assert (tight.failed, tight.dropped) == (1, 1)
        assert tight.attainment == pytest.approx(2 / 6)
        assert tight.goodput == pytest.approx(2 / 4)
        assert tight.output_tokens_per_s == pytest.approx(80 / 4)
        assert tight.ttft_s == pytest.approx((0.3, 0.57, 0.597))  # of 0.1, 0.1, 0.5, 0.6
        assert relaxed.attainment == 1.0
        assert (everything.slo_class, everything.due, everything.goodput) == (ALL, 8, 1.0)
        assert everything.attainment == pytest.approx(4 / 8)

    def test_one_class_is_all_there_is(self) -> None:
        (row,) = summarise(some()[:6], {"tight": GOALS["tight"]}, 2.0, 4.0)
        assert row.slo_class == "tight"

    def test_nothing(self) -> None:
        row = summarise([], GOALS, 2.0, 4.0)[-1]
        assert (row.due, row.goodput) == (0, 0.0)
        assert math.isnan(row.attainment)
        assert all(map(math.isnan, row.ttft_s))

    @settings(deadline=None)
    @given(st.lists(st.tuples(st.sampled_from(list(GOALS)), results, st.floats(0, 3), st.floats(0, 0.3))))
    def test_classes_add_up(self, outcomes: list[tuple[str, str, float, float]]) -> None:
        exchanges = [exchange(number, *outcome) for number, outcome in enumerate(outcomes)]
        *classes, everything = summarise(exchanges, GOALS, 2.0, 10.0)
        for name in ("due", "sent", "ok", "failed", "dropped", "goodput"):
            assert sum(getattr(row, name) for row in classes) == pytest.approx(getattr(everything, name))
        assert everything.due == sum(each.result != CANCELLED for each in exchanges)
        assert everything.goodput * 10.0 <= everything.ok <= everything.sent <= everything.due

    @settings(deadline=None)
    @given(st.lists(st.floats(0, 1e3), min_size=1))
    def test_percentiles(self, values: list[float]) -> None:
        assert percentiles(values) == pytest.approx(tuple(np.quantile(values, (0.5, 0.9, 0.99))))

    def test_failures_by_kind(self) -> None:
        assert failures(some()) == {"overloaded": 1, DROPPED: 1, CANCELLED: 1}


class TestReport:
    @pytest.fixture
    def rows(self) -> list[ClassSummary]:
        return summarise(some(), GOALS, 2.0, 4.0)

    def shown(self, rows: Iterable[ClassSummary]) -> list[list[str]]:
        console = Console(file=StringIO(), width=80, color_system=None)
        console.print(report.table(rows))
        assert isinstance(console.file, StringIO)
        return [line.split() for line in console.file.getvalue().splitlines()]

    def test_table_fits_80_columns(self, rows: list[ClassSummary]) -> None:
        lines = self.shown([replace(row, ttft_s=(1.2345, 12.345, 123.45)) for row in rows])
        assert lines[1][-2] == "1234/12345/123450"
        lines = self.shown(rows)
        assert lines[1] == ["2", "tight", "5", "4", "1", "1", "33.3%", "0.50", "300/570/597", "30.0/57.0/59.7"]

    def test_table_of_nothing(self) -> None:
        assert self.shown(summarise([], GOALS, 2.0, 4.0))[1][-3:] == ["0.00", "-", "-"]

    def test_files(self, rows: list[ClassSummary], tmp_path: Path) -> None:
        report.write_requests(tmp_path / "requests.csv", reversed(some()))
        report.write_summary(tmp_path / "summary.csv", rows)
        with (tmp_path / "requests.csv").open() as file:
            requests = list(csv.DictReader(file))
        assert [row["number"] for row in requests] == [str(number) for number in range(9)]
        assert (requests[1]["slo_class"], requests[1]["wanted_tokens"], requests[1]["ttft_s"]) == ("tight", "20", "0.5")
        assert (requests[4]["result"], requests[4]["ttft_s"]) == ("overloaded", "")
        with (tmp_path / "summary.csv").open() as file:
            summary = list(csv.DictReader(file))
        assert [row["slo_class"] for row in summary] == ["tight", "relaxed", ALL]
        assert (summary[0]["ttft_p50_s"], summary[0]["dropped"], summary[2]["goodput"]) == ("0.3", "1", "1.0")

    def test_a_late_client_is_told(self) -> None:
        assert report.lateness([]) is None
        assert report.lateness(some()) is None
        late = [Exchange(0, 2.0, Arrival(0.0, 1, 1, "tight"), OK, sent_late_s=0.2)]
        assert "200 ms late" in (report.lateness(late) or "")
