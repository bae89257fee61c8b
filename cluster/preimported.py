"""Worker processes forked from one that has imported what their engine needs, which takes a cold one most of its start.

Ray begins a worker's process with `python -m cluster.preimported ENGINE default_worker.py ...` (runtime_env:
py_executable). That one asks the node's server for a fork, hands it its own arguments, environment and standard
streams, and stays as long as the fork lives, as who asked Ray for a process expects. The first to ask starts the server
of its engine; it ends when the node's raylet does. Where no server can be had the process does its own imports.
"""

import contextlib
import fcntl
import gc
import importlib
import json
import logging
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil

from workers.openmp import choose_openmp, unregister_openmp

log = logging.getLogger(__name__)

MODULES = {
    "native": ("ray._private.node", "workers.worker"),
    "vllm": ("ray._private.node", "workers.engine.vllm.engine", "workers.worker"),
}
SERVE = "serve"  # in the place of a file to run
PIDS = Path("/proc/self/ns/pid")  # where the numbers of processes count
LOOK_S = 0.5  # how often the server sees whether forks, and the raylet, still live
Fork = tuple[dict[str, object], list[int]]  # what it is to run, and its standard streams


def executable(engine: str) -> str:
    """For runtime_env. Tidemill is installed in the same place on every node."""
    return " ".join(_command(engine))


def _command(engine: str) -> list[str]:
    return [sys.executable, "-m", "cluster.preimported", engine]


def ask(engine: str, arguments: list[str]) -> int:
    """Run `arguments`, a Python file's, in a fork of the server; returns its exit status when it has ended.

    Raises OSError if there is no server, or none that could import what it is to.
    """
    with _connect(engine, os.getppid()) as server:
        wanted = json.dumps({"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}).encode()
        socket.send_fds(server, [len(wanted).to_bytes(4, "big")], [0, 1, 2])
        server.sendall(wanted)
        fork = int.from_bytes(_read(server, 4), "big")
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: os.kill(fork, number))
        try:
            return _read(server, 1)[0]
        except OSError:
            return 1  # nobody knows how it ended


def _connect(engine: str, raylet: int) -> socket.socket:
    """To the server of this user, engine and raylet; it is started if nobody listens.

    Hosts made of namespaces may share the folder, and each have a raylet of the same number.
    """
    folder = Path(tempfile.gettempdir()) / f"tidemill-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} is another user's; set TMPDIR to a folder of your own")
    path = folder / f"{engine}-{PIDS.stat().st_ino if PIDS.exists() else 0}-{raylet}"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        server = socket.socket(socket.AF_UNIX)
        try:
            server.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            path.unlink(missing_ok=True)
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(path))
                listener.listen(64)
                server.connect(str(path))  # answered once the imports are done
                command = [*_command(engine), SERVE, str(listener.fileno()), str(raylet)]
                subprocess.Popen(command, pass_fds=[listener.fileno()], start_new_session=True)
    return server


def _read(connection: socket.socket, count: int) -> bytes:
    data = connection.recv(count, socket.MSG_WAITALL)
    if len(data) < count:
        raise ConnectionError("the process that worker processes are forked from has ended")
    return data


def serve(engine: str, listener: socket.socket, raylet: int) -> Fork | None:
    """Fork for whoever asks; returns in each fork what it is to run, and None in the server when the raylet ended."""
    server = os.getpid()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    try:
        choose_openmp()
        for module in MODULES[engine]:
            importlib.import_module(module)
        unregister_openmp()
        gc.collect()
        gc.freeze()  # what was imported stays: forks need not look through it, and go on sharing its memory
        return _fork_for_askers(listener, raylet)
    finally:
        if os.getpid() == server:
            Path(listener.getsockname()).unlink(missing_ok=True)
        listener.close()


def _fork_for_askers(listener: socket.socket, raylet: int) -> Fork | None:
    """See `serve`."""
    listener.settimeout(LOOK_S)
    askers: dict[int, socket.socket] = {}
    while _lives(raylet):
        _tell_ended(askers)
        try:
            asker, _ = listener.accept()
        except TimeoutError:
            continue
        asker.settimeout(LOOK_S)
        try:
            size, streams, _, _ = socket.recv_fds(asker, 4, 3)
            wanted = json.loads(_read(asker, int.from_bytes(size, "big")))
        except (OSError, ValueError):
            asker.close()
            continue
        fork = os.fork()
        if fork == 0:
            for each in (asker, *askers.values()):
                each.close()
            return wanted, streams
        for stream in streams:
            os.close(stream)
        askers[fork] = asker
        with contextlib.suppress(OSError):
            asker.sendall(fork.to_bytes(4, "big"))
    return None


def _lives(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _tell_ended(askers: dict[int, socket.socket]) -> None:
    for fork in list(askers):
        ended, status = os.waitpid(fork, os.WNOHANG)
        if ended:
            with askers.pop(fork) as asker, contextlib.suppress(OSError):
                asker.sendall(bytes([os.waitstatus_to_exitcode(status) & 0xFF]))


def run(wanted: dict[str, object], streams: list[int]) -> None:
    """Become what was asked for."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    environment, arguments = wanted["environment"], wanted["arguments"]
    assert isinstance(environment, dict)
    assert isinstance(arguments, list)
    os.environ.update(environment)  # what the imports have set stays
    os.chdir(str(wanted["folder"]))
    _run_here(arguments)


def _run_here(arguments: list[str]) -> None:
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")


def main() -> None:
    engine, *arguments = sys.argv[1:]
    if arguments[0] == SERVE:
        asked = serve(engine, socket.socket(fileno=int(arguments[1])), int(arguments[2]))
        if asked is not None:
            run(*asked)
        return
    try:
        sys.exit(ask(engine, arguments))
    except OSError as error:
        log.warning("this process does its own imports: %s", error)
    choose_openmp()
    _run_here(arguments)


if __name__ == "__main__":
    main()
