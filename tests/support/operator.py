"""The command line, as an operator uses it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from cluster.head import free_port

ROOT = Path(__file__).parents[2]


class Operator:
    """Runs `tidemill` with a state folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.config = folder / "cluster.yaml"
        self.env = os.environ | {"XDG_STATE_HOME": str(folder / "state"), "COLUMNS": "200"}
        self.write()

    def write(self, **changes: Any) -> None:
        document: dict[str, Any] = {
            "name": "test",
            "target": {"path": str(ROOT / "models" / "target")},
            "draft": {"path": str(ROOT / "models" / "draft")},
            "engine": {"dtype": "float32"},
            "router": {"port": self.port},
            "controller": {"sustain_s": 3600},  # decides, but here roles change on command only
        }
        self.config.write_text(json.dumps(document | changes))  # JSON is YAML

    def run(self, *arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        command = [str(Path(sys.executable).parent / "tidemill"), *arguments]
        return subprocess.run(
            command, env=self.env, cwd=ROOT, input=stdin, capture_output=True, text=True, timeout=150, check=False
        )

    def status(self) -> dict[str, Any]:
        done = self.run("status", "--name", "test", "--json")
        assert done.returncode == 0, done.stderr
        document: dict[str, Any] = json.loads(done.stdout)
        return document
