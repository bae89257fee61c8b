"""Three hosts and who deploys to them, on one machine: what `ray up` needs to find.

Each host has an address, a home folder, an sshd on port 22 of its address, and a process 1. namespaces.py makes them as
machines of their own, loopback.py where a sandbox forbids that. Both need root and Debian's openssh-server.
"""

import os
import shutil
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

from tests.support.prometheus import tool

OPERATOR = "operator"
# Starts what the host is made of; from then on it is the parent of who has lost his own.
INIT = """
set -e
{prepare}
{daemon}
touch {folder}/ready
while true; do sleep 3600 & wait $!; done
"""
SSHD_CONFIG = """
Port 22
ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/authorized_keys
PasswordAuthentication no
PermitRootLogin yes
StrictModes no
UsePAM no
PidFile none
SetEnv {environment}
"""
OF_THE_HOST = ("sleep 3600", "sshd:")


@dataclass(slots=True)
class Host(ABC):
    """One machine. `init` is its process 1, as this machine counts; None when it is off."""

    name: str
    address: str
    folder: Path
    init: int | None = None

    @property
    def home(self) -> Path:
        return self.folder / "home"

    def environment(self) -> dict[str, str]:
        """What sessions find set, but for what a login shell sets."""
        return {"HOME": str(self.home)}

    def command(self, *command: str) -> list[str]:
        """What runs a command on this host, in its home folder."""
        path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
        environment = self.environment() | {"PATH": path, "TERM": "dumb", "USER": "root"}
        setting = [f"{name}={value}" for name, value in environment.items()]
        return [*self._enter(), "env", "-i", f"--chdir={self.home}", *setting, *command]

    def run(self, *command: str, timeout_s: float = 60.0) -> str:
        """Its output; fails the test with it if it fails."""
        done = subprocess.run(
            self.command(*command),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == 0, f"{self.name}: {' '.join(command)}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
        return done.stdout

    def processes(self) -> dict[int, str]:
        """Command lines of all processes of the host, but for what it is made of."""
        found = {}
        for pid in self._members() if self.init is not None else ():
            try:
                found[pid] = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
            except OSError:
                continue  # it ended meanwhile
        return {pid: line for pid, line in found.items() if line and not line.startswith(OF_THE_HOST)}

    @abstractmethod
    def _enter(self) -> list[str]:
        """What goes before a command that is to run here."""

    @abstractmethod
    def _members(self) -> Iterator[int]:
        """All its processes but the first; it is on."""

    @abstractmethod
    def listening(self) -> list[str]:
        """Addresses with ports."""

    @abstractmethod
    def shared_memory(self) -> list[str]:
        """Files that programs have left in /dev/shm."""

    @abstractmethod
    def power_off(self) -> None:
        """At once: no process of it says goodbye to anybody."""


HostT = TypeVar("HostT", bound=Host)


class Lab(ABC, Generic[HostT]):
    """Hosts on one network; `operator` is the machine of who deploys, without sshd."""

    network: ClassVar[str]  # the first three numbers of all addresses

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.tag = f"tm{os.getpid()}"  # in names that the whole machine sees
        self._started: list[subprocess.Popen[bytes]] = []
        numbers = {OPERATOR: 1} | {name: number for number, name in enumerate(names, start=10)}
        self.hosts = {
            name: self._host(name, f"{self.network}.{number}", folder / name) for name, number in numbers.items()
        }
        self.key = folder / "id_ed25519"

    @property
    def operator(self) -> HostT:
        return self.hosts[OPERATOR]

    def nodes_environment(self, own: Path) -> str:
        """Where nodes find an environment, for deploy/source.env; `own`: this test's."""
        return str(own)

    @abstractmethod
    def lose(self, host: HostT) -> None:
        """Power and network at once."""

    @abstractmethod
    def _host(self, name: str, address: str, folder: Path) -> HostT: ...

    @abstractmethod
    def _wire(self) -> None:
        """Before any host boots."""

    @abstractmethod
    def _unwire(self) -> None:
        """All hosts are off. May be called when wiring failed half-way."""

    @abstractmethod
    def _prepare(self, host: HostT) -> str:
        """What its process 1 does before it starts the sshd."""

    @abstractmethod
    def _first(self, host: HostT, script: str) -> list[str]:
        """The command that becomes, or starts, process 1 with this script."""

    def __enter__(self) -> "Lab[HostT]":
        try:
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.key))
            self._wire()
            for host in self.hosts.values():
                self._boot(host)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for host in self.hosts.values():
            host.power_off()
        for process in self._started:
            process.wait(10)
        self._unwire()

    def _boot(self, host: HostT) -> None:
        """Returns when it is on, and its sshd listens."""
        for folder in (host.home, host.folder / "ray"):
            folder.mkdir(parents=True)
        daemon = "" if host is self.operator else self._sshd(host)
        script = INIT.format(prepare=self._prepare(host), daemon=daemon, folder=host.folder)
        log = host.folder / "init.log"
        process = subprocess.Popen(
            self._first(host, script),
            stdin=subprocess.DEVNULL,
            stdout=log.open("wb"),
            stderr=subprocess.STDOUT,
            start_new_session=True,  # not ended by the Ctrl-C that ends the test
        )
        self._started.append(process)
        host.init = process.pid  # for who has to end a half-made one
        deadline = time.monotonic() + 10
        while not (host.folder / "ready").exists():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, f"{host.name} did not start: {log.read_text()}"
            time.sleep(0.02)

    def _sshd(self, host: HostT) -> str:
        """The command that starts it; it goes to the background by itself."""
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(host.folder / "host_key"))
        shutil.copy(self.key.with_suffix(".pub"), host.folder / "authorized_keys")
        environment = " ".join(f"{name}={value}" for name, value in host.environment().items())
        config = SSHD_CONFIG.format(address=host.address, folder=host.folder, environment=environment)
        (host.folder / "sshd_config").write_text(config)
        return f"mkdir -p /run/sshd\n{tool('sshd')} -f {host.folder}/sshd_config -E {host.folder}/sshd.log"


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
