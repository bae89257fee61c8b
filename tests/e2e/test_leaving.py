"""How a cluster ends, and what it shows meanwhile: drained, whole, with nothing left, on loopback, its secrets kept."""

import contextlib
import json
import re
import signal
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.certificates import Authority
from tests.support.operator import ROOT, Operator
from tidemill import Client, TidemillError, Tls, Unauthenticated, Unavailable
from tidemill.core.settings import NodeTlsSettings

pytestmark = pytest.mark.timeout(240)
TOKEN = "t0p-s3cret-b3arer-t0ken"
DRAIN_S, AFTER_DRAIN_S = 3.0, 45.0  # the second for a crowded machine: an idle one needs some 5 s
SHARED_MEMORY = Path("/dev/shm")
ANSWER = 60  # tokens


@dataclass(frozen=True, slots=True)
class Traces:
    """What a running cluster has of the machine: has to be gone when it is down."""

    processes: list[psutil.Process]
    shared: set[Path]
    folder: Path
    home: str  # of its state, which all that it starts inherit

    @classmethod
    def of(cls, operator: Operator, name: str = "test") -> "Traces":
        state = json.loads(state_file(operator, name).read_text())
        head = psutil.Process(state["head_pid"])
        processes = [head, *head.children(recursive=True)]
        pids = {str(process.pid) for process in processes}
        named = {
            path
            for path in SHARED_MEMORY.iterdir()
            if pids & set(re.findall(r"\d+", path.name)) and path.stat().st_mtime >= head.create_time()  # not others'
        }
        mapped = {
            Path(line.split()[5])
            for pid in pids
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines()
            if f" {SHARED_MEMORY}/" in line and "(deleted)" not in line
        }
        return cls(processes, named | mapped, Path(state["folder"]), operator.env["XDG_STATE_HOME"])

    def assert_ended(self) -> None:
        """What another cluster at the same address does not have as well."""
        _, alive = psutil.wait_procs(self.processes, timeout=5)
        assert not alive, f"left running: {alive}"
        assert not self.folder.exists()

    def assert_gone(self) -> None:
        """Nor is there a process anywhere that came of it, and so no port that one listens at."""
        self.assert_ended()
        wait_until(lambda: not list(started_with(self.home)), seconds=10)
        assert not [path for path in self.shared if path.exists()]


