"""How long a step takes: pure functions of what it computes, for the emulated engine and for simulations.

    work = StepWork(prefill_tokens=512, prefill_squares=512**2)
    OPT_13B(work)  # seconds

A step that prefills some prompts and decodes others reads the weights once.
"""

import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from itertools import product
from pathlib import Path

import numpy as np
import numpy.typing as npt

from tidemill.core.settings import LatencySettings

MEASUREMENT = "seconds"  # the last column of a file of measured steps


class BadMeasurements(ValueError):
    """A file of measured steps cannot be used; the message says where and why."""


@dataclass(frozen=True, slots=True)
class StepWork:
    """What one forward pass computes."""

    prefill_tokens: int = 0
    prefill_squares: int = 0  # sum over its chunks of end² - start²: a prompt's chunks add up to its squared length
    decode_rows: int = 0  # sequences that get their next token
    context_tokens: int = 0  # of these sequences, each counted once
    drafted_rows: int = 0  # nodes of token trees that are verified beside them

    @property
    def rows(self) -> int:
        return self.prefill_tokens + self.decode_rows + self.drafted_rows


LatencyModel = Callable[[StepWork], float]
MeasuredStep = tuple[StepWork, float]  # seconds


@dataclass(frozen=True, slots=True)
class LinearLatency:
    """A constant for each step, and so much for each thing in it; all in seconds."""

    step_s: float = 0.0
    prefill_token_s: float = 0.0
    prefill_square_s: float = 0.0
    decode_row_s: float = 0.0
    context_token_s: float = 0.0
    drafted_row_s: float = 0.0

    def __call__(self, work: StepWork) -> float:
        return (
            self.step_s
            + self.prefill_token_s * work.prefill_tokens
            + self.prefill_square_s * work.prefill_squares
            + self.decode_row_s * work.decode_rows
            + self.context_token_s * work.context_tokens
            + self.drafted_row_s * work.drafted_rows
        )

    @classmethod
    def fit(cls, steps: Sequence[MeasuredStep]) -> "LinearLatency":
        """The coefficients, none below 0, with the least squared relative error.

        Exact, by trying every set of coefficients that may be 0. Raises ValueError if there are fewer steps than
        coefficients, or one took no time.
        """
        if len(steps) < len(fields(cls)) or any(seconds <= 0.0 for _, seconds in steps):
            raise ValueError(f"{len(fields(cls))} measured steps or more are needed, all of them longer than 0 s")
        seconds = np.array([seconds for _, seconds in steps])
        features = np.array([(1, *astuple(work)) for work, _ in steps], np.float64) / seconds[:, None]
        return cls(*_least_squares(features, np.ones(len(steps))).tolist())


def _least_squares(features: npt.NDArray[np.float64], target: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """x >= 0 with the smallest |features x - target|²."""
    scale = np.maximum(np.abs(features).max(0), 1e-300)
    best, best_error = np.zeros(features.shape[1]), float(target @ target)
    for chosen in product((False, True), repeat=features.shape[1]):
        used = np.flatnonzero(chosen)
        if not used.size:
            continue
        found = np.linalg.lstsq(features[:, used] / scale[used], target, rcond=None)[0]
        error = float(((features[:, used] / scale[used] @ found - target) ** 2).sum())
        if (found >= 0.0).all() and error < best_error - 1e-12:
            best, best_error = np.zeros(features.shape[1]), error
            best[used] = found / scale[used]
    return best


@dataclass(frozen=True, slots=True)
class PhasedLatency:
    """Another line for prompts than for decoding, and for decoding another from so many rows on.

    The form is DistServe's (arXiv 2401.09670, appendix A). Its steps are of one phase only; here one of both costs what
    the two would, less the constant that both begin with: the weights are read once. That is the constant of a step
    with few rows, whatever line the step is on; `decode_many` has part of it in its slope. Drafted rows count as rows
    that decode.
    """

    prefill: LinearLatency
    decode: LinearLatency
    many_rows: int
    decode_many: LinearLatency

    def __call__(self, work: StepWork) -> float:
        rows = work.decode_rows + work.drafted_rows
        decode = self.decode if rows < self.many_rows else self.decode_many
        if not work.prefill_tokens:
            return decode(work)
        if not rows:
            return self.prefill(work)
        return self.prefill(work) + decode(work) - min(self.prefill.step_s, self.decode.step_s)


def _decode_line(step_ms: float, context_token_ms: float, row_ms: float) -> LinearLatency:
    row_s = row_ms * 1e-3
    return LinearLatency(
        step_ms * 1e-3, decode_row_s=row_s, context_token_s=context_token_ms * 1e-3, drafted_row_s=row_s
    )


# OPT-13B on one A100 with 80 GB, as DistServe's simulator has it: "facebook/opt-13b", tensor parallelism 1; in ms.
# github.com/LLMServe/DistServe, simdistserve/estimators/profile_data/profiler-a100-80g.distserve.json and
# time_estimator.py, at commit 7057aefe62f61c69600b1354e044e3dbc7cc1b1c.
OPT_13B = PhasedLatency(
    prefill=LinearLatency(
        16.456860431694288e-3, prefill_token_s=0.09264750660897617e-3, prefill_square_s=6.474785740229194e-9
    ),
    decode=_decode_line(19.934702624895458, 0.0006269356524350583, 0.03850697740828398),
    many_rows=95,
    decode_many=_decode_line(7.1661889468253595, 0.0005798000403396046, 0.15831096191764046),
)


def latency_model(settings: LatencySettings) -> LatencyModel:
    """What the settings ask for. Raises BadMeasurements if a file of measured steps cannot be used."""
    model: LatencyModel
    if settings.model == "opt-13b":
        model = OPT_13B
    elif settings.model == "fitted":
        assert settings.measured is not None
        model = _fitted(settings.measured)
    else:
        model = LinearLatency(**{field.name: getattr(settings, field.name) for field in fields(LinearLatency)})
    return lambda work: settings.scale * model(work)


def _fitted(path: Path) -> LinearLatency:
    try:
        return LinearLatency.fit(read_steps(path))
    except BadMeasurements:
        raise
    except ValueError as error:
        raise BadMeasurements(f"{path}: {error}") from error


# --- files of measured steps: CSV, one line a step, the columns those of StepWork and `seconds` -----------------------


def _columns() -> list[str]:
    return [*(field.name for field in fields(StepWork)), MEASUREMENT]


def write_steps(path: Path, steps: Iterable[MeasuredStep]) -> None:
    """Overwrites the file."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(_columns())
        writer.writerows((*astuple(work), f"{seconds:.6g}") for work, seconds in steps)


def read_steps(path: Path) -> list[MeasuredStep]:
    """Raises BadMeasurements."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames != _columns():
                raise BadMeasurements(f"{path}: expected the columns {','.join(_columns())}")
            return [_step(row, f"{path}:{reader.line_num}") for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadMeasurements(f"{path}: cannot be read: {error}") from error


def _step(row: dict[str, str], place: str) -> MeasuredStep:
    try:
        return StepWork(*(int(row[field.name]) for field in fields(StepWork))), float(row[MEASUREMENT])
    except (TypeError, ValueError) as error:
        raise BadMeasurements(f"{place}: {error}") from error
