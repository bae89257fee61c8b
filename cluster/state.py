"""What `up` leaves for the other commands: a file in the user's state folder, readable by the user alone."""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster import head


@dataclass(frozen=True, slots=True)
class ClusterState:
    """Of a cluster that is up, or of what an `up` has left that was killed at work."""

    name: str
    ray_address: str
    ray_token: str = ""
    head_pid: int | None = None  # None: the Ray cluster was there before, and stays
    folder: str = ""  # Ray's sessions and logs
    router_address: str = ""  # as the client takes it, of several routers with commas; empty until everything is up
    workers: tuple[str, ...] = ()
    drain_s: float = 0.0  # what requests under way get when it is taken down


def state_path(name: str) -> Path:
    root = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(root) / "tidemill" / f"{name}.json"


def read_state(name: str) -> ClusterState | None:
    """None if no such cluster was brought up, or nothing of its head is left."""
    try:
        document = json.loads(state_path(name).read_text(encoding="utf-8"))
        state = ClusterState(**(document | {"workers": tuple(document["workers"])}))
    except (OSError, ValueError, TypeError, KeyError):
        return None
    if state.head_pid is not None and not head.is_running(state.head_pid, state.folder):
        forget(state)
        return None
    return state


def write_state(state: ClusterState) -> None:
    path = state_path(state.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(f".{os.getpid()}")
    fresh.touch(mode=0o600)
    fresh.write_text(json.dumps(asdict(state), indent=2), encoding="utf-8")
    fresh.replace(path)


def forget(state: ClusterState) -> None:
    state_path(state.name).unlink(missing_ok=True)
    if state.head_pid is not None:
        shutil.rmtree(state.folder, ignore_errors=True)


@contextlib.contextmanager
def turn(name: str, say: Callable[[str], None]) -> Iterator[None]:
    """One process at a time brings a cluster up or down; others wait here. A turn also ends with its process."""
    path = state_path(name).with_suffix(".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            say(f"waiting for process {lock.read()}, which brings cluster {name!r} up or down")
            fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield
