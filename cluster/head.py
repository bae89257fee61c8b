"""A Ray head of our own on this machine, for when the settings name no cluster: started and ended by its process id.

It listens on loopback only, and wants a token besides.
"""

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 8.0
LOOPBACK = "127.0.0.1"
# Otherwise Ray takes 127.0.0.1 for the address that other machines know this one by, and listens on all it has.
STAY_ON_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
CPUS = 64  # actors ask for none or little; what a small machine has is shared


class HeadError(RuntimeError):
    """Ray did not start; the message holds the end of its log."""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        return int(listener.getsockname()[1])


def choose_token() -> str:
    """For Ray's token authentication: nobody else on this machine may use the head.

    Ray remembers the first that a process used, so a second head of the same process gets that too.
    """
    return os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32)


def use_token(token: str) -> None:
    """Ray reads it from the environment, in this process and in those it starts."""
    os.environ["RAY_AUTH_TOKEN"] = token


@dataclass(frozen=True, slots=True)
class Head:
    """All that it starts stays in the session that `process` leads."""

    address: str
    process: subprocess.Popen[bytes]
    log: Path


def start_head(folder: Path, gpus: int = 0) -> Head:
    """It does not answer yet. Sessions and logs go to `folder`."""
    address = f"{LOOPBACK}:{free_port()}"
    command = [
        str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", f"--node-ip-address={LOOPBACK}",
        f"--port={address.rpartition(':')[2]}", "--dashboard-agent-listen-port=0",
        f"--ray-client-server-port={free_port()}", "--include-dashboard=false", "--include-log-monitor=false",
        "--no-monitor", "--disable-usage-stats", f"--num-cpus={CPUS}", f"--num-gpus={gpus}", f"--temp-dir={folder}",
    ]  # fmt: skip
    log_path = folder / "ray-head.log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | STAY_ON_LOOPBACK,
        )
    return Head(address, process, log_path)


def wait_until_answers(head: Head) -> None:
    """Raises HeadError if it ends, or says nothing for too long."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while head.process.poll() is None and time.monotonic() < deadline:
        if answers(head.address):
            return
        time.sleep(0.1)
    raise HeadError(f"Ray did not start; the end of its log:\n{head.log.read_text(errors='replace')[-2000:]}")


def answers(address: str) -> bool:
    """Somebody listens there."""
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        probe.settimeout(0.2)
        return probe.connect_ex((host, int(port))) == 0


def is_running(pid: int, folder: str) -> bool:
    """True while the head with this process id and folder is there, or anything of it that outlived its `kill -9`."""
    return any(_is_rays(process, folder) for process in _session(pid))


def _is_rays(process: psutil.Process, folder: str) -> bool:
    """And not of whoever got the same process id after a restart of the machine."""
    try:
        line = " ".join(process.cmdline())
    except psutil.Error:
        return False
    return folder in line or line.startswith("ray::")


def _session(leader: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(OSError):
            if os.getsid(process.pid) == leader:
                found.append(process)
    return found


def _members(pid: int) -> list[psutil.Process]:
    """The head, its session, and what these have started in sessions of their own."""
    found = dict.fromkeys(_session(pid))
    with contextlib.suppress(psutil.NoSuchProcess):
        found[psutil.Process(pid)] = None
    for process in list(found):
        with contextlib.suppress(psutil.NoSuchProcess):
            found |= dict.fromkeys(process.children(recursive=True))
    return list(found)


def stop_head(pid: int) -> None:
    """End the head and every process it started; first asked, then told."""
    processes = _members(pid)
    for process in processes:
        _send(process, signal.SIGTERM)
    _, alive = psutil.wait_procs(processes, timeout=STOP_TIMEOUT_S / 4)
    alive = list(dict.fromkeys([*alive, *_members(pid)]))
    for process in alive:
        _send(process, signal.SIGKILL)
    psutil.wait_procs(alive, timeout=STOP_TIMEOUT_S)


def _send(process: psutil.Process, number: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)
