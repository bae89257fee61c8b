"""Compiles the CPU kernels at first use and keeps the result for this user, this source and this processor."""

import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import signal
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).parent / "kernels"
# No -ffast-math: it would reorder sums, and on old compilers flush denormals for the whole process.
FLAGS = [
    "-O3", "-march=native", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-fopenmp",
    "-shared", "-fPIC",
]  # fmt: skip
COMPILERS = ("g++", "clang++")
COMPILE_TIMEOUT_S = 120.0  # it takes five seconds on an idle core

log = logging.getLogger(__name__)


class NoCompiler(RuntimeError):
    """The kernels are not built yet and no C++ compiler was found, or it failed."""


def cache_folder() -> Path:
    """Where built kernels are kept."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "tidemill"


def load_kernels() -> ctypes.CDLL:
    """The compiled library, built if need be (five seconds). Raises NoCompiler.

    Of several processes one builds and the others wait for it. The library appears under its name when it is complete,
    so nobody loads half of it. The caller has imported torch, whose OpenMP runtime the library then shares.
    """
    path = cache_folder() / f"kernels-{_fingerprint()}.so"
    try:
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            with (path.parent / "building").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # given back by the system even if the builder is killed
                if not path.is_file():
                    _compile(path)
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise NoCompiler(f"{path} cannot be written or loaded: {error}") from error


def _fingerprint() -> str:
    """Changes with the sources, the flags and the processor's instruction set."""
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for source in sorted(SOURCES.glob("*.[ch]*")):
        digest.update(source.read_bytes())
    digest.update(platform.machine().encode())
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        digest.update(next((line for line in lines if line.startswith(("flags", "Features"))), "").encode())
    return digest.hexdigest()[:16]


def _compile(path: Path) -> None:
    """With the first compiler that manages."""
    found = [compiler for compiler in map(shutil.which, COMPILERS) if compiler]
    if not found:
        raise NoCompiler(f"no C++ compiler found (looked for {', '.join(COMPILERS)})")
    failures = []
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="building-") as folder:
        fresh = Path(folder) / path.name
        for compiler in found:
            log.info("compiling the CPU kernels with %s", compiler)
            command = [compiler, *FLAGS, "-o", str(fresh), str(SOURCES / "decoder.cpp")]
            said = _run(command)
            if said is None:
                fresh.replace(path)
                return
            failures.append(f"{compiler} failed: {said}")
    raise NoCompiler("; ".join(failures))


def _run(command: list[str]) -> str | None:
    """None if the command succeeded, or what it complained of."""
    # A group of its own, since a compiler is several processes.
    options: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "start_new_session": True}
    with subprocess.Popen(command, text=True, **options) as process:
        timer = threading.Timer(COMPILE_TIMEOUT_S, os.killpg, (process.pid, signal.SIGKILL))
        timer.start()
        try:
            _, complaint = process.communicate()
        finally:
            timer.cancel()
    if process.returncode == -signal.SIGKILL:
        return f"killed; it may take {COMPILE_TIMEOUT_S:.0f} s"
    return complaint[-2000:] if process.returncode else None
