"""Measures a model folder's steps on this machine, for `emulated.target.model: fitted`, and says how well a line fits.

    python -m benchmarks.step_times steps.csv [--folder models/target] [--steps 400]

Prompts of many lengths, batches of many sizes and drafts of many nodes, mixed as they come; run it on an idle machine.
"""

import argparse
import random
import statistics
from dataclasses import asdict
from pathlib import Path

import torch

from tidemill.core.messages import Draft
from tidemill.core.model import Request
from tidemill.core.settings import EngineSettings
from tidemill.core.tree import TokenTree
from tidemill.types import SamplingParams
from workers.engine.base import SequenceOutput, SequenceProgress
from workers.engine.emulated import work_of
from workers.engine.latency import LinearLatency, MeasuredStep, StepWork, write_steps
from workers.engine.native.engine import NativeEngine
from workers.engine.native.scheduler import Slice

FOLDER = Path(__file__).parents[1] / "models" / "target"
WARM_UP = 20  # steps
LONGEST, MOST = 1024, 24  # tokens of a prompt, requests at once


class Recorder(NativeEngine):
    """Remembers what each step computed."""

    work = StepWork()

    def _run(self, slices: list[Slice]) -> tuple[list[SequenceOutput], list[SequenceProgress]]:
        self.work = work_of(slices)
        return super()._run(slices)


def measure(engine: Recorder, count: int, rng: random.Random) -> list[MeasuredStep]:
    """Steps under a load whose size wanders."""
    found: list[MeasuredStep] = []
    lengths: dict[str, int] = {}  # tokens of each request, its output included
    started, wanted = 0, 1
    while len(found) < count + WARM_UP:
        if rng.random() < 0.1:
            wanted = rng.randrange(1, MOST + 1)
        while len(lengths) < wanted:
            name, length = str(started), round(LONGEST ** rng.uniform(0.4, 1.0))
            prompt = tuple(rng.randrange(2, engine.info.vocab_size) for _ in range(length))
            sampling = SamplingParams(max_tokens=rng.randrange(5, 80), ignore_eos=True, seed=0)
            engine.submit(Request(name, prompt, sampling))
            lengths[name] = length
            started += 1
        nodes = rng.choice((0, 0, 2, 4, 8))
        for name, length in lengths.items():
            tree = TokenTree.chain([rng.randrange(2, engine.info.vocab_size) for _ in range(nodes)])
            engine.propose(Draft(name, length, tree))
        output = engine.step()
        found.append((engine.work, output.seconds))
        for each in output.outputs:
            lengths[each.request_id] += len(each.tokens)
            if each.finish is not None:
                del lengths[each.request_id]
    return found[WARM_UP:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="CSV file to write")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    torch.set_num_threads(1)
    engine = Recorder.from_folder(options.folder, EngineSettings(kv_blocks=4096, prefix_cache=False))
    steps = measure(engine, options.steps, random.Random(0))  # type: ignore[arg-type]
    write_steps(options.out, steps)
    model = LinearLatency.fit(steps)
    for name, seconds in asdict(model).items():
        print(f"{name:18} {seconds:.3g}")
    errors = sorted(abs(model(work) / seconds - 1) for work, seconds in steps)
    print(f"error: median {statistics.median(errors):.1%}, 9 of 10 below {errors[len(errors) * 9 // 10]:.1%}")


if __name__ == "__main__":
    main()
