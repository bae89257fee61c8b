"""One request's life, after it ended: where it was, when, and where its time went. Holds no text and no token."""

from dataclasses import dataclass
from enum import StrEnum

from tidemill.types import Timing


class Stage(StrEnum):
    """Where a request's time is spent, as the router sees it."""

    QUEUE = "queue"  # for admission, or for a worker with room
    RESERVE = "reserve"  # the verify worker's answer
    PREFILL = "prefill"  # on a prefill worker, with the wait before it; KV travels meanwhile
    FIRST = "first token"  # the rest of the KV, the first decode; and the prompt, if prefilled in place
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class Span:
    """Seconds since the request arrived."""

    stage: Stage
    start_s: float
    end_s: float
    worker: str  # name@epoch; empty in the queue
    note: str  # why it got there, if that was not the usual way

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s


@dataclass(frozen=True, slots=True)
class Trace:
    request_id: str
    at: float  # seconds of wall time, when it ended
    outcome: str  # finish reason, or kind of error
    slo_class: str
    ttft_goal_s: float
    tpot_goal_s: float
    prompt_tokens: int
    output_tokens: int
    failures: int
    split_reason: str
    prefill_worker: str  # of the last attempt, as the other two
    verify_worker: str
    draft_worker: str
    verify_steps: int
    drafted: int
    accepted: int
    timing: Timing
    spans: tuple[Span, ...]

    @property
    def by_stage(self) -> dict[Stage, float]:
        """Seconds; stages it never was in are left out."""
        found: dict[Stage, float] = {}
        for span in self.spans:
            found[span.stage] = found.get(span.stage, 0.0) + span.seconds
        return found
