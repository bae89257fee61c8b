"""deploy/ssh.yaml for real: `ray up` on three hosts, requests from a fourth, the loss of a host, `ray down`.

The files are those of deploy/; changed are the addresses of hosts and keys, the device (there is no GPU), and where the
code and its environment come from: the nodes clone this working tree, and use the environment that runs the test.

The hosts are network namespaces, or addresses of the loopback network where those are forbidden; `--hosts` chooses.
"""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.hosts import Host, Lab
from tests.support.loopback import LoopbackLab
from tests.support.namespaces import NamespaceLab, can_make_namespaces
from tests.support.prometheus import DEPLOY

ROOT = DEPLOY.parent
ENVIRONMENT = Path(sys.executable).parents[1]
PROMPTS, TOKENS = 8, 500
LABS: dict[str, type[Lab[Any]]] = {"namespaces": NamespaceLab, "loopback": LoopbackLab}
pytestmark = pytest.mark.timeout(600)


@dataclass(frozen=True, slots=True)
class Deployment:
    lab: Lab[Any]
    folder: Path  # the operator's copy of deploy/

    @property
    def head(self) -> Host:
        return self.lab.hosts["head"]

    def ray(self, *arguments: str) -> str:
        """`ray` as its documentation says to use it: from the folder of the cluster file."""
        command = f"cd {self.folder} && exec {ENVIRONMENT}/bin/ray {' '.join(arguments)}"
        return self.lab.operator.run("bash", "-c", command, timeout_s=280)

    def on_head(self, command: str) -> str:
        return self.head.run("bash", "-c", f"source ~/.bashrc; {command}")

    def status(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.on_head("tidemill status --name production --json"))
        return document

    def ask(self, max_tokens: int) -> list[str]:
        """The command of an application on the operator's machine, with a client's secrets."""
        client = self.folder / "secrets" / "client"
        return [
            *["env", f"PYTHONPATH={ROOT}", f"{ENVIRONMENT}/bin/python", "-m", "tests.support.ask"],
            *[f"{self.head.address}:7071", str(client / "router_token"), str(client / "ca.pem")],
            *[str(ROOT / "models" / "prompts.jsonl"), str(PROMPTS), str(max_tokens)],
        ]


def snapshot_of_the_working_tree(folder: Path) -> str:
    """A repository with one commit: what is here now, committed or not. Returns the commit."""

    def git(*arguments: str) -> str:
        who = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
        done = subprocess.run(
            ["git", "-C", str(folder), *who, *arguments], capture_output=True, text=True, check=True, timeout=60
        )
        return done.stdout

    listed = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    git("init", "--quiet")
    git("add", "--all")
    git("commit", "--quiet", "--message", "working tree")
    return git("rev-parse", "HEAD").strip()


def prepare(folder: Path, lab: Lab[Any], repository: Path) -> None:
    """The operator's copy of deploy/, changed as the module says."""
    shutil.copytree(DEPLOY, folder, ignore=shutil.ignore_patterns("secrets"))
    commit = snapshot_of_the_working_tree(repository)
    environment = lab.nodes_environment(ENVIRONMENT)
    (folder / "source.env").write_text(f"REPOSITORY={repository}\nCOMMIT={commit}\nENVIRONMENT={environment}\n")
    cluster = yaml.safe_load((folder / "ssh.yaml").read_text())
    head, *workers = (host.address for host in lab.hosts.values() if host is not lab.operator)
    cluster["provider"] |= {"head_ip": head, "worker_ips": workers}
    cluster["auth"] = {"ssh_user": "root", "ssh_private_key": str(lab.key)}
    (folder / "ssh.yaml").write_text(yaml.safe_dump(cluster))
    settings = yaml.safe_load((folder / "production.yaml").read_text())
    settings["engine"] = {"device": "cpu", "kv_blocks": 512}
    settings["ray"] |= {"gpus_per_worker": 0, "ready_s": 240}
    settings["router"]["max_retries"] = 3
    settings["deadlines"] = {"token_s": 5.0, "prefill_s": 10.0, "transfer_s": 10.0}
    (folder / "production.yaml").write_text(yaml.safe_dump(settings))
    subprocess.run([folder / "secrets.sh", lab.hosts["head"].address], check=True, capture_output=True)


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("up")
    kind = pytestconfig.getoption("--hosts") or ("namespaces" if can_make_namespaces() else "loopback")
    with LABS[kind](folder / "lab", ["head", "worker-1", "worker-2"]) as lab:
        repository = folder / "repository"
        repository.mkdir()
        deployment = Deployment(lab, folder / "deploy")
        prepare(deployment.folder, lab, repository)
        deployment.ray("up", "--yes", "ssh.yaml")
        yield deployment


