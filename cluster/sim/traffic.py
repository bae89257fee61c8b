"""Requests as they arrive: made by a seeded generator, or taken from a trace."""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from cluster.bench.arrivals import TraceEntry


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request; `phase` names the part of the trace it belongs to."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    phase: str = ""


@dataclass(frozen=True, slots=True)
class Mix:
    """Poisson arrivals, with lengths that vary evenly by `spread` around their means."""

    name: str
    rate: float  # requests a second
    prompt_tokens: int
    output_tokens: int
    spread: float = 0.5

    def arrivals(self, start_s: float, end_s: float, rng: random.Random) -> Iterator[Arrival]:
        at_s = start_s
        while (at_s := at_s + rng.expovariate(self.rate)) < end_s:
            yield Arrival(at_s, self._vary(self.prompt_tokens, rng), self._vary(self.output_tokens, rng), self.name)

    def _vary(self, mean: int, rng: random.Random) -> int:
        return max(round(mean * rng.uniform(1.0 - self.spread, 1.0 + self.spread)), 1)


def square_wave(mixes: tuple[Mix, ...], phase_s: float, phases: int, seed: int) -> list[Arrival]:
    """One mix after another, `phase_s` seconds each."""
    rng = random.Random(seed)
    return [
        arrival
        for index in range(phases)
        for arrival in mixes[index % len(mixes)].arrivals(index * phase_s, (index + 1) * phase_s, rng)
    ]


def from_trace(entries: Iterable[TraceEntry], *, speedup: float = 1.0) -> list[Arrival]:
    """A recorded service's requests, as many times as fast."""
    return [Arrival(each.at_s / speedup, each.prompt_tokens, each.output_tokens) for each in entries]
