"""Two routers over the same pools on Ray: one is killed, one is stopped, the controller is killed; nobody notices."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.support.operator import Operator
from tidemill import Client, SamplingParams

PARAMS = SamplingParams(max_tokens=300, temperature=0.8, seed=5, ignore_eos=True, logprobs=2)
CLIENTS = 6
pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    operator = Operator(tmp_path_factory.mktemp("cluster"))
    operator.write(router={"port": 0, "replicas": 2}, pools={"prefill": 1, "draft": 0, "verify": 2})
    done = operator.run("up", "-c", str(operator.config))
    assert done.returncode == 0, done.stderr
    yield operator
    done = operator.run("down", "--name", "test")
    assert done.returncode == 0, done.stderr


def addresses(up: Operator) -> list[str]:
    return [each["address"] for each in up.status()["routers"]]


def streams_through(up: Operator, disturb: Callable[[], object]) -> list[tuple[str, Any, Any]]:
    """Text, tokens and logprobs of several streams; `disturb` happens when some of their tokens are here."""
    begun = threading.Barrier(CLIENTS + 1)

    def one(index: int) -> tuple[str, Any, Any]:
        chunks = []
        with Client(where, timeout=60.0, stall=2.0) as client:
            for chunk in client.stream(f"def f{index % 2}(x):", PARAMS):
                chunks.append(chunk)
                if len(chunks) == 3:
                    begun.wait(30.0)
        assert chunks[-1].summary is not None
        assert chunks[-1].summary.output_tokens == 300
        whole = ((token, each) for chunk in chunks for token, each in zip(chunk.tokens, chunk.logprobs, strict=True))
        tokens, logprobs = zip(*whole, strict=True)
        return "".join(chunk.text for chunk in chunks), tokens, logprobs

    where = addresses(up)
    with ThreadPoolExecutor(CLIENTS) as threads:
        running = [threads.submit(one, index) for index in range(CLIENTS)]
        begun.wait(60.0)
        disturb()
        return [each.result() for each in running]


def undisturbed(up: Operator) -> list[tuple[str, Any, Any]]:
    return streams_through(up, lambda: None)


def router(up: Operator, index: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = up.status()["routers"][index]
    return found


def test_a_router_killed_under_load_costs_nothing_and_comes_back(up: Operator) -> None:
    plain, victim = undisturbed(up), router(up)
    assert streams_through(up, lambda: os.kill(victim["pid"], signal.SIGKILL)) == plain
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with Client(victim["address"], timeout=5.0, retries=0) as client:
            if client.health():
                break
        time.sleep(0.2)
    assert router(up)["address"] == victim["address"]
    assert router(up)["pid"] != victim["pid"]
    with Client(victim["address"]) as client:
        assert client.generate("def f0(x):", PARAMS).tokens == plain[0][1]
    held = [each["kv_blocks_used"] + each["kv_blocks_leased"] for each in up.status()["workers"]]
    assert held == [0] * 3, "what the dead router's requests held is released"


def test_a_router_stopped_under_load_costs_nothing(up: Operator) -> None:
    plain, victim = undisturbed(up), router(up, 1)
    try:
        began = time.monotonic()
        assert streams_through(up, lambda: os.kill(victim["pid"], signal.SIGSTOP)) == plain
        assert time.monotonic() - began < 30
    finally:
        os.kill(victim["pid"], signal.SIGCONT)


def test_the_controller_killed_under_load_is_rebuilt(up: Operator) -> None:
    plain = undisturbed(up)
    members = {each["worker"] for each in up.status()["workers"]}
    victim = up.status()["controller"]["pid"]
    assert streams_through(up, lambda: os.kill(victim, signal.SIGKILL)) == plain
    picture = json.loads(up.run("top", "--name", "test", "--once", "--json").stdout)
    assert picture["front"]["address"] == ",".join(addresses(up))
    assert sum(each["finished"] for each in picture["classes"]) >= 2 * CLIENTS, "of both routers"
    status = up.status()
    assert status["controller"]["pid"] != victim
    assert {each["worker"] for each in status["workers"]} == members
    done = up.run("role", "verify-1", "prefill", "--name", "test")
    assert done.returncode == 0, done.stderr
    assert up.run("role", "verify-1", "verify", "--name", "test").returncode == 0