def wait_until(holds: Callable[[], bool], what: str, timeout_s: float = 90.0, pause_s: float = 0.5) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(pause_s)


def host_of(worker: dict[str, Any]) -> str:
    return str(worker["metrics_address"]).rpartition(":")[0]


def test_workers_live_on_the_worker_hosts(deployment: Deployment) -> None:
    workers = deployment.status()["workers"]
    hosts = {name: host.address for name, host in deployment.lab.hosts.items()}
    assert {host_of(worker) for worker in workers} == {hosts["worker-1"], hosts["worker-2"]}
    assert len({host_of(worker) for worker in workers if worker["role"] == "verify"}) == 2
    targets = json.loads((deployment.head.home / "tidemill-run/targets/production.json").read_text())
    assert len(targets) == 6, "router, controller and four workers"
    assert {target["labels"]["__scheme__"] for target in targets} == {"https"}


def test_a_wrong_token_and_plain_text_are_refused(deployment: Deployment) -> None:
    (deployment.lab.operator.home / "wrong").write_text("wrong\n")
    ca = deployment.folder / "secrets/client/ca.pem"
    generate = f"PYTHONPATH={ROOT} {ENVIRONMENT}/bin/tidemill generate x --address {deployment.head.address}:7071"
    wrong = deployment.lab.operator.run("bash", "-c", f"{generate} --token-file ~/wrong --ca {ca} 2>&1 || true")
    assert "missing or wrong bearer token" in " ".join(wrong.split())
    plain = deployment.lab.operator.run("bash", "-c", f"{generate} --token-file ~/wrong 2>&1 || true")
    assert "error" in plain


def test_requests_survive_the_loss_of_a_host(deployment: Deployment) -> None:
    """Every request of the second round has the first round's tokens, though a host went while they were decoded."""
    operator = deployment.lab.operator
    undisturbed = json.loads(operator.run(*deployment.ask(TOKENS), timeout_s=90))
    started = operator.home / "tokens-are-coming"
    assert started.exists()
    assert any(answer["prefill"] for answer in undisturbed), "no KV travelled between workers"
    started.unlink()
    workers = deployment.status()["workers"]
    victim = deployment.lab.hosts["worker-2"]
    lost = {worker["worker"] for worker in workers if host_of(worker) == victim.address}
    asking = subprocess.Popen(operator.command(*deployment.ask(TOKENS)), stdout=subprocess.PIPE, text=True)
    wait_until(started.exists, "tokens to come", 30, 0.01)
    deployment.lab.lose(victim)
    output, _ = asking.communicate(timeout=100)
    disturbed = json.loads(output)
    assert [answer["tokens"] for answer in disturbed] == [answer["tokens"] for answer in undisturbed]
    assert any(answer["retries"] for answer in disturbed), "the loss hit nobody"

    def restored() -> bool:
        workers = deployment.status()["workers"]
        serving = {worker["worker"] for worker in workers if worker["state"] == "serving"}
        return len(serving) == 4 and not serving & lost

    wait_until(restored, "the lost workers to come back on the other host")
    assert {host_of(worker) for worker in deployment.status()["workers"]} == {deployment.lab.hosts["worker-1"].address}


def test_no_secret_is_shown(deployment: Deployment) -> None:
    secrets = [
        (deployment.folder / "secrets" / name).read_text().strip() for name in ("nodes/router_token", "ray_token")
    ]
    shown = json.dumps(deployment.status())
    for host in (deployment.head, deployment.lab.hosts["worker-1"]):
        shown += "".join(path.read_text(errors="replace") for path in (host.folder / "ray").rglob("*.log"))
        shown += "".join(path.read_text(errors="replace") for path in (host.folder / "ray").rglob("*.err"))
        shown += " ".join(host.processes().values())
    assert len(shown) > 10_000
    assert not [secret for secret in secrets if secret in shown]


def test_down_leaves_nothing(deployment: Deployment) -> None:
    """Drain, then stop; a worker node ends when it has been without its head for a while."""
    deployment.ray("exec", "ssh.yaml", "'tidemill down --name production'")
    assert not list((deployment.head.home / "tidemill-run/targets").iterdir())
    deployment.ray("down", "--yes", "ssh.yaml")
    left = [deployment.head, deployment.lab.hosts["worker-1"]]
    deadline = time.monotonic() + 60
    while running := [line for host in left for line in host.processes().values()]:
        assert time.monotonic() < deadline, running
        time.sleep(0.5)
    for host in left:
        assert host.listening() == [f"{host.address}:22"]
        assert host.shared_memory() == []
