"""The list of targets: what is in it, and that whoever reads it never finds a part."""

import json
from pathlib import Path
from typing import Any

import pytest

from cluster import discovery
from cluster.discovery import Targets, targets, write_atomically
from cluster.pools import WorkerReport
from tests.support.scripted_worker import router_settings
from tidemill.core.model import Peer, Role, WorkerId
from tidemill.core.settings import MetricsSettings, Settings


def report(name: str, port: int, epoch: int = 1) -> WorkerReport:
    return WorkerReport(Peer(WorkerId(name, epoch), "10.0.0.1:1"), Role.VERIFY, 1, f"10.0.0.1:{port}")


def settings(path: Path | None) -> Settings:
    return router_settings().model_copy(update={"name": "prod", "metrics": MetricsSettings(targets_file=path)})


def read(path: Path) -> dict[str, str]:
    """Worker to address."""
    groups: list[dict[str, Any]] = json.loads(path.read_text())
    return {group["labels"]["worker"]: group["targets"][0] for group in groups}


def test_the_list() -> None:
    assert json.loads(
        targets("prod", "https", {"router": "10.0.0.9:9000"}, {"verify-0": "10.0.0.1:9001", "draft-0": ""})
    ) == [
        {
            "targets": ["10.0.0.9:9000"],
            "labels": {"__scheme__": "https", "cluster": "prod", "component": "router", "worker": "router"},
        },
        {
            "targets": ["10.0.0.1:9001"],
            "labels": {"__scheme__": "https", "cluster": "prod", "component": "worker", "worker": "verify-0"},
        },
    ]


def test_workers_come_move_fall_silent_and_go(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "prod.json"
    list_ = Targets(settings(path))
    list_.refresh({"router": "h:1"}, {"verify-0": report("verify-0", 7), "verify-1": None})
    assert read(path) == {"router": "h:1", "verify-0": "10.0.0.1:7"}
    list_.refresh({"router": "h:1"}, {"verify-0": None, "verify-1": report("verify-1", 8)})
    assert read(path) == {"router": "h:1", "verify-0": "10.0.0.1:7", "verify-1": "10.0.0.1:8"}
    list_.refresh({"router": "h:1"}, {"verify-0": report("verify-0", 9, epoch=2)})
    assert read(path) == {"router": "h:1", "verify-0": "10.0.0.1:9"}
    list_.remove()
    list_.remove()
    assert list(path.parent.iterdir()) == []


def test_nothing_is_written_while_nothing_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(discovery, "write_atomically", lambda _, text: written.append(text))
    list_ = Targets(settings(tmp_path / "prod.json"))
    for _ in range(5):
        list_.refresh({"router": "h:1"}, {"verify-0": report("verify-0", 7)})
    assert len(written) == 1


def test_no_file_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    list_ = Targets(settings(None))
    list_.refresh({"router": "h:1"}, {"verify-0": report("verify-0", 7)})
    list_.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "prod.json"
    write_atomically(path, "old")

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_costs_nobody_anything(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    Targets(settings(tmp_path / "file" / "prod.json")).refresh({"router": "h:1"}, {})
