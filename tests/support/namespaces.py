"""Hosts made of namespaces: each has its own network, processes, home folder and shared memory.

    operator ──bridge──┬── head        The bridge lives in the operator's network: nothing of this machine's is changed.
                       ├── worker-1    Process 1 of a host is a shell; when it is killed nothing of the host is left.
                       └── worker-2

Needs root (or CAP_SYS_ADMIN), and Debian's iproute2 and util-linux besides.
"""

import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.hosts import Host, Lab, run

PREPARE = """
mount --make-rprivate /
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /run
mkdir -p /tmp/ray
mount --bind {folder}/ray /tmp/ray
for file in passwd hosts resolv.conf; do mount --bind {folder}/$file /etc/$file; done
hostname {name}
ip link set lo up
"""


def can_make_namespaces() -> bool:
    """False where the sandbox forbids them."""
    probe = ["unshare", "--net", "--pid", "--fork", "--mount", "--mount-proc", "--uts", "true"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


@dataclass(slots=True)
class NamespaceHost(Host):
    """`network` is what `ip netns` calls it."""

    network: str = ""

    def _enter(self) -> list[str]:
        return ["nsenter", f"--target={self.init}", "--net", "--mount", "--pid", "--uts"]

    def _members(self) -> Iterator[int]:
        namespace = os.readlink(f"/proc/{self.init}/ns/pid")
        for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
            try:
                if pid != self.init and os.readlink(f"/proc/{pid}/ns/pid") == namespace:
                    yield pid
            except OSError:
                continue  # it ended meanwhile

    def listening(self) -> list[str]:
        return [line.split()[3] for line in self.run("ss", "-Hltn").splitlines()]

    def shared_memory(self) -> list[str]:
        return self.run("ls", "/dev/shm").split()

    def power_off(self) -> None:
        if self.init is not None:
            os.kill(self.init, signal.SIGKILL)
            self.init = None


class NamespaceLab(Lab[NamespaceHost]):
    network = "192.0.2"  # for documentation only: nobody's

    def _host(self, name: str, address: str, folder: Path) -> NamespaceHost:
        return NamespaceHost(name, address, folder, network=f"{self.tag}-{name}")

    def lose(self, host: NamespaceHost) -> None:
        """Nobody hears that it is gone: packets only stop."""
        run("ip", "-n", self.operator.network, "link", "set", _cable(host), "down")
        host.power_off()

    def _wire(self) -> None:
        for host in self.hosts.values():
            run("ip", "netns", "add", host.network)
        operator = self.operator.network
        run("ip", "-n", operator, "link", "add", "bridge", "type", "bridge")
        run("ip", "-n", operator, "address", "add", f"{self.operator.address}/24", "dev", "bridge")
        run("ip", "-n", operator, "link", "set", "bridge", "up")
        for host in self.hosts.values():
            if host is not self.operator:
                self._connect(host)

    def _connect(self, host: NamespaceHost) -> None:
        """A cable from the host to the operator's bridge."""
        operator, cable = self.operator, _cable(host)
        ends = ["add", cable, "type", "veth", "peer", "name", "eth0", "netns", host.network]
        run("ip", "-n", operator.network, "link", *ends)
        run("ip", "-n", operator.network, "link", "set", cable, "master", "bridge", "up")
        run("ip", "-n", host.network, "address", "add", f"{host.address}/24", "dev", "eth0")
        run("ip", "-n", host.network, "link", "set", "eth0", "up")
        # It leads nowhere, but a machine finds out its own address by it.
        run("ip", "-n", host.network, "route", "add", "default", "via", operator.address)

    def _unwire(self) -> None:
        for host in self.hosts.values():
            subprocess.run(["ip", "netns", "delete", host.network], capture_output=True, check=False)

    def _prepare(self, host: NamespaceHost) -> str:
        (host.folder / "passwd").write_text(
            f"root:x:0:0:root:{host.home}:/bin/bash\nsshd:x:105:65534::/run/sshd:/bin/false\n"
        )
        # Names are found without asking anybody, and unknown ones are not waited for.
        names = [f"{each.address} {each.name}\n" for each in self.hosts.values()]
        (host.folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(names))
        (host.folder / "resolv.conf").write_text("nameserver 127.0.0.1\n")
        return PREPARE.format(folder=host.folder, name=host.name)

    def _first(self, host: NamespaceHost, script: str) -> list[str]:
        apart = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--mount", "--uts"]
        return ["ip", "netns", "exec", host.network, *apart, "bash", "-c", script]

    def _boot(self, host: NamespaceHost) -> None:
        super()._boot(host)
        children = Path(f"/proc/{host.init}/task/{host.init}/children").read_text().split()
        host.init = int(children[0])


def _cable(host: NamespaceHost) -> str:
    return f"to-{host.name}"
