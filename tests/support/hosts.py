"""Machines made of namespaces: each has its own network, processes, home folder and shared memory, and an sshd.

    operator ──bridge──┬── head        The bridge lives in the operator's network: nothing of this machine's is changed.
                       ├── worker-1    Process 1 of a host is a shell; when it is killed nothing of the host is left.
                       └── worker-2

Needs root (or CAP_SYS_ADMIN) and Debian's openssh-server, iproute2 and util-linux.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.prometheus import tool

NETWORK = "192.0.2"  # for documentation only: nobody's
OPERATOR = "operator"
HOST_INIT = """
set -e
mount --make-rprivate /
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir -p /run/sshd /tmp/ray
mount --bind {folder}/ray /tmp/ray
for file in passwd hosts resolv.conf; do mount --bind {folder}/$file /etc/$file; done
hostname {name}
ip link set lo up
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
"""


def can_make_hosts() -> bool:
    """False where the sandbox forbids namespaces."""
    probe = ["unshare", "--net", "--pid", "--fork", "--mount", "--mount-proc", "--uts", "true"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


@dataclass(slots=True)
class Host:
    """One machine. `init` is its process 1, as this machine counts; None when it is off."""

    name: str
    address: str
    network: str  # of `ip netns`
    folder: Path
    init: int | None = None

    @property
    def home(self) -> Path:
        return self.folder / "home"

    def command(self, *command: str) -> list[str]:
        """What runs a command on this host, in its home folder."""
        environment = [f"HOME={self.home}", f"PATH={os.environ['PATH']}:/usr/sbin:/sbin", "TERM=dumb", "USER=root"]
        enter = ["nsenter", f"--target={self.init}", "--net", "--mount", "--pid", "--uts"]
        return [*enter, "env", "-i", f"--chdir={self.home}", *environment, *command]

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
        if self.init is None:
            return {}
        namespace = os.readlink(f"/proc/{self.init}/ns/pid")
        found = {}
        for entry in filter(str.isdigit, os.listdir("/proc")):
            try:
                if os.readlink(f"/proc/{entry}/ns/pid") == namespace:
                    found[int(entry)] = Path(f"/proc/{entry}/cmdline").read_text().replace("\0", " ").strip()
            except OSError:
                continue  # it ended meanwhile
        own = ("sleep 3600", "sshd:")
        return {pid: line for pid, line in found.items() if pid != self.init and line and not line.startswith(own)}

    def power_off(self) -> None:
        """At once: no process of it says goodbye to anybody."""
        if self.init is not None:
            os.kill(self.init, signal.SIGKILL)
            self.init = None


class Lab:
    """Hosts on one network; `operator` is the machine of who deploys, without sshd."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._tag = f"tm{os.getpid()}"
        self._started: list[subprocess.Popen[bytes]] = []
        hosts = [self._host(OPERATOR, 1), *(self._host(name, number) for number, name in enumerate(names, start=10))]
        self.hosts = {host.name: host for host in hosts}
        self.key = folder / "id_ed25519"

    def _host(self, name: str, number: int) -> Host:
        return Host(name, f"{NETWORK}.{number}", f"{self._tag}-{name}", self._folder / name)

    @property
    def operator(self) -> Host:
        return self.hosts[OPERATOR]

    def __enter__(self) -> "Lab":
        try:
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.key))
            for host in self.hosts.values():
                self._wire(host)
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
        for host in self.hosts.values():
            subprocess.run(["ip", "netns", "delete", host.network], capture_output=True, check=False)

    def _wire(self, host: Host) -> None:
        """A cable from the host to the operator's bridge."""
        _run("ip", "netns", "add", host.network)
        operator = self.operator.network
        if host is self.operator:
            _run("ip", "-n", operator, "link", "add", "bridge", "type", "bridge")
            _run("ip", "-n", operator, "address", "add", f"{host.address}/24", "dev", "bridge")
            _run("ip", "-n", operator, "link", "set", "bridge", "up")
            return
        cable = self._cable(host)
        ends = ["add", cable, "type", "veth", "peer", "name", "eth0", "netns", host.network]
        _run("ip", "-n", operator, "link", *ends)
        _run("ip", "-n", operator, "link", "set", cable, "master", "bridge", "up")
        _run("ip", "-n", host.network, "address", "add", f"{host.address}/24", "dev", "eth0")
        _run("ip", "-n", host.network, "link", "set", "eth0", "up")
        # It leads nowhere, but a machine finds out its own address by it.
        _run("ip", "-n", host.network, "route", "add", "default", "via", self.operator.address)

    @staticmethod
    def _cable(host: Host) -> str:
        return f"to-{host.name}"

    def cut(self, host: Host) -> None:
        """Pull the cable: nobody hears that the host is gone, packets only stop."""
        _run("ip", "-n", self.operator.network, "link", "set", self._cable(host), "down")

    def _boot(self, host: Host) -> None:
        for folder in (host.home, host.folder / "ray"):
            folder.mkdir(parents=True)
        (host.folder / "passwd").write_text(
            f"root:x:0:0:root:{host.home}:/bin/bash\nsshd:x:105:65534::/run/sshd:/bin/false\n"
        )
        # Names are found without asking anybody, and unknown ones are not waited for.
        names = [f"{each.address} {each.name}\n" for each in self.hosts.values()]
        (host.folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(names))
        (host.folder / "resolv.conf").write_text("nameserver 127.0.0.1\n")
        daemon = ""
        if host is not self.operator:
            _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(host.folder / "host_key"))
            shutil.copy(self.key.with_suffix(".pub"), host.folder / "authorized_keys")
            (host.folder / "sshd_config").write_text(SSHD_CONFIG.format(address=host.address, folder=host.folder))
            daemon = f"{tool('sshd')} -f {host.folder}/sshd_config -E {host.folder}/sshd.log"
        script = HOST_INIT.format(folder=host.folder, name=host.name, daemon=daemon)
        process = subprocess.Popen(
            [
                *["ip", "netns", "exec", host.network, "unshare", "--pid", "--fork", "--kill-child", "--mount-proc"],
                *["--mount", "--uts", "bash", "-c", script],
            ],
            stdin=subprocess.DEVNULL,
            stdout=(host.folder / "init.log").open("wb"),
            stderr=subprocess.STDOUT,
        )
        self._started.append(process)
        deadline = time.monotonic() + 10
        while not (host.folder / "ready").exists():
            assert process.poll() is None, (host.folder / "init.log").read_text()
            assert time.monotonic() < deadline, f"{host.name} did not start: {(host.folder / 'init.log').read_text()}"
            time.sleep(0.02)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        host.init = int(children[0])


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
