"""Compiles the CPU kernels at first use and keeps the result for this user, this source and this processor."""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
from pathlib import Path

SOURCES = Path(__file__).parent / "kernels"
# No -ffast-math: it would reorder sums, and on old compilers flush denormals for the whole process.
FLAGS = [
    "-O3", "-march=native", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-fopenmp",
    "-shared", "-fPIC",
]  # fmt: skip
COMPILERS = ("g++", "clang++")

log = logging.getLogger(__name__)


class NoCompiler(RuntimeError):
    """The kernels are not built yet and no C++ compiler was found, or it failed."""


def cache_folder() -> Path:
    """Where built kernels are kept."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "tidemill"


def load_kernels() -> ctypes.CDLL:
    """The compiled library, built if need be (two seconds). Raises NoCompiler.

    Several processes may build at once: each writes a file of its own and renames it, so nobody loads half a library.
    """
    path = cache_folder() / f"kernels-{_fingerprint()}.so"
    if not path.is_file():
        _compile(path)
    return ctypes.CDLL(str(path))


def _fingerprint() -> str:
    """Changes with the sources, the flags and the processor's instruction set."""
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.read_bytes())
    digest.update(platform.machine().encode())
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        digest.update(next((line for line in lines if line.startswith(("flags", "Features"))), "").encode())
    return digest.hexdigest()[:16]


def _compile(path: Path) -> None:
    compiler = next((found for found in map(shutil.which, COMPILERS) if found), None)
    if compiler is None:
        raise NoCompiler(f"no C++ compiler found (looked for {', '.join(COMPILERS)})")
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(f".{os.getpid()}")
    log.info("compiling the CPU kernels with %s", compiler)
    command = [compiler, *FLAGS, "-o", str(fresh), str(SOURCES / "decoder.cpp")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NoCompiler(f"{compiler} failed: {done.stderr[-2000:]}")
    fresh.replace(path)
