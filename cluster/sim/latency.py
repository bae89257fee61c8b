"""How long a step takes: pure functions of what it computes."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepWork:
    """What one forward pass computes."""

    prefill_tokens: int = 0
    prefill_squares: int = 0  # sum over its chunks of end² - start²: a prompt's chunks add up to its squared length
    decode_rows: int = 0  # sequences that get their next token
    context_tokens: int = 0  # of these sequences, each counted once
    drafted_rows: int = 0  # nodes of token trees that are verified beside them


LatencyModel = Callable[[StepWork], float]


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


_PREFILL = LinearLatency(18.1e-3, prefill_token_s=0.102e-3, prefill_square_s=7.1e-9)
_DECODE = LinearLatency(19.9e-3, decode_row_s=0.0385e-3, context_token_s=6.3e-7, drafted_row_s=0.0385e-3)


def opt_13b(work: StepWork) -> float:
    """OPT-13B on one A100 with 80 GB, after DistServe (arXiv 2401.09670). A step of both phases reads weights once."""
    prefill, decode = _PREFILL(work), _DECODE(work)
    if not work.prefill_tokens:
        return decode
    return prefill if not work.decode_rows else prefill + decode - min(_PREFILL.step_s, _DECODE.step_s)
