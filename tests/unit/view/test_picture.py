"""From telemetry to the picture, and the picture in a terminal of 80 columns and 24 lines."""

import json
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from cluster.view.picture import bar, draw_picture, percent, sparkline
from router.telemetry import HISTORY_POINTS, HISTORY_STEP_S, Sliding
from tidemill.core.model import Role, WorkerId, WorkerLoad
from tidemill.core.picture import FrontDoor, Picture, picture
from tidemill.core.telemetry import (
    DecisionRecord,
    History,
    Progress,
    RouterTelemetry,
    Traffic,
    Waiting,
    WorkerTelemetry,
)

FRONT = FrontDoor("local", "127.0.0.1:7071", "tiny", active=7, queued=1, rebalances=True)
GOOD = Traffic(arrived=4, started=4, ttft_met=4, queue_s=0.4, finished=4, paced=4, tpot_s=0.04, tpot_met=4, met=4)
LATE = Traffic(arrived=4, started=4, ttft_met=2, finished=2, tpot_met=2, met=1, failed=2)


def worker(name: str, role: Role, **changes: object) -> WorkerTelemetry:
    load = WorkerLoad(2, 300, 5, 100, 30, 10, 16, 900, 0.004, 1.0)
    made = WorkerTelemetry(WorkerId(name, 3), role, True, load, 0.1, 0.0, Progress(10.0, 5.0, verifies=50, tokens=80))
    return replace(made, **changes)  # type: ignore[arg-type]


def scene(workers: int = 4, classes: int = 2, decisions: int = 3) -> Picture:
    roles = [Role.VERIFY, Role.PREFILL, Role.VERIFY, Role.DRAFT]
    everyone = tuple(worker(f"{roles[i % 4]}-{i}", roles[i % 4]) for i in range(workers))
    points = (Traffic(), *[GOOD] * (HISTORY_POINTS - 2), LATE)
    history = History(
        HISTORY_STEP_S,
        tuple((f"class-{i}", points) for i in range(classes)),
        ((Role.PREFILL, (Progress(),) * 30), (Role.VERIFY, tuple(Progress(tokens=2 * i) for i in range(30)))),
    )
    records = [
        DecisionRecord(1e9 + i, "prefill_is_short", ("verify-1: verify -> prefill",), (("prefill", 1.4),))
        for i in range(decisions)
    ]
    telemetry = RouterTelemetry((), Waiting(3, 900, 0.5), everyone)
    return picture(FRONT, telemetry, history, records, 1e9)


def drawn(shown: Picture, width: int = 80, height: int = 24) -> list[str]:
    console = Console(width=width, height=height, record=True, file=open("/dev/null", "w"), color_system=None)  # noqa: SIM115
    console.print(draw_picture(shown, height))
    return console.export_text().rstrip("\n").split("\n")


def test_workers_come_by_role_and_pools_add_them_up() -> None:
    shown = scene()
    assert [each.role for each in shown.workers] == ["prefill", "draft", "verify", "verify"]
    verify = {pool.role: pool for pool in shown.pools}["verify"]
    assert (verify.workers, verify.serving, verify.running, verify.queued) == (2, 2, 10, 4)
    assert verify.kv_share == pytest.approx(0.4)
    assert verify.busy_share == pytest.approx(0.5)
    assert shown.workers[2].tokens_per_s == pytest.approx(8.0)


def test_workers_of_a_role_come_by_number_whatever_their_role_was() -> None:
    names = ["verify-10", "verify-2", "prefill-0", "spare"]
    telemetry = RouterTelemetry(workers=tuple(worker(name, Role.VERIFY) for name in names))
    shown = picture(FRONT, telemetry, History(2.0), (), 0.0)
    assert [each.worker for each in shown.workers] == ["prefill-0@3", "spare@3", "verify-2@3", "verify-10@3"]


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({}, "serving"),
        ({"accepting": False}, "draining"),
        ({"stalled_s": 6.0}, "stalled"),
        ({"heard_s": 3.5, "stalled_s": 6.0, "accepting": False}, "unreachable"),
    ],
)
def test_a_worker_is_in_its_gravest_state(changes: dict[str, object], state: str) -> None:
    telemetry = RouterTelemetry(workers=(worker("verify-0", Role.VERIFY, **changes),))
    shown = picture(FRONT, telemetry, History(2.0), (), 0.0)
    assert shown.workers[0].state == state
    assert {pool.role: pool.serving for pool in shown.pools}["verify"] == (state == "serving")


