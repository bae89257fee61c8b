"""Intel's OpenMP beside vLLM."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.vllm
MAKE_AND_BE_KILLED = """
import os, signal
from workers.openmp import choose_openmp
choose_openmp()
import torch
from tests.support.local import settings_for
from tidemill.core.model import Role
from workers.engines import make_engine
registered = any(f"_{os.getpid()}_" in name for name in os.listdir("/dev/shm"))
make_engine(settings_for("native"), Role.VERIFY)
print(os.getpid(), registered, torch.randn(300, 300).matmul(torch.randn(300, 300)).shape[0], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_worker_leaves_nothing_in_shared_memory() -> None:
    done = subprocess.run([sys.executable, "-c", MAKE_AND_BE_KILLED], capture_output=True, text=True, check=False)
    pid, registered, rows = done.stdout.split()
    assert (registered, rows) == ("True", "300"), "it would have left something"
    assert not [path for path in Path("/dev/shm").iterdir() if f"_{pid}_" in path.name]
