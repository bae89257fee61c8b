"""A Ray head of our own on this machine, for when the settings name no cluster: started and ended by its process id."""

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 8.0
CPUS = 64  # actors ask for none or little; what a small machine has is shared


class HeadError(RuntimeError):
    """Ray did not start; the message holds the end of its log."""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def new_token() -> str:
    """For Ray's token authentication: nobody else on this machine may use the head."""
    return secrets.token_hex(32)


def use_token(token: str) -> None:
    """Ray reads it from the environment, in this process and in those it starts."""
    os.environ["RAY_AUTH_TOKEN"] = token


def start_head(folder: Path, gpus: int = 0) -> tuple[str, int]:
    """(address, process id). Sessions and logs go to `folder`. Raises HeadError."""
    port = free_port()
    address = f"127.0.0.1:{port}"
    log_path = folder / "ray-head.log"
    command = [
        str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1",
        f"--port={port}", "--include-dashboard=false", "--disable-usage-stats", f"--num-cpus={CPUS}",
        f"--num-gpus={gpus}", f"--temp-dir={folder}",
    ]  # fmt: skip
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        if _wait_until_answers(process, port):
            return address, process.pid
    except BaseException:  # interrupted: nobody else knows of it yet
        stop_head(process.pid)
        raise
    stop_head(process.pid)
    raise HeadError(f"Ray did not start; the end of its log:\n{log_path.read_text(errors='replace')[-2000:]}")


def _wait_until_answers(process: subprocess.Popen[bytes], port: int) -> bool:
    deadline = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        if _answers(port):
            return True
        time.sleep(0.1)
    return False


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.2)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def is_running(pid: int) -> bool:
    """True if the head with this process id is there."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE and "ray" in " ".join(psutil.Process(pid).cmdline())
    except psutil.Error:
        return False


def stop_head(pid: int) -> None:
    """End the head and every process it started; first asked, then told."""
    try:
        head = psutil.Process(pid)
        processes = [head, *head.children(recursive=True)]
    except psutil.NoSuchProcess:
        return
    for process in processes:
        _send(process, signal.SIGTERM)
    _, alive = psutil.wait_procs(processes, timeout=STOP_TIMEOUT_S / 4)
    for process in alive:
        _send(process, signal.SIGKILL)
    psutil.wait_procs(alive, timeout=STOP_TIMEOUT_S)


def _send(process: psutil.Process, number: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)
