"""Worker processes as Ray starts them: forks of one that has its engine imported and ends when who wants them does."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

IMPORTED = {"native": "workers.engine.native.engine", "vllm": "vllm.v1.engine.llm_engine"}
WORKER = """
import os, sys
print(sys.argv[1] in sys.modules, __name__, sys.argv[2], os.getppid(), flush=True)
sys.exit(int(sys.argv[2]))
"""
RAYLET = """
import subprocess, sys
for status in ("3", "4", "5"):
    done = subprocess.run([sys.executable, "-m", "cluster.preimported", *sys.argv[1:], status])
    print("ended", done.returncode, flush=True)
"""


@pytest.mark.parametrize("engine", ["native", pytest.param("vllm", marks=pytest.mark.vllm)])
def test_processes_are_forked_and_nothing_stays(engine: str, tmp_path: Path) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    command = [sys.executable, "-c", RAYLET, engine, str(worker), IMPORTED[engine]]
    raylet = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    out, _ = raylet.communicate(timeout=120)
    lines = [line.split() for line in out.splitlines() if line.startswith(("True", "False", "ended"))]
    assert [line[:3] for line in lines[::2]] == [["True", "__main__", status] for status in "345"]
    assert [line[1] for line in lines[1::2]] == ["3", "4", "5"], "exit statuses are passed on"
    (server,) = {int(line[3]) for line in lines[::2]}  # all are forks of one process
    deadline = time.monotonic() + 10
    while psutil.pid_exists(server):
        assert time.monotonic() < deadline, "the server did not end"
        time.sleep(0.1)
    assert not list((Path(tempfile.gettempdir()) / f"tidemill-{os.getuid()}").glob(f"{engine}-*-{raylet.pid}"))


def test_without_a_server_a_process_imports_for_itself(tmp_path: Path) -> None:
    """Here nobody can listen, since the path would be too long for a socket."""
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    command = [sys.executable, "-m", "cluster.preimported", "native", str(worker), IMPORTED["native"], "3"]
    environment = os.environ | {"TMPDIR": str(folder)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.split()[:3]) == (3, ["False", "__main__", "3"])
    assert "does its own imports: AF_UNIX path too long" in done.stderr