def started_with(home: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("XDG_STATE_HOME") == home:
                yield process


def state_file(operator: Operator, name: str) -> Path:
    return Path(operator.env["XDG_STATE_HOME"]) / "tidemill" / f"{name}.json"


def listening(processes: list[psutil.Process]) -> Iterator[Any]:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN or (
                    connection.type.name == "SOCK_DGRAM" and not connection.raddr
                ):
                    yield connection


def is_loopback(address: str) -> bool:
    return ip_address(address.removeprefix("::ffff:")).is_loopback


@contextlib.contextmanager
def started(operator: Operator, *command: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """A command in the foreground; ended, should it still run when the test has failed."""
    process = subprocess.Popen(
        [str(Path(sys.executable).parent / "tidemill"), *command, "-c", str(operator.config)],
        env=operator.env | environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=60)


@pytest.fixture
def operator(tmp_path: Path) -> Operator:
    return Operator(tmp_path)


# --- a command that owns its cluster ----------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_demonstration_told_to_end_takes_its_cluster_along(operator: Operator, number: signal.Signals) -> None:
    """While it runs all that it listens on is loopback: router, controller, workers, their links, and Ray's own."""
    with started(operator, "demo", "--requests", "200", "--max-tokens", "400") as demo:
        address = wait_for_router(operator, "test-demo", demo)
        with Client(address) as client:
            assert client.generate("def f(x):", max_tokens=5).summary.output_tokens == 5
        traces = Traces.of(operator, "test-demo")
        found = {each.laddr for each in listening(traces.processes)}
        assert len(found) > 30, "Ray has some 20, then there are a router, a controller and four workers"
        strangers = [each for each in found if not is_loopback(each.ip)]
        assert not strangers
        demo.send_signal(number)
        said, _ = demo.communicate(timeout=30)
        assert demo.returncode != 0
    assert "everything is down" in said
    assert "Traceback" not in said
    traces.assert_gone()
    assert not state_file(operator, "test-demo").exists()


def test_an_up_told_to_end_before_ray_is_there_leaves_nothing(operator: Operator, tmp_path: Path) -> None:
    folder = tmp_path / "t"
    folder.mkdir()
    with started(operator, "up", TMPDIR=str(folder)) as up:
        wait_until(lambda: psutil.Process(up.pid).children())
        children = psutil.Process(up.pid).children(recursive=True)
        up.send_signal(signal.SIGTERM)
        assert up.wait(30) == 128 + signal.SIGTERM
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive
    assert not list(folder.glob("tidemill-*"))
    assert not state_file(operator, "test").exists()


def test_an_up_interrupted_midway_takes_down_what_it_has_started(operator: Operator) -> None:
    with started(operator, "up") as up:
        wait_for_line(up, "starting the router and the workers")
        traces = Traces.of(operator)
        up.send_signal(signal.SIGINT)
        said, _ = up.communicate(timeout=30)
        assert up.returncode == 128 + signal.SIGINT
    assert said.endswith("everything is down\ninterrupted\n")
    traces.assert_gone()
    assert not state_file(operator, "test").exists()


def wait_for_line(process: subprocess.Popen[str], part: str) -> None:
    """Of what it prints, which is read up to there."""
    assert process.stdout is not None
    said = ""
    while part not in said:
        line = process.stdout.readline()
        assert line, said
        said += line


def wait_until(condition: Any, seconds: float = 90.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def wait_for_router(operator: Operator, name: str, process: subprocess.Popen[str]) -> str:
    """Its address, once the state file holds it."""
    found: list[str] = []

    def there() -> bool:
        assert process.poll() is None, process.stdout and process.stdout.read()
        with contextlib.suppress(OSError):
            found.append(json.loads(state_file(operator, name).read_text())["router_address"])
        return bool(found and found[-1])

    wait_until(there)
    return found[-1]


# --- one with secrets -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Guarded:
    """A cluster with TLS everywhere and a token."""

    operator: Operator
    nodes: NodeTlsSettings
    tls: Tls
    address: str
    secrets: tuple[str, ...]  # what nobody may read anywhere

    def client(self, token: str | None = TOKEN) -> Client:
        return Client(self.address, token=token, tls=self.tls, retries=0)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    """The module's last test takes it down."""
    folder = tmp_path_factory.mktemp("guarded")
    authority = Authority.in_folder(folder / "pem")
    nodes, front = authority.node(), authority.node("router", "127.0.0.1")
    token = folder / "token"
    token.write_text(f"{TOKEN}\n")
    operator = Operator(folder)
    router = {
        "port": operator.port,
        "tls": {"certificate": str(front.certificate), "key": str(front.key)},
        "token_file": str(token),
    }
    network = {"tls": {key: str(value) for key, value in nodes.model_dump().items()}}
    operator.write(router=router, network=network, deadlines={"drain_s": DRAIN_S})
    done = operator.run("up", "-c", str(operator.config))
    assert done.returncode == 0, done.stderr
    keys = [line for key in (nodes.key, front.key) for line in key.read_text().splitlines()[1:-1]]
    ray_token = json.loads(state_file(operator, "test").read_text())["ray_token"]
    address = f"127.0.0.1:{operator.port}"
    yield Guarded(operator, nodes, Tls(ca=authority.ca), address, (TOKEN, ray_token, *keys))
    operator.run("down", "--name", "test")


def scrape(address: str, nodes: NodeTlsSettings) -> str:
    context = ssl.create_default_context(cafile=str(nodes.ca))
    context.check_hostname = False
    context.load_cert_chain(nodes.certificate, nodes.key)
    with urllib.request.urlopen(f"https://{address}/metrics", context=context, timeout=5.0) as answer:
        return str(answer.read().decode())


def test_secrets_are_told_to_nobody(guarded: Guarded) -> None:
    """Neither by what went well nor by what was refused: metrics, errors, what commands print, all processes' logs."""
    operator = guarded.operator
    with guarded.client() as client:
        assert client.generate("def f(x):" * 20, max_tokens=5).summary.output_tokens == 5
    said = {}
    with guarded.client(TOKEN[:-1]) as client, pytest.raises(Unauthenticated) as refused:
        client.generate("x", max_tokens=2)
    said["error"] = f"{refused.value!r} {refused.value}"
    status = operator.status()
    said["status --json"] = json.dumps(status)
    for address in (status["metrics_address"], status["workers"][0]["metrics_address"]):
        said[f"metrics of {address}"] = scrape(address, guarded.nodes)
    assert "tidemill_" in said[f"metrics of {status['metrics_address']}"]
    for command in (("status",), ("top", "--once", "--json"), ("trace",), ("role", "nonesuch", "draft")):
        done = operator.run(*command, "--name", "test")
        said[" ".join(command)] = done.stdout + done.stderr
    again = operator.run("up", "-c", str(operator.config))
    said["a second up"] = again.stdout + again.stderr
    folder = Path(json.loads(state_file(operator, "test").read_text())["folder"])
    logs = [path for path in folder.rglob("*") if path.is_file()]
    assert any("router" in path.read_text(errors="replace") for path in logs if path.suffix == ".err"), logs
    said |= {str(path.relative_to(folder)): path.read_text(errors="replace") for path in logs}
    told = {where: secret for where, text in said.items() for secret in guarded.secrets if secret in text}
    assert not told
    assert state_file(operator, "test").stat().st_mode & 0o077 == 0, "the state file holds Ray's token"


def test_down_lets_requests_end_refuses_new_ones_and_leaves_nothing(guarded: Guarded) -> None:
    """Four clients ask for one short answer after the other: each is whole, until one is refused."""
    refused: list[type[TidemillError]] = []
    cut_off: list[str] = []
    begun = threading.Event()

    def ask(index: int) -> int:
        answers = 0
        with guarded.client() as client:
            while True:
                count = 0
                try:
                    for chunk in client.stream(f"def f{index}(x):", max_tokens=ANSWER, ignore_eos=True):
                        count += len(chunk.tokens)
                        begun.set()
                except TidemillError as error:
                    cut_off.extend([f"after {count} tokens: {error}"] * bool(count))
                    refused.append(type(error))
                    return answers
                assert count == ANSWER
                answers += 1

    with ThreadPoolExecutor(4) as threads:
        asking = [threads.submit(ask, index) for index in range(4)]
        assert begun.wait(30)
        traces = Traces.of(guarded.operator)
        start = time.monotonic()
        done = guarded.operator.run("down", "--name", "test")
        assert done.returncode == 0, done.stderr
        assert time.monotonic() - start < DRAIN_S + AFTER_DRAIN_S
        whole = sum(future.result(timeout=20) for future in asking)
    assert whole >= 4
    assert not cut_off
    assert set(refused) == {Unavailable}
    traces.assert_gone()
    assert not state_file(guarded.operator, "test").exists()


# --- kill -9 ----------------------------------------------------------------------------------------------------


def test_down_ends_a_ray_whose_up_was_killed_before_it_answered(operator: Operator) -> None:
    with started(operator, "up") as up:
        wait_until(state_file(operator, "test").exists)
        up.kill()
        up.wait()
    traces = Traces.of(operator)
    done = operator.run("down", "--name", "test")
    assert (done.returncode, "everything is down" in done.stderr) == (0, True), done.stderr
    traces.assert_gone()


def test_what_a_killed_up_left_is_replaced_and_what_a_killed_head_left_is_ended(operator: Operator) -> None:
    with started(operator, "up") as up:
        wait_for_line(up, "starting the router and the workers")
        up.kill()
        up.wait()
    left = Traces.of(operator)
    done = operator.run("up", "-c", str(operator.config))
    assert (done.returncode, "what is left of an `up` that did not finish" in done.stderr) == (0, True), done.stderr
    left.assert_ended()
    traces = Traces.of(operator)
    kept = operator.run("up", "-c", str(operator.config), "--if-down")
    assert (kept.returncode, f"the router listens at 127.0.0.1:{operator.port}" in kept.stdout) == (0, True)
    traces.processes[0].kill()
    told = operator.run("status", "--name", "test")
    assert told.returncode == 1
    assert re.search("has died; `tidemill down` ends what is left|no cluster 'test' is up", told.stderr), told.stderr
    operator.run("down", "--name", "test")
    traces.assert_gone()
    assert "no cluster 'test' is up" in operator.run("down", "--name", "test").stderr


# --- a head that died -------------------------------------------------------------------------------------------


def test_a_state_file_whose_head_is_gone_is_forgotten(operator: Operator, tmp_path: Path) -> None:
    folder = tmp_path / "session"
    folder.mkdir()
    with subprocess.Popen(["true"]) as gone:
        pass
    state = {
        "name": "test", "ray_address": "127.0.0.1:1", "ray_token": "x", "head_pid": gone.pid, "folder": str(folder),
        "router_address": "127.0.0.1:2", "workers": [],
    }  # fmt: skip
    for command in ("down", "status", "top"):
        path = state_file(operator, "test")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(state))
        done = operator.run(command, "--name", "test")
        assert (done.returncode, "no cluster 'test' is up" in done.stderr) == (1, True), done.stderr
        assert not path.exists()
        assert not folder.exists()
