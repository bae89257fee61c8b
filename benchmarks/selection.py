"""What it costs to choose drafts for 64 requests, as a share of a step: at most 1 % is the aim.

    python -m benchmarks.selection                  # the step is measured: the padded target, 64 requests at once
    python -m benchmarks.selection --step-ms 40     # or given

Emulated engines behind the real roles, streams, draft trees and selection, on a virtual clock: trees are as large as
they would be, and all that is timed is the speculator's own work, in parts.

    choosing    before a step: regarding goals, weighing trees, choosing nodes; what the aim is about
    proposing   the chosen nodes to the engine, as any drafts would be
    learning    after it: what verdicts tell of drafts, what they leave of trees, and asking for more
    receiving   meanwhile: drafts that come, and whether a step should wait for them

What counts is the processor time of the thread, so that other work on the machine matters less. The requests are of
three classes as in benchmarks.slo.
"""

import argparse
import random
import time
from collections import defaultdict
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from statistics import median

import torch

from benchmarks.padded import make_padded
from benchmarks.slo import OURS, VOCABULARY, settings_of
from tests.support.local import MODELS
from tests.support.virtual_workers import VirtualPair
from tidemill import SamplingParams
from tidemill.core.model import Request, SloClass
from tidemill.core.settings import EngineSettings
from workers.engine.base import StepOutput
from workers.engine.native.engine import NativeEngine
from workers.roles.verify import VerifyRole

ROOT = Path(__file__).parents[1]
CHANNELS = 24576
REQUESTS, PROMPT, STEPS = 64, 200, 150
WARM_UP = 20  # steps whose times do not count
CLASSES = ("tight", "tight", "tight", "middle", "relaxed")
PARTS = {
    "_choose": "choosing",
    "_propose": "proposing",
    "after_step": "learning",
    "answered": "receiving",
    "wait_until": "receiving",
}  # by method of the speculator
AIM = 0.01


def times_of(requests: int, steps: int) -> dict[str, list[float]]:
    """Seconds of each part of the speculator's work, one a step, while so many requests decode."""
    settings = settings_of(OURS, 1.0)
    pair = VirtualPair(settings, lambda *_: None)
    role = pair.verify.role
    assert isinstance(role, VerifyRole)
    spent: defaultdict[str, float] = defaultdict(float)
    found: dict[str, list[float]] = {part: [] for part in PARTS.values()}
    for method, part in PARTS.items():
        setattr(role._speculator, method, _timed(getattr(role._speculator, method), part, spent))
    step = pair.verify.engine.step

    def counted_step() -> StepOutput:
        """The step is next, so what was spent since the last one is complete."""
        for part, seconds in found.items():
            seconds.append(spent[part])
        spent.clear()
        return step()

    pair.verify.engine.step = counted_step  # type: ignore[method-assign]
    for number, slo_class in zip(range(requests), cycle(CLASSES)):
        prompt = random.Random(number).choices(range(VOCABULARY), k=PROMPT)
        sampling = SamplingParams(max_tokens=2000, ignore_eos=True, temperature=0.0, seed=number)
        goal = settings.slo[slo_class]
        slo = SloClass(slo_class, goal.ttft_s, goal.tpot_s)
        pair.submit(0.0, Request(str(number), tuple(prompt), sampling, slo=slo))
    until = 2.0
    while len(found["choosing"]) < WARM_UP + steps + requests * PROMPT // 512:
        pair.run(until)
        until += 1.0
    return {part: seconds[-steps:] for part, seconds in found.items()}


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


def _timed(call: Callable[..., object], part: str, spent: defaultdict[str, float]) -> Callable[..., object]:
    def timed(*args: object) -> object:
        started = time.thread_time()
        result = call(*args)
        spent[part] += time.thread_time() - started
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
    for part, each in times.items():
        print(f"{part:>10}: {median(each) * 1e6:6.0f} us in the median, {median(each) / step_s:.2%} of a step")
    share = median(times["choosing"]) / step_s
    print(f"choosing takes {share:.2%} of a step; {'met' if share <= AIM else 'missed'}: the aim is {AIM:.0%} at most")


if __name__ == "__main__":
    main()
