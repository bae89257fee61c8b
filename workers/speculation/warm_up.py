"""The first fit of an engine's step times: measured on the engine while nothing else runs on it."""

import random
from dataclasses import dataclass

from tidemill.core.messages import Draft
from tidemill.core.model import Request
from tidemill.core.tree import TokenTree
from tidemill.types import SamplingParams
from workers.engine.base import Engine, StepOutput
from workers.speculation.step_time import StepTimes

REPEATS = 3


@dataclass(frozen=True, slots=True)
class Series:
    """So many sequences of `context` tokens decode together, in steps of these numbers of rows, all of them alike."""

    sequences: int
    context: int
    rows: tuple[int, ...]

    @property
    def longest(self) -> int:
        """Tokens of a sequence at the end, if all that was drafted were accepted."""
        return self.context + 1 + REPEATS * sum(rows // self.sequences for rows in self.rows)


# Engines may verify no more than a short chain of a sequence: steps of many rows take several sequences.
SERIES = (
    Series(1, 32, (1, 2, 4, 8, 16, 32)),
    Series(1, 512, (1, 2, 4, 8, 16, 32)),
    Series(4, 32, (4, 8, 16, 32)),
)


def measure_steps(engine: Engine, times: StepTimes, max_running: int) -> None:
    """Decode made-up sequences, each step with a chain of tokens of each to verify, some dozens of steps in all.

    The engine is idle before and after, and decodes `max_running` sequences at once. What does not fit it is left out.
    """
    load, noise = engine.load(), random.Random(0)
    for series in SERIES:
        blocks = series.sequences * -(-series.longest // load.block_size)
        fits = series.longest < engine.info.context_length and blocks <= load.kv_blocks_total
        if fits and series.sequences <= max_running:
            _measure(engine, times, series, noise)


def _measure(engine: Engine, times: StepTimes, series: Series, noise: random.Random) -> None:
    vocabulary = range(engine.info.vocab_size)
    lengths = {f"warm-up/{number}": series.context for number in range(series.sequences)}

    def step() -> StepOutput:
        output = engine.step()
        for each in output.outputs:
            lengths[each.request_id] += len(each.tokens)
        return output

    try:
        for request_id in lengths:
            prompt = tuple(noise.choices(vocabulary, k=series.context))
            engine.submit(Request(request_id, prompt, SamplingParams(max_tokens=10**6, ignore_eos=True, seed=0)))
        while min(lengths.values()) == series.context:  # a prompt is being computed
            step()
        for rows in series.rows * REPEATS:
            before = dict(lengths)
            for request_id, length in lengths.items():
                chain = noise.choices(vocabulary, k=rows // series.sequences - 1)
                engine.propose(Draft(request_id, length, TokenTree.chain(chain)))
            output = step()
            attended = sum((1 + each.drafted) * before[each.request_id] for each in output.outputs)
            times.observe(output.batch_tokens, attended, output.seconds, sum(before.values()))
    finally:
        for request_id in lengths:
            engine.release(request_id)