def test_attainment_is_of_requests_that_ended_and_points_without_any_are_none() -> None:
    line = scene().classes[0]
    assert line.series[0] is None
    assert line.series[1] == 1.0
    assert line.series[-1] == pytest.approx(0.25)
    assert line.attainment == pytest.approx((28 * 4 + 1) / (28 * 4 + 4))
    assert line.failed == 2
    assert line.ttft_s == pytest.approx(28 * 0.4 / (29 * 4))


def test_rates_leave_out_the_point_that_is_being_filled() -> None:
    shown = scene()
    assert shown.tokens[-1] == 29.0
    assert shown.tokens_per_s == pytest.approx(26.0)  # of points 24 to 28
    assert shown.arrivals_per_s == pytest.approx(2 * 4 / 2.0)


def test_the_picture_of_nothing_is_json_too() -> None:
    shown = picture(FRONT, RouterTelemetry(), History(2.0), (), 0.0)
    document = json.loads(json.dumps(asdict(shown), allow_nan=False))
    assert document["workers"] == []
    assert [pool["workers"] for pool in document["pools"]] == [0, 0, 0]


def test_json_holds_what_the_picture_holds() -> None:
    document = json.loads(json.dumps(asdict(scene()), allow_nan=False))
    assert document["decisions"][0] == {
        "at": 1e9 + 2,
        "reason": "prefill_is_short",
        "changes": ["verify-1: verify -> prefill"],
        "loads": {"prefill": 1.4},
    }


@pytest.mark.parametrize("workers", [0, 1, 4, 6, 40])
@pytest.mark.parametrize("classes", [0, 2, 9])
@pytest.mark.parametrize("decisions", [0, 12])
def test_it_fits_80_columns_and_24_lines(workers: int, classes: int, decisions: int) -> None:
    lines = drawn(scene(workers, classes, decisions))
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80


def test_what_matters_can_be_read_at_80_columns() -> None:
    text = "\n".join(drawn(scene()))
    for word in (
        "verify-0",
        "prefill-1",
        "draft-3",
        "serving",
        "40%",
        "4.0ms",
        "class-0",
        "97%",
        "26 tok/s",
        "7 active",
    ):
        assert word in text, word
    assert "prefill is short  verify-1: verify → prefill" in text


def test_with_little_room_every_pool_and_whoever_is_in_trouble_is_shown() -> None:
    shown = scene(40)
    ill = replace(shown.workers[-1], state="stalled")
    text = "\n".join(drawn(replace(shown, workers=(*shown.workers[:-1], ill))))
    assert all(role in text for role in ("prefill (10)", "draft (10)", "verify (20)"))
    assert "stalled" in text
    assert ill.worker.partition("@")[0] in text


def test_a_higher_terminal_shows_more() -> None:
    assert len(drawn(scene(40), height=60)) > 40


@given(st.lists(st.none() | st.floats(0, 2, allow_nan=False), max_size=60), st.floats(0.1, 2))
def test_sparklines_have_a_character_a_point(series: list[float | None], top: float) -> None:
    line = sparkline(tuple(series), top)
    assert len(line) == len(series)
    assert [each == "·" for each in line] == [each is None for each in series]


def test_full_marks_are_only_for_all() -> None:
    assert percent(0.9999) == "99%"
    assert percent(1.0) == "100%"
    assert bar(0.5, 10) == "━" * 5 + "╌" * 5


@given(st.lists(st.floats(0, 200), max_size=100), st.integers(1, 40))
def test_points_of_a_window_are_those_of_its_last_steps(times: list[float], count: int) -> None:
    window: Sliding[Traffic] = Sliding(Traffic(), 60.0)
    for each in sorted(times):
        window.add(Traffic(arrived=1), each)
    now = max(times, default=0.0)
    points = window.points(min(count, 30), 2.0, now)
    first = (int(now // 2.0) - min(count, 30) + 1) * 2.0
    assert len(points) == min(count, 30)
    assert sum(each.arrived for each in points) == sum(each >= first for each in times)
