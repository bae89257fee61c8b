"""Hosts for sandboxes that forbid namespaces: addresses of the loopback network, and one process tree each.

Process 1 of a host adopts what loses its parent, so everything that was ever started over its sshd descends from it:
that is the host's processes, and the loss of the host is their end. Connections are then reset, where those of a
machine that loses its power stay silent. What hosts share is what Ray would not share between machines:

- `ray stop` ends what it finds on the machine: here it is shown the host's own processes only;
- an address and folders that Ray finds out, and ports that it takes: here `ray start` is told;
- the home folder where a key is, which ssh asks the machine's list of users for: here it is told, too.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.support.hosts import Host, Lab
from tests.support.prometheus import tool

SHARED_MEMORY = Path("/dev/shm")
ADOPT = """
import ctypes, os, sys
PR_SET_CHILD_SUBREAPER = 36
assert ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1) == 0
os.execvp(sys.argv[1], sys.argv[1:])
"""
RAY = """#!{python}
import sys

import psutil
from ray.scripts.scripts import main

everywhere, init = psutil.process_iter, psutil.Process({init})


def of_this_host(*arguments):
    here = {{each.pid for each in init.children(recursive=True)}}
    return (each for each in everywhere(*arguments) if each.pid in here)


psutil.process_iter = of_this_host
if sys.argv[1] == "start":
    sys.argv += ["--node-ip-address={address}", "--temp-dir={ray}", "--dashboard-agent-listen-port=0"]
    sys.argv += ["--min-worker-port=0", "--max-worker-port=0"]
main()
"""
SSH = """#!/bin/bash
exec {ssh} "${{@/#\\~\\/{key}/$HOME/{key}}}"
"""
RAYS_KEY = "ray_bootstrap_key.pem"  # in the head's home folder


@dataclass(slots=True)
class LoopbackHost(Host):
    """`near` is its folder again, under a short name: Ray puts sockets there, whose paths are limited."""

    near: Path = Path()
    shared_before: frozenset[str] = frozenset()

    def environment(self) -> dict[str, str]:
        return Host.environment(self) | {"RAY_TMPDIR": str(self.near)}

    def _enter(self) -> list[str]:
        return []

    def _members(self) -> Iterator[int]:
        return (each.pid for each in psutil.Process(self.init).children(recursive=True))

    def listening(self) -> list[str]:
        found = []
        for pid in self._members():
            with contextlib.suppress(psutil.NoSuchProcess):
                sockets = psutil.Process(pid).net_connections("tcp")
                found += [each.laddr for each in sockets if each.status == psutil.CONN_LISTEN]
        return sorted({f"{address.ip}:{address.port}" for address in found})

    def shared_memory(self) -> list[str]:
        """The machine's, since the host was made."""
        return sorted(set(os.listdir(SHARED_MEMORY)) - self.shared_before)

    def power_off(self) -> None:
        if self.init is None:
            return
        init = psutil.Process(self.init)
        init.suspend()  # it still adopts, and starts nothing
        while alive := [each for each in init.children(recursive=True) if _is_alive(each)]:
            for each in alive:
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.send_signal(signal.SIGKILL)
            time.sleep(0.01)
        init.kill()
        self.init = None


class LoopbackLab(Lab[LoopbackHost]):
    network = "127.0.0"  # the operator's connections come from 127.0.0.1

    def nodes_environment(self, own: Path) -> str:
        """Each has one in its home folder, of which its shell knows the name."""
        return "$HOME/environment"

    def lose(self, host: LoopbackHost) -> None:
        host.power_off()

    def _host(self, name: str, address: str, folder: Path) -> LoopbackHost:
        before = frozenset(os.listdir(SHARED_MEMORY))
        return LoopbackHost(name, address, folder, near=self._near / name, shared_before=before)

    @property
    def _near(self) -> Path:
        return Path("/tmp") / self.tag

    def _wire(self) -> None:
        self._near.symlink_to(self.folder)

    def _unwire(self) -> None:
        self._near.unlink(missing_ok=True)

    def _prepare(self, host: LoopbackHost) -> str:
        return ""

    def _first(self, host: LoopbackHost, script: str) -> list[str]:
        return [sys.executable, "-c", ADOPT, "bash", "-c", script]

    def _boot(self, host: LoopbackHost) -> None:
        super()._boot(host)
        programs = host.home / "environment" / "bin"
        programs.mkdir(parents=True)
        (programs / "tidemill").symlink_to(Path(sys.executable).parent / "tidemill")
        ray = RAY.format(python=sys.executable, init=host.init, address=host.address, ray=host.near / "ray")
        for name, script in {"ray": ray, "ssh": SSH.format(ssh=tool("ssh"), key=RAYS_KEY)}.items():
            (programs / name).write_text(script)
            (programs / name).chmod(0o755)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
