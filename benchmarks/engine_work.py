"""What both sides of benchmarks/engine.py do, through a function that runs prompts to their end."""

import json
import random
import statistics
import time
from collections.abc import Callable

VOCABULARY = 2048
REPEATS = 5
STEPS = 64

Run = Callable[[list[list[int]], int], None]  # prompts, new tokens each


def prompts(rng: random.Random, count: int, length: int) -> list[list[int]]:
    return [[rng.randrange(2, VOCABULARY) for _ in range(length)] for _ in range(count)]


def measure(run: Run, started: float) -> None:
    """Prints RESULT and medians. `started`: time.time() when the process began."""
    rng = random.Random(0)
    run(prompts(rng, 1, 64), 1)
    found: dict[str, float] = {"first_token": time.time() - started}

    def seconds(count: int, length: int, tokens: int) -> float:
        work = prompts(rng, count, length)
        begun = time.perf_counter()
        run(work, tokens)
        return time.perf_counter() - begun

    seconds(8, 256, 8)  # warm-up
    for batch in (1, 8, 32):
        steps = [(seconds(batch, 224, 1 + STEPS) - seconds(batch, 224, 1)) / STEPS * 1e3 for _ in range(REPEATS)]
        found[f"decode{batch}"] = statistics.median(steps)
    found["prefill"] = statistics.median(512 / seconds(1, 512, 1) for _ in range(2 * REPEATS))
    print("RESULT", json.dumps(found), flush=True)
