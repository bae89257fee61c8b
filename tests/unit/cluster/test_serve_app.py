"""The replica that Ray Serve keeps, up to where it leaves this process: its health, and the commands it gives."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from cluster import serve_app
from cluster.serve_app import Keeper, check

SERVES = {"role": "verify", "state": "serving"}


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "settings.yaml"
    path.write_text("name: kept\ntarget: {path: target}\npools: {draft: 0}\nrouter: {replicas: 2, port: 7071}\n")
    return str(path)


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    given: list[tuple[str, ...]] = []
    monkeypatch.setattr(serve_app, "_tidemill", lambda *arguments: given.append(arguments))
    return given


@pytest.mark.parametrize(
    ("routers", "cause"),
    [
        ([], "no router answers"),
        ([{"workers": []}], "no verify worker serves"),
        ([{"workers": [{"role": "prefill", "state": "serving"}]}], "no verify worker serves"),
        ([{"workers": [{"role": "verify", "state": "unreachable"}]}] * 2, "no verify worker serves"),
    ],
)
def test_unhealthy_is_who_can_serve_nobody(routers: list[dict[str, Any]], cause: str) -> None:
    with pytest.raises(RuntimeError, match=cause):
        check(routers)


def test_one_router_and_one_verify_worker_are_enough() -> None:
    check([{"workers": [{"role": "verify", "state": "unreachable"}]}, {"workers": [SERVES]}])


def test_it_brings_its_cluster_up_and_takes_it_down(config: str, commands: list[tuple[str, ...]]) -> None:
    keeper = Keeper(config)
    assert commands == [("up", "--if-down", "--config", config)]
    keeper.__del__()
    assert commands[1:] == [("down", "--name", "kept")]


def test_it_asks_every_router(config: str, commands: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    keeper = Keeper(config)
    answers: dict[str, Any] = {"router-0": None, "router-1": {"workers": [SERVES]}}

    async def describe(_: Keeper, router: str) -> dict[str, Any] | None:
        return answers.pop(router)

    monkeypatch.setattr(Keeper, "_describe", describe)
    asyncio.run(keeper.check_health())
    assert not answers


def test_one_whose_settings_are_wrong_takes_nothing_down(tmp_path: Path, commands: list[tuple[str, ...]]) -> None:
    with pytest.raises(Exception, match="nonesuch"):
        Keeper(str(tmp_path / "nonesuch.yaml"))
    assert not commands
