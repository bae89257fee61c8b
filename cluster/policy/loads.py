"""How loaded each role is, as a ratio to the latency goals, now and with any other number of workers.

Prefill is a queue: TTFT = what the prompt itself takes + waiting (M/D/c: the M/D/1 of DistServe, arXiv 2401.09670, for
several workers, after Sakasegawa 1977) + the backlog + what comes after prefill; over the TTFT goal.
Verify is a batch: TPOT = a step's constant + what its requests and their KV add / tokens a step yields; over the TPOT
goal. And a pool of blocks: KV held / room.
Drafts have no goal of their own: they are worth what they do to TPOT.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tidemill.core.model import Role
from tidemill.core.telemetry import RouterTelemetry, Steps, Traffic, Window, WorkerTelemetry

CHANGED = 4.0  # standard deviations between a short window and the rest of a longer one: the traffic is another now
TAIL = 2.3  # ln 10: one prompt in ten waits longer than so many mean waits
AHEAD_S = 10.0  # a queue that grows is judged by what it will be then
FULL = 0.95  # utilisation from which on a queue grows rather than waits
KV_SHARE = 0.9  # of a pool in use before requests are refused
PACE_SHARE = 0.9  # of the TPOT goal: not all requests get the mean pace
CROWDED = 0.8  # share of time in what requests add to steps, from which on steps grow without end
TESTED = 1.5  # times as long a window is not asked whether its parts agree: the rest of it would say little
MET = 0.9  # share of requests within their goals, with which nothing needs to change
ENOUGH_BUSY_S = 3.0  # of prefill workers, to tell how fast they are
PRIOR, PRIOR_WEIGHT = 0.25, 0.01  # of a step's time for each of requests and KV, until samples that differ tell


# --- what was measured ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Seen:
    """A picture with what is made of it more than once."""

    telemetry: RouterTelemetry
    totals: tuple[Traffic, ...]  # of each window, all classes together
    at: int  # the longest window in which as many requests came all the time, with prompts as long

    @classmethod
    def of(cls, telemetry: RouterTelemetry, age_s: float = math.inf) -> "Seen":
        """`age_s`: for how long the traffic has been what it is, as far as is known."""
        totals = tuple(window.all for window in telemetry.windows)
        seconds = [window.seconds for window in telemetry.windows]
        prompts = steady(seconds, [each.prompt_tokens for each in totals], [each.prompt_squares for each in totals])
        arrivals = steady(seconds, [each.arrived for each in totals], [each.arrived for each in totals])
        younger = max(sum(each <= age_s for each in seconds) - 1, 0)
        return cls(telemetry, totals, min(prompts, arrivals, younger))

    @property
    def windows(self) -> tuple[Window, ...]:
        return self.telemetry.windows

    @property
    def lasts_s(self) -> float:
        """For how long the traffic has been what it is; infinite if for longer than there are windows."""
        return self.windows[self.at].seconds if self.at < len(self.windows) - 1 else math.inf

    def since(self, before: float, now: float) -> float:
        """Since when the traffic has been what it is, which was `before` at the last look; at first it is -infinity."""
        if not self.windows:
            return before
        if before == -math.inf:
            before = now - self.windows[-1].seconds
        steady_s = self.windows[self.at].seconds
        known_s = max((each.seconds for each in self.windows if each.seconds <= now - before), default=0.0)
        return now - steady_s if known_s >= steady_s * TESTED else before

    @property
    def settled(self) -> bool:
        """True if the traffic is what it was for as long as there are windows, and nearly all meet their goals."""
        if len(self.windows) < 2 or self.lasts_s < math.inf or self.windows[-1].seconds <= self.windows[-2].seconds:
            return False
        attainment = self.totals[-1].attainment
        return attainment is not None and attainment >= MET


def steady(seconds: Sequence[float], sums: Sequence[float], squares: Sequence[float]) -> int:
    """Index of the longest window whose parts agree: a short one as soon as the traffic has changed.

    Arrivals are taken for a compound Poisson process: a sum's variance is the sum of squares.
    """
    at = 0
    for index in range(1, len(sums)):
        rest_s = seconds[index] - seconds[at]
        if seconds[index] < seconds[at] * TESTED:
            continue  # the router has not been up for longer
        deviation = math.sqrt(squares[index] / seconds[index] * (1.0 / seconds[at] + 1.0 / rest_s))
        if abs(sums[at] / seconds[at] - (sums[index] - sums[at]) / rest_s) > CHANGED * deviation:
            break
        at = index
    return at


def strictest(window: Window, goal: Callable[[Traffic], float]) -> float:
    """The smallest mean goal of a class that makes up a tenth of the requests; infinite if none came."""
    enough = max(sum(each.arrived for _, each in window.classes) / 10, 1)
    return min((goal(each) / each.arrived for _, each in window.classes if each.arrived >= enough), default=math.inf)


@dataclass(frozen=True, slots=True)
class StepLine:
    """Seconds of a decoding step: `base + each * requests + held * KV tokens`."""

    base: float
    each: float
    held: float

    @classmethod
    def fit(cls, steps: Steps) -> "StepLine | None":
        """Least squares, drawn towards a prior where samples hardly differ. None without samples."""
        n = steps.samples
        if not n or not steps.running or not steps.held or not steps.seconds:
            return None
        running, held, seconds = steps.running / n, steps.held / n, steps.seconds / n
        # In units of the means, and around them: seconds = 1 + a (running - 1) + b (held - 1).
        rr = steps.running_running / n / running**2 - 1.0 + PRIOR_WEIGHT
        hh = steps.held_held / n / held**2 - 1.0 + PRIOR_WEIGHT
        rh = steps.running_held / n / (running * held) - 1.0
        rs = steps.running_seconds / n / (running * seconds) - 1.0 + PRIOR_WEIGHT * PRIOR
        hs = steps.held_seconds / n / (held * seconds) - 1.0 + PRIOR_WEIGHT * PRIOR
        determinant = rr * hh - rh * rh  # at least the prior's: covariances are within their variances
        a, b = (hh * rs - rh * hs) / determinant, (rr * hs - rh * rs) / determinant
        if a < 0:
            a, b = 0.0, max(hs / hh, 0.0)
        elif b < 0:
            a, b = max(rs / rr, 0.0), 0.0
        scale = min(1.0, 1.0 / (a + b)) if a + b > 0 else 1.0
        a, b = a * scale, b * scale
        return cls((1.0 - a - b) * seconds, a * seconds / running, b * seconds / held)


# --- prefill ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PrefillLoad:
    """Prompts as a queue sees them."""

    busy: float  # workers that would be busy all the time
    prompt_s: float  # one prompt's computation
    backlog_s: float  # worker-seconds that wait
    rest_s: float  # from the end of prefill to the first token
    goal_s: float  # TTFT

    def ratio(self, workers: int) -> float:
        """TTFT that one in ten exceeds, with so many workers, over its goal."""
        if not workers:
            return math.inf if self.busy else 0.0
        used = self.busy / workers
        calm = min(used, FULL)
        crowd = calm ** (math.sqrt(2.0 * (workers + 1)) - 1.0) / (2.0 * workers * (1.0 - calm))
        wait_s = TAIL * self.prompt_s * float(crowd)
        grown_s = max(used - FULL, 0.0) * AHEAD_S
        return (self.prompt_s + wait_s + grown_s + self.backlog_s / workers + self.rest_s) / self.goal_s


def prefill_load(seen: Seen) -> PrefillLoad | None:
    """None as long as no prompt was computed."""
    if not seen.windows:
        return None
    telemetry, per_s = seen.telemetry, _prompt_tokens_per_s(seen)
    recent, long = seen.totals[seen.at], seen.totals[-1]
    if per_s is None or not recent.arrived:
        return None
    prompt_s = recent.prompt_tokens / recent.arrived / per_s
    busy = recent.prompt_tokens / seen.windows[seen.at].seconds / per_s
    rest_s = (long.transfer_s + long.first_decode_s) / max(long.started, 1)
    goal_s = strictest(seen.windows[-1], lambda t: t.ttft_goal_s)
    # What is being computed, and on its way, does not wait: as many tokens as come in that time.
    queued = telemetry.waiting.tokens - _unplaced_tokens(telemetry)
    backlog_s = max(queued / per_s - busy * (prompt_s + rest_s), 0.0)
    return PrefillLoad(busy, prompt_s, backlog_s, rest_s, goal_s)


def _prompt_tokens_per_s(seen: Seen) -> float | None:
    """Of a busy prefill worker; if there was none, of a prompt computed where it is decoded."""
    for window in seen.windows[seen.at :]:
        progress = window.of(Role.PREFILL)
        if progress.busy_s > ENOUGH_BUSY_S and progress.prompt_tokens:
            return progress.prompt_tokens / progress.busy_s
    long = seen.totals[-1]
    if not long.prefill_s or not long.arrived:
        return None
    return long.prompt_tokens / long.arrived * long.started / long.prefill_s


# --- verify -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class VerifyLoad:
    """Requests that decode, as batches see them; drafts as they were lately."""

    base_s: float  # of a step, however little it does
    present_s: float  # what requests that are there add to a step, if one worker had all of them
    work: float  # seconds a second that arriving requests add to steps, of all workers together
    kv_present: float  # workers' pools that are full, with what is there and what waits for room
    kv_work: float  # the same with what arrives, at the goal's pace
    goal_s: float  # TPOT
    accepted: float = 0.0  # draft tokens a verified request gets on top
    drafted_s: float = 0.0  # what their verification adds, if one worker had all requests
    drafters: float = 0.0  # draft workers that this takes

    def ratio(self, workers: int, drafters: int) -> float:
        """TPOT over its goal, or KV over its room, whichever is more, with so many workers."""
        if not workers:
            return math.inf if self.present_s or self.work else 0.0
        share = min(drafters / self.drafters, 1.0) if self.drafters else 0.0
        gain = 1.0 + self.accepted * share
        present = (self.base_s + (self.present_s + self.drafted_s * share) / workers) / gain
        used = self.work / gain / workers
        left = 1.0 - min(used, CROWDED)
        arriving = self.base_s / gain / left * (1.0 + max(used - CROWDED, 0.0) / left)
        kv = max(self.kv_present, self.kv_work) / workers
        return max(present / self.goal_s, arriving / self.goal_s, kv)


def verify_load(seen: Seen) -> VerifyLoad | None:
    """None as long as nothing was decoded."""
    if not seen.windows:
        return None
    telemetry, windows = seen.telemetry, seen.windows
    workers = [worker for worker in telemetry.workers if worker.role is Role.VERIFY]
    progress = windows[-1].of(Role.VERIFY)
    line = StepLine.fit(progress.steps)
    if line is None or not workers:
        return None
    goal_s = PACE_SHARE * strictest(windows[-1], lambda t: t.tpot_goal_s)
    room = KV_SHARE * sum(_tokens(w.load.kv_blocks_total, w) for w in workers) / len(workers)
    running = sum(worker.load.running_requests for worker in workers)
    held = sum(_tokens(worker.load.kv_blocks_used, worker) for worker in workers)
    wanted = held + sum(_tokens(w.load.kv_blocks_leased, w) for w in workers) + _unplaced_tokens(telemetry)
    outputs, context = _arriving(seen)
    drafted = progress.drafted / progress.verifies if progress.verifies else 0.0
    return VerifyLoad(
        line.base,
        line.each * running + line.held * held,
        line.each * outputs + line.held * context,
        wanted / room,
        context * goal_s / room,
        goal_s,
        progress.tokens_per_verify - 1.0,
        line.each * running * drafted,
        _drafters(windows, telemetry.workers) if drafted else 0.0,
    )


def _unplaced_tokens(telemetry: RouterTelemetry) -> int:
    """Prompts that wait for room on a verify worker, not for a prefill worker."""
    verify = [worker.load for worker in telemetry.workers if worker.role is Role.VERIFY]
    taken = sum(load.kv_blocks_used + load.kv_blocks_leased for load in verify)
    if taken < KV_SHARE * sum(load.kv_blocks_total for load in verify):
        return 0
    return max(telemetry.waiting.tokens - sum(worker.load.queued_tokens for worker in telemetry.workers), 0)


def _tokens(blocks: int, worker: WorkerTelemetry) -> int:
    return blocks * worker.load.block_size


def _arriving(seen: Seen) -> tuple[float, float]:
    """Output tokens a second that the arriving requests will want, and the KV tokens these are computed with.

    Lengths are those of requests that came with this traffic and have finished. The short ones have first; what they
    leave out is seen in what is present.
    """
    recent = seen.totals[seen.at]
    if not recent.known:
        return 0.0, 0.0
    per_s = recent.arrived / seen.windows[seen.at].seconds / recent.known
    return per_s * recent.output_tokens, per_s * recent.attended_tokens


def _drafters(windows: Sequence[Window], workers: Sequence[WorkerTelemetry]) -> float:
    """Draft workers that would be busy all the time; more than there are if those there are cannot keep up."""
    progress = windows[-1].of(Role.DRAFT)
    there = sum(worker.role is Role.DRAFT for worker in workers)
    used = progress.busy_s / progress.seconds if progress.seconds else 0.0
    return there * used if used < FULL else 1.5 * there


__all__ = ["PrefillLoad", "Seen", "StepLine", "VerifyLoad", "prefill_load", "steady", "strictest", "verify_load"]
