"""What the router sees of its requests and workers, kept for a minute in sums: the controller asks for it each period.

Memory is bounded: buckets of half a second, for each SLO class of the settings, each worker and each role; and one
entry for each request that waits for its first token, whose number is bounded by admission.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Generic

from router.journey import Journey
from tidemill.core.messages import Event, Tokens
from tidemill.core.model import Role, WorkerId, WorkerLoad
from tidemill.core.telemetry import (
    History,
    Progress,
    RouterTelemetry,
    Steps,
    Total,
    Traffic,
    Waiting,
    Window,
    WorkerTelemetry,
    add_up,
)

BUCKET_S = 0.5
HISTORY_POINTS, HISTORY_STEP_S = 30, 2.0
WORKER_HORIZON_S = 10.0
FORGET_WORKER_S = 30.0  # one that has not reported for so long is gone


class Sliding(Generic[Total]):
    """Sums of the last `horizon_s` seconds, in buckets."""

    def __init__(self, zero: Total, horizon_s: float) -> None:
        self._zero = zero
        self._buckets: dict[int, Total] = {}  # the newest last
        self._kept = int(horizon_s / BUCKET_S) + 1

    def add(self, value: Total, now: float) -> None:
        index = int(now // BUCKET_S)
        self._buckets[index] = self._buckets.get(index, self._zero) + value
        for old in list(itertools.takewhile(lambda each: each <= index - self._kept, self._buckets)):
            del self._buckets[old]

    def amend(self, value: Total, then: float) -> None:
        """Add to a bucket of the past, if it is still there."""
        index = int(then // BUCKET_S)
        if index in self._buckets:
            self._buckets[index] += value

    def totals(self, spans_s: Sequence[float], now: float) -> list[Total]:
        """The sums since `span_start` of each span; shortest span first."""
        found: list[Total] = []
        total, buckets = self._zero, reversed(self._buckets.items())
        bucket = next(buckets, None)
        for span_s in spans_s:
            first = _first_bucket(span_s, now)
            while bucket is not None and bucket[0] >= first:
                total = total + bucket[1]
                bucket = next(buckets, None)
            found.append(total)
        return found

    def points(self, count: int, step_s: float, now: float) -> tuple[Total, ...]:
        """The last `count` steps of `step_s` seconds, the oldest first. Steps begin at multiples of their length, so
        that a point keeps its sum while it moves on.
        """
        first, per_step = int(now // step_s) - count + 1, int(step_s / BUCKET_S)
        found: list[list[Total]] = [[] for _ in range(count)]
        for index, total in self._buckets.items():
            place = index // per_step - first
            if 0 <= place < count:
                found[place].append(total)
        return tuple(add_up(each) if each else self._zero for each in found)


def _first_bucket(span_s: float, now: float) -> int:
    return int(now // BUCKET_S) - int(span_s / BUCKET_S) + 1


def span_start(span_s: float, now: float) -> float:
    """When the span begins, in whole buckets: the one that is being filled is its last."""
    return _first_bucket(span_s, now) * BUCKET_S


@dataclass(frozen=True, slots=True)
class Counted:
    """What the events of one report, or the part of them that concerns this router's requests, add up to."""

    tokens: int = 0
    verifies: int = 0
    drafted: int = 0
    accepted: int = 0
    prompt_tokens: int = 0  # of prompts whose prefill has ended


NOTHING = Counted()


def count(events: Sequence[Event], prompt_tokens: int) -> Counted:
    """Of one report."""
    if not events:
        return NOTHING
    tokens = verifies = drafted = accepted = 0
    for event in events:
        if isinstance(event, Tokens):
            verifies += 1
            tokens += len(event.tokens)
            drafted += event.drafted
            accepted += event.accepted
    return Counted(tokens, verifies, drafted, accepted, prompt_tokens)


