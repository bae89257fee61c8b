"""What drafts from a draft worker are worth: mean time per output token with and without, over the real streams.

    python -m benchmarks.speculation                     # everything: over an hour
    python -m benchmarks.speculation --part batch1 --rounds 1

batch1   one request at a time, greedy and at temperature 1: none, a fixed chain of 4, and drafts as they come out of
         the box (adaptive, ahead of the verdict)
delay    the same, greedy, with 0, 1, 5 and 20 ms more each way between the workers: out of the box, and synchronous
batch8   eight at a time: none, the fixed chain, out of the box
         (answers of 41 to 150 tokens, so that no way keeps its requests in step; the same in the next part)
lost     two at a time with a draft worker that was killed, stopped or is half a second away: none, out of the box
vllm     ours again, and vLLM without and with its own `draft_model` speculation, greedy, with drafts of 2, 3, 4 and 5;
         the same pair, prompts and two cores in all (needs .venv-vllm, see `make bench`)

The target is *padded*: the bundled one with feed-forward channels that are computed and add zeros, so that it says what
the bundled one says and costs what a model of 174M parameters costs. Target and draft have a core each, and the router
and the client share the draft's. Within a round every way serves the same prompts, one after the other; figures are
medians over the rounds. Every way's tokens are compared with those without drafts. At the end it says of each thing
that was measured whether drafts are worth as much as they are to be.
"""

import argparse
import asyncio
import json
import os
import signal
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from benchmarks.padded import make_padded
from benchmarks.speculation_cluster import DRAFT_CORE, MODELS, VERIFY_CORE, Measured, Work, measure
from benchmarks.speculation_report import CHAIN, NONE, OURS, SYNCHRONOUS, VLLM_OURS, VLLM_THEIRS, report
from tidemill.core.settings import SpeculationSettings

ROOT = Path(__file__).parents[1]
CHANNELS = 24576
WAYS = {
    NONE: SpeculationSettings(enabled=False),
    CHAIN: SpeculationSettings(adaptive=False, strategy="chain", max_depth=4, width=1, max_nodes=4, ahead=0),
    OURS: SpeculationSettings(),
    SYNCHRONOUS: SpeculationSettings(ahead=0, adaptive=False, max_depth=8, max_nodes=8),
}
VLLM_DRAFTS = {NONE: 0} | {f"draft_model, k = {count}": count for count in (2, 3, 4, 5)}


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
        Part(VLLM_OURS, (NONE, OURS), work),
    ]


def measure_vllm(target: Path, requests: int, venv: Path, drafts: int) -> Measured:
    """With so many draft tokens, on the cores that ours has in all."""
    # A process that measured a cluster has given itself one core, which those it starts would share.
    command = ["taskset", "--cpu-list", f"{DRAFT_CORE},{VERIFY_CORE}", str(venv / "bin" / "python"), "-m"]
    command += ["benchmarks.speculation_vllm", str(target), str(MODELS / "draft"), str(requests), str(drafts)]
    one_process = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "2"}
    environment = os.environ | one_process | {"VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
    if line is None:
        raise SystemExit(f"vLLM failed:\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}")
    document = json.loads(line.removeprefix("RESULT "))
    tokens = tuple(tuple(each) for each in document["tokens"])
    return Measured(document["tpot_s"], document["tokens_per_s"], 0.0, 0.0, tokens)


def progress_line(number: int, rounds: int, part: str, way: str, measured: Measured) -> str:
    """What is known as soon as one way is through; medians and verdicts come at the end."""
    figures = f"TPOT {measured.tpot_s * 1e3:.1f} ms, {measured.tokens_per_s:.1f} tokens/s"
    if measured.drafted:
        figures += f", {measured.accepted:.2f} of {measured.drafted:.2f} drafted tokens accepted a step"
    return f"round {number} of {rounds}: {part}, {way}: {figures}"


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

    def wanted(name: str) -> bool:
        return not args.part or any(name.startswith(each) for each in args.part)

    target = args.out / f"padded-{CHANNELS}"
    every = parts_of(target, args.requests)
    parts = [part for part in every if wanted(part.name)]
    if not parts and not wanted(VLLM_THEIRS):
        parser.error(f"--part: none begins so; there are {'; '.join([*(part.name for part in every), VLLM_THEIRS])}")
    if not (target / "model.safetensors").is_file():
        make_padded(MODELS / "target", target, CHANNELS)

    found: dict[tuple[str, str], list[Measured]] = {}
    console = Console()
    for number in range(args.rounds):
        for part in parts:
            for way in part.ways:
                measured = asyncio.run(measure(part.work, WAYS[way]))
                found.setdefault((part.name, way), []).append(measured)
                console.print(
                    progress_line(number + 1, args.rounds, part.name, way, measured), style="dim", soft_wrap=True
                )
        for way, drafts in VLLM_DRAFTS.items() if wanted(VLLM_THEIRS) else ():
            measured = measure_vllm(target, args.requests, args.venv, drafts)
            found.setdefault((VLLM_THEIRS, way), []).append(measured)
            console.print(
                progress_line(number + 1, args.rounds, VLLM_THEIRS, way, measured), style="dim", soft_wrap=True
            )
    report(console, found, args.out / "speculation.csv")


if __name__ == "__main__":
    main()
