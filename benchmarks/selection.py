"""What it costs to choose drafts for 64 requests: microseconds a step, and the share of a step that it is.

    python -m benchmarks.selection                  # the step is measured: the padded target, 64 requests at once
    python -m benchmarks.selection --step-ms 40     # or given

Emulated engines behind the real roles, streams, draft trees and selection, on a virtual clock: trees are as large as
they would be, and all that is timed is the speculator's own work. Before a step: weighing each request's tree, choosing
nodes, proposing them. After it: learning from the verdicts, asking for more. What counts is the processor time of the
thread, so that other work on the machine matters less.
"""

import argparse
import random
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from benchmarks.padded import make_padded
from benchmarks.slo import OURS, VOCABULARY, settings_of
from tests.support.local import MODELS
from tests.support.virtual_workers import VirtualPair
from tidemill import SamplingParams
from tidemill.core.model import Request
from tidemill.core.settings import EngineSettings
from workers.engine.native.engine import NativeEngine
from workers.roles.verify import VerifyRole

ROOT = Path(__file__).parents[1]
CHANNELS = 24576
REQUESTS, PROMPT, STEPS = 64, 200, 150
WARM_UP = 20  # steps whose times do not count


def times_of(requests: int, steps: int) -> dict[str, list[float]]:
    """Seconds of the speculator's calls, one a step, while so many requests decode."""
    pair = VirtualPair(settings_of(OURS, 1.0), lambda *_: None)
    role = pair.verify.role
    assert isinstance(role, VerifyRole)
    found: dict[str, list[float]] = {}
    speculator = role._speculator
    for name in ("before_step", "after_step"):
        setattr(speculator, name, _timed(getattr(speculator, name), found.setdefault(name, [])))
    for number in range(requests):
        prompt = random.Random(number).choices(range(VOCABULARY), k=PROMPT)
        sampling = SamplingParams(max_tokens=2000, ignore_eos=True, temperature=0.0, seed=number)
        pair.submit(0.0, Request(str(number), tuple(prompt), sampling))
    until = 2.0
    while len(found["after_step"]) < WARM_UP + steps + requests * PROMPT // 512:
        pair.run(until)
        until += 1.0
    return {name: times[-steps:] for name, times in found.items()}


def measured_step_s(requests: int) -> float:
    """Of the padded target on one core, while so many requests decode without drafts."""
    folder = ROOT / "benchmarks" / "out" / f"padded-{CHANNELS}"
    if not folder.exists():
        make_padded(MODELS / "target", folder, CHANNELS)
    torch.set_num_threads(1)
    engine = NativeEngine.from_folder(folder, EngineSettings(max_running=requests))
    for number in range(requests):
        sampling = SamplingParams(max_tokens=200, ignore_eos=True, temperature=0.0, seed=number)
        engine.submit(Request(str(number), tuple(range(1, 17)), sampling))
    outputs = [engine.step() for _ in range(30)]
    return median(each.seconds for each in outputs if len(each.outputs) == requests)


def _timed(call: Callable[..., object], into: list[float]) -> Callable[..., object]:
    def timed(*args: object) -> object:
        started = time.thread_time()
        result = call(*args)
        into.append(time.thread_time() - started)
        return result

    return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--step-ms", type=float, help="of the target; without it the padded target's is measured")
    args = parser.parse_args()
    times = times_of(args.requests, args.steps)
    step_s = args.step_ms / 1e3 if args.step_ms else measured_step_s(args.requests)
    print(f"{args.requests} requests; a step of the target takes {step_s * 1e3:.1f} ms")
    for name, each in times.items():
        print(f"{name:>12}: {median(each) * 1e6:6.0f} us in the median, {median(each) / step_s:.2%} of a step")


if __name__ == "__main__":
    main()
