"""What is known of one request on its way: where it is, what was sent, how long each part took."""

from dataclasses import dataclass, field, replace

from tidemill.core.lifecycle import REQUEST_MOVES, Lifecycle, RequestState
from tidemill.core.messages import FirstToken, Prefilled, Tokens
from tidemill.core.model import Request, WorkerId
from tidemill.core.promises import sameness
from tidemill.core.trace import Span, Stage, Trace
from tidemill.types import FinishReason, Route, Speculation, Summary, Timing

MAX_STAGES = 64  # kept of one request: one that nobody has room for asks again and again


@dataclass(frozen=True, slots=True)
class Entered:
    """A stage begins, and the one before it ends."""

    stage: Stage
    at: float
    worker: str
    note: str


def _new_lifecycle() -> Lifecycle[RequestState]:
    return Lifecycle(RequestState.QUEUED, REQUEST_MOVES)


@dataclass(slots=True, eq=False)
class Journey:
    """Belongs to the coroutine that serves the request. Times are monotonic seconds."""

    request: Request  # as it arrived; its output is what the client has from another router
    arrived_at: float
    deadline: float
    router: str = ""  # tells its ids from those of other routers, which the same workers may know
    lifecycle: Lifecycle[RequestState] = field(default_factory=_new_lifecycle)
    sent: list[int] = field(default_factory=list)
    avoid: set[WorkerId] = field(default_factory=set)  # workers that failed it
    refused: set[WorkerId] = field(default_factory=set)  # workers without room at the moment
    attempts: int = 0
    pauses: int = 0  # in a row, without a place
    without_place_since: float = 0.0
    kv_from: WorkerId | None = None  # the prefill worker whose KV is on its way
    kv_lost: bool = False  # the prefill worker failed, and the verify worker computes what has not come
    retries: int = 0  # attempts that came to nothing
    failures: int = 0  # those of them that a worker is to blame for
    split_reason: str = ""
    prefill_worker: str = ""
    verify_worker: str = ""
    draft_worker: str = ""
    prefill_s: float = 0.0
    computing_done_at: float = 0.0  # prefill worker done, or nothing to prefill
    first_at: float = 0.0
    last_at: float = 0.0
    timing: Timing = field(default_factory=Timing)
    verify_steps: int = 0
    drafted: int = 0
    accepted: int = 0
    finish: FinishReason | None = None
    stages: list[Entered] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.enter(Stage.QUEUE, self.arrived_at)

    def enter(self, stage: Stage, now: float, worker: WorkerId | None = None, note: str = "") -> None:
        """It waits for something else from now on; when too much happened, the rest counts as the last stage kept."""
        if len(self.stages) < MAX_STAGES:
            self.stages.append(Entered(stage, now, str(worker or ""), note))

    def next_attempt(self) -> Request:
        """The request as the next workers must see it: with the tokens sent, and under an id of its own.

        A worker may still be sending tokens of an earlier attempt when it is given a new one; the id tells them apart.
        """
        self.kv_lost = False
        return replace(self.request.resumed(self.sent), id=self.next_id())

    def next_id(self) -> str:
        """Under which the request has not been known to any worker."""
        self.attempts += 1
        return f"{self.request.id}#{self.router}{self.attempts}"

    def prefilled(self, event: Prefilled | None, now: float) -> None:
        """The prompt's KV is computed; None if the verify worker had all of it."""
        self.prefill_s = min(event.prefill_s, now - self.arrived_at) if event else 0.0
        self.computing_done_at = now

    def took(self, event: Tokens, now: float) -> None:
        """Count a step's tokens, which are about to be sent."""
        if not self.sent:
            self._first_token(event.first or FirstToken(0.0, 0.0, 0.0), now)
        self.sent += event.tokens
        self.last_at = now
        self.verify_steps += 1
        self.drafted += event.drafted
        self.accepted += event.accepted
        self.finish = event.finish

    def _first_token(self, first: FirstToken, now: float) -> None:
        """The four parts add up to TTFT: each but one is measured, and that one is the rest."""
        self.first_at = now
        ttft_s = now - self.arrived_at
        if self.prefill_worker:
            decode_s = min(first.decode_s, max(now - self.computing_done_at, 0.0))
            queue_s = self.computing_done_at - self.arrived_at - self.prefill_s
            self.timing = Timing(queue_s, self.prefill_s, now - self.computing_done_at - decode_s, decode_s, ttft_s)
        else:
            prefill_s = min(first.prefill_s, ttft_s)
            decode_s = min(first.decode_s, ttft_s - prefill_s)
            self.timing = Timing(ttft_s - prefill_s - decode_s, prefill_s, 0.0, decode_s, ttft_s)

    @property
    def tpot_s(self) -> float:
        """Mean seconds per output token after the first; 0 with fewer than two."""
        return (self.last_at - self.first_at) / (len(self.sent) - 1) if len(self.sent) > 1 else 0.0

    def trace(self, outcome: str, now: float, wall: float) -> Trace:
        """Once it ended, however that was. A finished request ends with its last token."""
        end = self.last_at if self.finish is not None else now
        ends = [*(each.at for each in self.stages[1:]), end]
        slo = self.request.slo
        return Trace(
            self.request.id,
            wall,
            outcome,
            slo.name,
            slo.ttft_s,
            slo.tpot_s,
            len(self.request.prompt),
            len(self.sent),
            self.failures,
            self.split_reason,
            self.prefill_worker,
            self.verify_worker,
            self.draft_worker,
            self.verify_steps,
            self.drafted,
            self.accepted,
            self._timing(end),
            tuple(
                Span(each.stage, each.at - self.arrived_at, until - self.arrived_at, each.worker, each.note)
                for each, until in zip(self.stages, ends, strict=True)
            ),
        )

    def _timing(self, end: float) -> Timing:
        return replace(self.timing, tpot_s=self.tpot_s, total_s=end - self.arrived_at)

    def summary(self, model: str, engine: str, now: float) -> Summary:
        """For the client, once finished. `engine`: the kind that served it."""
        assert self.finish is not None
        return Summary(
            request_id=self.request.id,
            model=model,
            finish_reason=self.finish,
            prompt_tokens=len(self.request.prompt),
            output_tokens=len(self.request.output) + len(self.sent),
            seed=self.request.sampling.seed or 0,
            timing=self._timing(now),
            route=Route(self.prefill_worker, self.verify_worker, self.draft_worker, self.split_reason, self.retries),
            speculation=Speculation(self.verify_steps, self.drafted, self.accepted),
            sameness=sameness(engine, self.request.sampling),
        )