class WorkerWatch:
    """One worker incarnation. Reports come once a step: they are added up, and put into a window twice a second."""

    def __init__(self, worker: WorkerId, role: Role, load: WorkerLoad, now: float) -> None:
        self.worker = worker
        self.role = role
        self.accepting = False
        self.load = load
        self.heard_at = self.moved_at = now
        self.recent = Sliding(Progress(), WORKER_HORIZON_S)
        self._bucket = int(now // BUCKET_S)
        self._since, self._busy_s = now, load.busy_s
        self._yielded = False  # the last report had tokens: the next one that has them is a step later
        self._clear()

    def _clear(self) -> None:
        self._prompt_tokens = self._verifies = self._tokens = self._drafted = self._accepted = 0
        self._steps = Steps()

    def report(self, accepting: bool, load: WorkerLoad, counted: Counted, now: float) -> Progress | None:
        """Returns what was added up when a bucket is full."""
        done = self.flush(now) if int(now // BUCKET_S) != self._bucket else None
        steps = load.steps - self.load.steps
        if counted.verifies:
            if self._yielded and steps > 0:
                held = load.kv_blocks_used * load.block_size
                self._steps += Steps.of(load.running_requests, held, (now - self.heard_at) / steps)
            self._verifies += counted.verifies
            self._tokens += counted.tokens
            self._drafted += counted.drafted
            self._accepted += counted.accepted
        self._prompt_tokens += counted.prompt_tokens
        self._yielded = counted.verifies > 0
        if steps or counted is not NOTHING or not (load.queued_requests or load.running_requests):
            self.moved_at = now
        self.accepting, self.load, self.heard_at = accepting, load, now
        return done

    def flush(self, now: float) -> Progress:
        """What was added up since the last time goes into the window."""
        done = Progress(
            now - self._since,
            max(self.load.busy_s - self._busy_s, 0.0),
            self._prompt_tokens,
            self._verifies,
            self._tokens,
            self._drafted,
            self._accepted,
            self._steps,
        )
        self.recent.add(done, now)
        self._bucket, self._since, self._busy_s = int(now // BUCKET_S), now, self.load.busy_s
        self._clear()
        return done

    def telemetry(self, now: float) -> WorkerTelemetry:
        idle = not (self.load.queued_requests or self.load.running_requests)
        return WorkerTelemetry(
            self.worker,
            self.role,
            self.accepting,
            self.load,
            now - self.heard_at,
            0.0 if idle else now - self.moved_at,
            self.recent.totals((WORKER_HORIZON_S,), now)[0],
        )


class Telemetry:
    """Belongs to the router's event loop; time comes in as an argument."""

    def __init__(self, windows_s: Sequence[float], now: float) -> None:
        """`windows_s`: how far back the windows reach, the shortest first."""
        self._windows_s = tuple(windows_s)
        self._horizon_s = max(windows_s[-1], HISTORY_POINTS * HISTORY_STEP_S)
        self._since = now
        self._classes: dict[str, Sliding[Traffic]] = {}
        self._waiting: dict[str, Journey] = {}
        self._workers: dict[str, WorkerWatch] = {}
        self._roles = {role: Sliding(Progress(), self._horizon_s) for role in Role}

    # --- requests -----------------------------------------------------------------------------------------------

    def arrived(self, journey: Journey, now: float) -> None:
        slo, tokens = journey.request.slo, len(journey.request.prompt)
        self._waiting[journey.request.id] = journey
        self._add(journey, Traffic(1, tokens, tokens * tokens, slo.ttft_s, slo.tpot_s), now)

    def started(self, journey: Journey, now: float) -> None:
        """Its first token is about to leave."""
        self._waiting.pop(journey.request.id, None)
        timing, goal_s = journey.timing, journey.request.slo.ttft_s
        self._add(
            journey,
            Traffic(
                started=1,
                queue_s=timing.queue_s,
                prefill_s=timing.prefill_s,
                transfer_s=timing.transfer_s,
                first_decode_s=timing.first_decode_s,
                ttft_met=timing.ttft_s <= goal_s,
                ttft_of_goal=timing.ttft_s / goal_s,
            ),
            now,
        )

    def ended(self, journey: Journey, now: float, *, failed: bool) -> None:
        """However it ended; `failed` unless it finished or its client left."""
        self._waiting.pop(journey.request.id, None)
        if journey.finish is None:
            if failed:
                self._add(journey, Traffic(failed=1), now)
            return
        slo, tokens, tpot_s = journey.request.slo, len(journey.sent), journey.tpot_s
        ttft_met, tpot_met = journey.timing.ttft_s <= slo.ttft_s, tpot_s <= slo.tpot_s
        self._add(
            journey,
            Traffic(
                finished=1,
                paced=tokens > 1,
                tpot_s=tpot_s,
                tpot_met=tpot_met,
                tpot_of_goal=tpot_s / slo.tpot_s,
                met=ttft_met and tpot_met,
            ),
            now,
        )
        attended = tokens * len(journey.request.prompt) + tokens * tokens // 2
        output = Traffic(known=1, output_tokens=tokens, attended_tokens=attended)
        self._classes[slo.name].amend(output, journey.arrived_at)

    def _add(self, journey: Journey, traffic: Traffic, now: float) -> None:
        name = journey.request.slo.name
        if name not in self._classes:
            self._classes[name] = Sliding(Traffic(), self._horizon_s)
        self._classes[name].add(traffic, now)

    # --- workers ------------------------------------------------------------------------------------------------

    def reported(
        self, worker: WorkerId, role: Role, accepting: bool, load: WorkerLoad, counted: Counted, now: float
    ) -> None:
        """A worker's report; a new incarnation begins anew."""
        watch = self._workers.get(worker.name)
        if watch is None or watch.worker != worker:
            watch = self._workers[worker.name] = WorkerWatch(worker, role, load, now)
        done = watch.report(accepting, load, counted, now)
        if done is not None:
            self._roles[role].add(done, now)

    # --- for the controller, and for people ---------------------------------------------------------------------

    def snapshot(self, now: float) -> RouterTelemetry:
        by_class = {name: each.totals(self._windows_s, now) for name, each in sorted(self._classes.items())}
        by_role = {role: each.totals(self._windows_s, now) for role, each in self._roles.items()}
        windows = tuple(
            Window(
                max(now - max(span_start(span_s, now), self._since), 1e-3),
                tuple((name, totals[index]) for name, totals in by_class.items()),
                tuple((role, totals[index]) for role, totals in by_role.items()),
            )
            for index, span_s in enumerate(self._windows_s)
        )
        return replace(self.present(now), windows=windows)

    def present(self, now: float) -> RouterTelemetry:
        """Without the windows, which are most of the work."""
        for name in [each for each, watch in self._workers.items() if now - watch.heard_at > FORGET_WORKER_S]:
            del self._workers[name]
        workers = tuple(watch.telemetry(now) for _, watch in sorted(self._workers.items()))
        return RouterTelemetry((), self._waiting_now(now), workers)

    def history(self, now: float) -> History:
        """The last minute, for people to look at."""

        def points(window: Sliding[Total]) -> tuple[Total, ...]:
            return window.points(HISTORY_POINTS, HISTORY_STEP_S, now)

        return History(
            HISTORY_STEP_S,
            tuple((name, points(each)) for name, each in sorted(self._classes.items())),
            tuple((role, points(each)) for role, each in self._roles.items()),
        )

    def _waiting_now(self, now: float) -> Waiting:
        waiting = self._waiting.values()
        return Waiting(
            len(waiting),
            sum(len(each.request.prompt) for each in waiting),
            max(((now - each.arrived_at) / each.request.slo.ttft_s for each in waiting), default=0.0),
        )
