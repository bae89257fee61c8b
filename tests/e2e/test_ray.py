"""The whole thing on Ray, as an operator and an application meet it: the command line, the client, kill -9."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster import serve_app
from tests.support.engines import bundled_engine, one_by_one
from tests.support.operator import Operator
from tidemill import Client
from tidemill.core.model import Request
from tidemill.core.settings import EngineSettings
from tidemill.core.text import load_tokenizer
from tidemill.types import SamplingParams

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def operator(tmp_path: Path) -> Operator:
    return Operator(tmp_path)


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    """A running cluster; when it is taken down nothing it started is left."""
    operator = Operator(tmp_path_factory.mktemp("cluster"))
    done = operator.run("up", "-c", str(operator.config))
    assert done.returncode == 0, done.stderr
    pids = {worker["pid"] for worker in operator.status()["workers"]}
    head = json.loads((Path(operator.env["XDG_STATE_HOME"]) / "tidemill" / "test.json").read_text())
    processes = [psutil.Process(head["head_pid"]), *psutil.Process(head["head_pid"]).children(recursive=True)]
    yield operator
    done = operator.run("down", "--name", "test")
    assert done.returncode == 0, done.stderr
    _, alive = psutil.wait_procs(processes, timeout=5)
    assert not alive, f"left running: {alive}"
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert not Path(head["folder"]).exists()
    assert "no cluster 'test' is up" in operator.run("down", "--name", "test").stderr


def test_generate_prints_the_answer(up: Operator) -> None:
    address = f"127.0.0.1:{up.port}"
    done = up.run("generate", "def fib(n):", "--max-tokens", "24", "--address", address, "--stats")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert re.search(r"24 tokens, TTFT [\d.]+ ms", done.stderr)
    again = up.run("generate", "-", "--max-tokens", "24", "--address", address, stdin="def fib(n):")
    assert again.stdout == done.stdout
    wrong = up.run("generate", "x", "--temperature", "-1", "--address", address)
    assert (wrong.returncode, "temperature is -1" in wrong.stderr) == (1, True)


def test_status_shows_every_worker(up: Operator) -> None:
    status = up.status()
    roles = sorted(worker["role"] for worker in status["workers"])
    assert roles == ["draft", "prefill", "verify", "verify"]
    assert {worker["state"] for worker in status["workers"]} == {"serving"}
    up.env["COLUMNS"] = "80"
    shown = up.run("status", "--name", "test").stdout
    up.env["COLUMNS"] = "200"
    for worker in status["workers"]:
        (line,) = [line for line in shown.splitlines() if line.startswith(worker["worker"].partition("@")[0])]
        assert {worker["role"], "serving", str(worker["pid"]), worker["metrics_address"]} <= set(line.split())


def test_top_and_trace_tell_of_the_requests(up: Operator) -> None:
    with Client(f"127.0.0.1:{up.port}") as client:
        served = client.generate("def f(x):" * 20, max_tokens=5).summary
    picture = json.loads(up.run("top", "--name", "test", "--once", "--json").stdout)
    assert picture["front"]["address"] == up.status()["address"]
    assert [each["role"] for each in picture["workers"]] == ["prefill", "draft", "verify", "verify"]
    assert picture["classes"][0]["finished"] >= 1
    assert picture["decisions"], "the controller tells the router of its decisions"
    assert "verify-1" in up.run("top", "--name", "test", "--once").stdout
    trace = json.loads(up.run("trace", served.request_id, "--name", "test", "--json").stdout)
    assert trace["output_tokens"] == 5
    assert {span["worker"] for span in trace["spans"]} >= {served.route.verify_worker, served.route.prefill_worker}
    assert trace["timing"]["ttft_s"] == pytest.approx(served.timing.ttft_s)
    assert served.request_id in up.run("trace", "--name", "test").stdout
    unknown = up.run("trace", "nonesuch", "--name", "test")
    assert (unknown.returncode, "does not remember a request 'nonesuch'" in unknown.stderr) == (1, True)


@pytest.mark.parametrize(("keys", "expected"), [(b"q", 0), (b"\x03", 130)])
def test_top_draws_until_told_to_end_and_leaves_the_terminal_as_it_was(
    up: Operator, keys: bytes, expected: int
) -> None:
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    process = subprocess.Popen(
        ["setsid", "--ctty", str(Path(sys.executable).parent / "tidemill"), "top", "--name", "test"],
        env=up.env | {"TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    seen = b""
    while seen.count(b"goals kept") < 2:
        assert select.select([ours], [], [], 30)[0], seen
        seen += os.read(ours, 65536)
    os.write(ours, keys)
    while process.poll() is None:
        if select.select([ours], [], [], 0.1)[0]:
            seen += os.read(ours, 65536)
    while select.select([ours], [], [], 0.1)[0]:
        seen += os.read(ours, 65536)
    assert process.returncode == expected
    assert b"Traceback" not in seen
    assert seen.count(b"\x1b[?1049h") == seen.count(b"\x1b[?1049l") == 1, "the screen that was there is shown again"
    assert termios.tcgetattr(theirs) == before
    os.close(ours)
    os.close(theirs)


def test_second_up_says_so(up: Operator) -> None:
    done = up.run("up", "-c", str(up.config))
    assert done.returncode == 1
    assert "is up already" in done.stderr
    assert up.status()["workers"]


def test_a_role_changes_and_changes_back(up: Operator) -> None:
    for to in ("prefill", "verify"):
        done = up.run("role", "verify-1", to, "--name", "test")
        assert done.returncode == 0, done.stderr
        assert f"is a {to} worker now" in done.stdout
        with Client(f"127.0.0.1:{up.port}") as client:
            assert client.generate("def f(x):" * 20, max_tokens=5).summary.output_tokens == 5
    assert "there is no worker 'verify-9'" in up.run("role", "verify-9", "draft", "--name", "test").stderr


def test_a_verify_actor_killed_mid_stream_costs_no_token_and_comes_back(up: Operator, prompts: list[str]) -> None:
    tokenizer = load_tokenizer(ROOT / "models" / "target")
    ids = [tuple(tokenizer.encode(prompt).ids) for prompt in prompts[:6]]
    params = [SamplingParams(max_tokens=100, temperature=0.8, seed=i, ignore_eos=True) for i in range(len(ids))]
    engine = bundled_engine(ROOT / "models", EngineSettings(dtype="float32"))
    plain = one_by_one(engine, [Request(str(i), ids[i], params[i]) for i in range(len(ids))])
    victim = next(worker for worker in up.status()["workers"] if worker["worker"].startswith("verify-0@"))
    killed = threading.Event()

    def one(index: int) -> tuple[tuple[int, ...], int]:
        found: tuple[int, ...] = ()
        for chunk in client.stream(ids[index], params[index]):
            found += chunk.tokens
            if len(found) > 5 and not killed.is_set():
                killed.set()
                os.kill(victim["pid"], signal.SIGKILL)
        assert chunk.summary is not None
        return found, chunk.summary.route.retries

    with Client(f"127.0.0.1:{up.port}") as client, ThreadPoolExecutor(len(ids)) as threads:
        answers = list(threads.map(one, range(len(ids))))
    assert [found for found, _ in answers] == [plain[str(i)] for i in range(len(ids))]
    assert any(retries for _, retries in answers), "the kill hit nobody"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        workers = {w["worker"]: w["state"] for w in up.status()["workers"] if w["role"] == "verify"}
        if list(workers.values()) == ["serving"] * 2 and victim["worker"] not in workers:
            return
    pytest.fail(f"the killed worker did not come back: {workers}")


def test_workers_come_and_go_while_requests_run(up: Operator) -> None:
    """A stream that runs through both is not disturbed, though its worker may be the one that leaves."""
    before = {worker["worker"] for worker in up.status()["workers"]}
    params = SamplingParams(max_tokens=600, seed=1, temperature=0.8, ignore_eos=True)
    with Client(f"127.0.0.1:{up.port}") as client, ThreadPoolExecutor(4) as threads:
        streams = [threads.submit(client.generate, "def f(x):", params) for _ in range(4)]
        done = up.run("scale", "verify=3", "draft=0", "--name", "test")
        assert done.returncode == 0, done.stderr
        assert "verify-2 serves as a verify worker" in done.stderr
        assert "draft-0 has drained and is gone" in done.stderr
        answers = {stream.result().tokens for stream in streams}
    assert len(answers) == 1, "the same request has the same tokens, wherever it ran"
    done = up.run("scale", "verify=2", "draft=1", "--name", "test")
    assert done.returncode == 0, done.stderr
    status = up.status()
    assert sorted(worker["role"] for worker in status["workers"]) == ["draft", "prefill", "verify", "verify"]
    assert len(before - {worker["worker"] for worker in status["workers"]}) >= 1
    assert status["controller"]["decisions"], "the policy looks on"
    assert "no verify worker would be left" in up.run("scale", "verify=0", "--name", "test").stderr
    assert "is not ROLE=COUNT" in up.run("scale", "verify:3", "--name", "test").stderr


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"bogus": 1}, "bogus: unknown key"),
        ({"pools": {"verify": "two"}}, "pools.verify: Input should be a valid integer"),
        ({"target": {"path": "/nowhere"}}, "/nowhere"),
    ],
)
def test_up_with_settings_that_cannot_be(operator: Operator, changes: dict[str, Any], said: str) -> None:
    operator.write(**changes)
    done = operator.run("up", "-c", str(operator.config))
    assert done.returncode == 1
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_up_with_a_truncated_model_leaves_nothing(operator: Operator, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in (ROOT / "models" / "target").iterdir():
        data = file.read_bytes()
        (broken / file.name).write_bytes(data[: len(data) // 2] if file.suffix == ".safetensors" else data)
    operator.write(target={"path": str(broken)})
    done = operator.run("up", "-c", str(operator.config))
    assert done.returncode == 1
    assert "is truncated or not a safetensors file" in " ".join(done.stderr.split())
    assert "no cluster 'test' is up" in operator.run("down", "--name", "test").stderr


def test_up_with_a_port_in_use(up: Operator, operator: Operator) -> None:
    operator.write(name="other", router={"port": up.port})
    done = operator.run("up", "-c", str(operator.config))
    assert done.returncode == 1
    assert "is the port in use?" in " ".join(done.stderr.split())
    assert "no cluster 'other' is up" in operator.run("down", "--name", "other").stderr


def test_the_keeper_in_ray_serve_raises_what_a_command_said() -> None:
    with pytest.raises(RuntimeError, match="no cluster 'nonesuch-at-all' is up"):
        serve_app._tidemill("down", "--name", "nonesuch-at-all")


@pytest.mark.parametrize("command", ["up", "down", "status", "role", "scale", "generate", "demo"])
def test_help(operator: Operator, command: str) -> None:
    done = operator.run(command, "--help")
    assert done.returncode == 0
    assert "Usage: tidemill" in done.stdout
