"""Which requests come when: arrival processes, lengths, latency classes, traces. Pure; the same seed, the same load."""

import csv
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from itertools import takewhile
from pathlib import Path

TRACE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")  # of the Azure LLM inference traces
LENGTHS_HELP = "N, uniform:LOW:HIGH or lognormal:MEDIAN:SIGMA"


class BadWorkload(ValueError):
    """A load that cannot be made; the message says what was expected."""


class Process(StrEnum):
    """How arrivals are spread over time."""

    POISSON = "poisson"
    CONSTANT = "constant"
    TRACE = "trace"


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a load. Seconds count from its beginning."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    slo_class: str


@dataclass(frozen=True, slots=True)
class TraceEntry:
    """One request of a recorded service. Seconds count from where it is played."""

    at_s: float
    prompt_tokens: int
    output_tokens: int


Lengths = Callable[[random.Random], int]


def parse_lengths(text: str) -> Lengths:
    """A distribution of token counts, each at least 1. Raises BadWorkload."""
    kind, *numbers = text.split(":") if ":" in text else ("fixed", text)
    try:
        match kind, [float(each) for each in numbers]:
            case "fixed", [count] if count >= 1:
                return lambda _: round(count)
            case "uniform", [low, high] if 1 <= low <= high:
                return lambda rng: rng.randint(round(low), round(high))
            case "lognormal", [median, sigma] if median >= 1 and sigma >= 0:
                return lambda rng: max(round(median * rng.lognormvariate(0.0, sigma)), 1)
    except ValueError:
        pass
    raise BadWorkload(f"{text!r} is no distribution of token counts; expected {LENGTHS_HELP}")


def parse_mix(text: str) -> dict[str, float]:
    """`tight=0.6,default=0.4` -> the share of each class, adding up to 1. A name alone counts 1. Raises BadWorkload."""
    shares: dict[str, float] = {}
    for part in text.split(","):
        name, _, share = part.strip().partition("=")
        try:
            shares[name] = float(share or 1)
        except ValueError:
            shares[name] = -1.0
        if not name or not 0 <= shares[name] < float("inf"):
            raise BadWorkload(f"{part.strip()!r} is no class with its share; expected such as tight=0.6,default=0.4")
    total = sum(shares.values())
    if total <= 0:
        raise BadWorkload(f"no class of {text!r} has a share")
    return {name: share / total for name, share in shares.items()}


def read_trace(path: Path, skip_s: float = 0.0) -> tuple[TraceEntry, ...]:
    """A CSV file with the columns of the Azure LLM inference traces, in order of time, without its first `skip_s`.

    Raises BadWorkload.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = set(TRACE_COLUMNS) - set(reader.fieldnames or ())
            if missing:
                raise BadWorkload(f"{path}: no column {sorted(missing)[0]}; expected {', '.join(TRACE_COLUMNS)}")
            rows = [_entry(row, f"{path}:{reader.line_num}") for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadWorkload(f"{path}: cannot be read: {error}") from error
    rows.sort(key=lambda row: row[0])
    begin = rows[0][0] + timedelta(seconds=skip_s) if rows else None
    trace = tuple(TraceEntry((at - begin).total_seconds(), *lengths) for at, *lengths in rows if begin and at >= begin)
    if len(trace) < 2:
        raise BadWorkload(
            f"{path}: a trace has two requests or more; this one has {len(rows)}, {len(trace)} after {skip_s} s"
        )
    return trace


def _entry(row: Mapping[str, str], place: str) -> tuple[datetime, int, int]:
    time, prompt, output = (row[name] for name in TRACE_COLUMNS)
    try:
        return datetime.fromisoformat(time), max(int(prompt), 1), max(int(output), 1)
    except (TypeError, ValueError) as error:
        raise BadWorkload(f"{place}: {error}") from error


def mean_rate(trace: Sequence[TraceEntry]) -> float:
    """Requests per second."""
    span = trace[-1].at_s - trace[0].at_s
    if span <= 0:
        raise BadWorkload("all requests of the trace came at once")
    return (len(trace) - 1) / span


def poisson(rate: float, rng: random.Random) -> Iterator[float]:
    """Times with exponential gaps, `rate` a second in the mean; without end."""
    at = 0.0
    while True:
        at += rng.expovariate(rate)
        yield at


def constant(rate: float) -> Iterator[float]:
    """Times with equal gaps; without end."""
    count = 0
    while True:
        yield count / rate
        count += 1


@dataclass(frozen=True, slots=True)
class Workload:
    """What is asked for, but for how often. A trace gives times, lengths or both.

    Lengths left out are the trace's: those of each request with `Process.TRACE`, of any of its requests otherwise.
    """

    process: Process
    mix: Mapping[str, float]
    prompt: Lengths | None = None
    output: Lengths | None = None
    trace: Sequence[TraceEntry] = ()

    def __post_init__(self) -> None:
        if not self.trace and (self.process is Process.TRACE or self.prompt is None or self.output is None):
            raise BadWorkload("without a trace, a process and distributions of both lengths are needed")

    def arrivals(self, rate: float, duration_s: float, seed: int) -> list[Arrival]:
        """All within `duration_s`, `rate` a second in the mean; a trace is sped up or slowed down as a whole to that.

        A trace that is shorter than this ends early.
        """
        rng = random.Random(f"{seed}/requests")
        names, shares = list(self.mix), list(self.mix.values())
        return [
            Arrival(
                at_s,
                self.prompt(rng) if self.prompt else entry.prompt_tokens,
                self.output(rng) if self.output else entry.output_tokens,
                rng.choices(names, shares)[0],
            )
            for at_s, entry in takewhile(lambda each: each[0] < duration_s, self._entries(rate, seed, rng))
        ]

    def _entries(self, rate: float, seed: int, rng: random.Random) -> Iterator[tuple[float, TraceEntry]]:
        """Times, and the entries whose lengths may be used."""
        if self.process is Process.TRACE:
            speed = rate / mean_rate(self.trace)
            yield from ((entry.at_s / speed, entry) for entry in self.trace)
            return
        times = random.Random(f"{seed}/times")
        for at_s in poisson(rate, times) if self.process is Process.POISSON else constant(rate):
            yield at_s, rng.choice(self.trace) if self.trace else TraceEntry(0.0, 1, 1)


def fitted(arrivals: Sequence[Arrival], context_length: int) -> tuple[list[Arrival], int]:
    """The same within a model's context, the output's length first; and how many had to be cut."""
    found = []
    for each in arrivals:
        output = min(each.output_tokens, context_length - 1)
        prompt = min(each.prompt_tokens, context_length - output)
        found.append(Arrival(each.at_s, prompt, output, each.slo_class))
    return found, sum(new != old for new, old in zip(found, arrivals, strict=True))
