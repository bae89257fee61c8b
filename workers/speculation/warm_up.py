"""The first fit of an engine's step times: measured on the engine while nothing else runs on it."""

import random

from tidemill.core.messages import Draft
from tidemill.core.model import Request
from tidemill.core.tree import TokenTree
from tidemill.types import SamplingParams
from workers.engine.base import Engine
from workers.speculation.step_time import StepTimes

ROWS = (1, 2, 4, 8, 16, 32)  # of a step: a decode row and so many drafted ones but one
CONTEXTS = (32, 512)  # tokens of the sequence
REPEATS = 3


def measure_steps(engine: Engine, times: StepTimes) -> None:
    """Decode a made-up sequence, each step with a chain of tokens to verify, some dozens of steps in all.

    The engine is idle before and after. Contexts that do not fit it are left out.
    """
    noise = random.Random(0)
    for context in CONTEXTS:
        steps = REPEATS * len(ROWS) * max(ROWS)
        if context + steps < engine.info.context_length:
            _measure(engine, times, context, noise)


def _measure(engine: Engine, times: StepTimes, context: int, noise: random.Random) -> None:
    vocabulary = range(engine.info.vocab_size)
    prompt = tuple(noise.choices(vocabulary, k=context))
    request = Request("warm-up", prompt, SamplingParams(max_tokens=10**6, ignore_eos=True, seed=0))
    engine.submit(request)
    try:
        length = context
        while length == context:  # its prompt is being computed
            length += sum(len(each.tokens) for each in engine.step().outputs)
        for rows in ROWS * REPEATS:
            engine.propose(Draft(request.id, length, TokenTree.chain(noise.choices(vocabulary, k=rows - 1))))
            output = engine.step()
            times.observe(output.batch_tokens, output.batch_tokens * length, output.seconds, length)
            length += sum(len(each.tokens) for each in output.outputs)
    finally:
        engine.release(request.id)
