"""How many workers each role needs to meet the goals, estimated from what was measured lately.

Prefill is a queue: workers = rate of prompt tokens / tokens per busy second / the utilisation at which waiting still
leaves the goal time (M/D/1 as in DistServe, arXiv 2401.09670, with the tail of the wait instead of its mean).
Verify is a batch: workers = requests that decode at once at the goal's pace (Little's law) / the largest batch that
keeps the pace and fits the KV pool. Drafts are judged by goodput: tokens a second with them, to without.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tidemill.core.model import Role
from tidemill.core.telemetry import Progress, RouterTelemetry, Steps, Traffic, Window, WorkerTelemetry

CHANGED = 3.0  # standard deviations between a short window and the rest of a longer one: the traffic is another now
TAIL = 1.15  # ln(10) / 2: of ten prompts one waits longer than so many times D·u/(1 - u) at utilisation u
CLEAR_S = 3.0  # a backlog of prompts should be gone within
KV_SHARE = 0.9  # of a pool in use before requests are refused
PACE_SHARE = 0.9  # of the goal, since not all requests get the mean pace
LEAST_SPARE = 0.05  # of a step: a goal below what the smallest step takes cannot be met, whatever moves
MOST_GROWTH = 2.0  # of arrivals over ends: those that will end are not like those that have
LEAST_UTILISATION, MOST_UTILISATION = 0.3, 0.95
PRIOR, PRIOR_WEIGHT = 0.25, 0.01  # of a step's time for each of requests and KV, until samples that differ tell


@dataclass(frozen=True, slots=True)
class Demand:
    """Workers needed, not rounded. `verify` is without drafts; with them it is `verify / gain`."""

    prefill: float = 0.0
    verify: float = 0.0
    draft: float = 0.0  # to draft for everything that would gain from it
    gain: float = 1.0  # tokens a second of a verify worker with drafts, to without


@dataclass(frozen=True, slots=True)
class Rate:
    """So much a second, and how many seconds that was measured over."""

    per_s: float
    seconds: float
    window: int


def rate(windows: Sequence[Window], total: Callable[[Traffic], float], squares: Callable[[Traffic], float]) -> Rate:
    """Over the longest window whose parts agree: a short one as soon as the traffic has changed.

    Arrivals are taken for a compound Poisson process: a sum's variance is the sum of squares.
    """
    sums = [(window.seconds, total(window.all), squares(window.all)) for window in windows]
    at = 0
    for index in range(1, len(sums)):
        (seconds, found, _), (longer_s, whole, square) = sums[at], sums[index]
        rest_s = longer_s - seconds
        if rest_s < seconds / 2:
            continue  # the router has not been up for longer
        deviation = math.sqrt(square / longer_s * (1.0 / seconds + 1.0 / rest_s))
        if abs(found / seconds - (whole - found) / rest_s) > CHANGED * deviation:
            break
        at = index
    return Rate(sums[at][1] / sums[at][0], sums[at][0], at)


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
        determinant = rr * hh - rh * rh
        if determinant <= 1e-12:
            a = b = PRIOR
        else:
            a, b = (hh * rs - rh * hs) / determinant, (rr * hs - rh * rs) / determinant
        if a < 0:
            a, b = 0.0, hs / hh
        elif b < 0:
            a, b = rs / rr, 0.0
        a, b = max(a, 0.0), max(b, 0.0)
        scale = min(1.0, 1.0 / (a + b)) if a + b > 0 else 1.0
        a, b = a * scale, b * scale
        return cls((1.0 - a - b) * seconds, a * seconds / running, b * seconds / held)


def demand(telemetry: RouterTelemetry) -> Demand:
    """All zero without traffic."""
    windows = telemetry.windows
    if not windows or not windows[-1].all.arrived:
        return Demand()
    verify = [worker for worker in telemetry.workers if worker.role is Role.VERIFY]
    progress = windows[-1].of(Role.VERIFY)
    return Demand(_prefill(telemetry), _verify(windows, verify, progress))


def strictest(window: Window, goal: Callable[[Traffic], float]) -> float:
    """The smallest mean goal of a class that makes up a tenth of the requests; infinite if none came."""
    enough = window.all.arrived / 10
    found = [goal(traffic) / traffic.arrived for _, traffic in window.classes if traffic.arrived >= max(enough, 1)]
    return min(found, default=math.inf)


# --- prefill ----------------------------------------------------------------------------------------------------


def _prefill(telemetry: RouterTelemetry) -> float:
    windows = telemetry.windows
    prompts = rate(windows, lambda t: t.prompt_tokens, lambda t: t.prompt_squares)
    per_s = _prompt_tokens_per_s(windows)
    if per_s is None:
        return 0.0
    seen = windows[prompts.window].all
    if not seen.arrived:
        return 0.0
    prompt_s = seen.prompt_tokens / seen.arrived / per_s
    goal_s = strictest(windows[-1], lambda t: t.ttft_goal_s)
    started = windows[-1].all
    rest_s = (started.transfer_s + started.first_decode_s) / max(started.started, 1)
    slack_s = max(goal_s - prompt_s - rest_s, 0.0)
    utilisation = min(max(slack_s / (slack_s + TAIL * prompt_s), LEAST_UTILISATION), MOST_UTILISATION)
    usual = prompts.per_s * goal_s / 2  # tokens that wait while the goal is met
    backlog = max(telemetry.waiting.tokens - usual, 0.0)
    return prompts.per_s / per_s / utilisation + backlog / per_s / CLEAR_S


def _prompt_tokens_per_s(windows: Sequence[Window]) -> float | None:
    """Of a busy prefill worker; where there was none, of a prompt computed where it is decoded."""
    for window in windows:
        progress = window.of(Role.PREFILL)
        if progress.busy_s > 1.0 and progress.prompt_tokens:
            return progress.prompt_tokens / progress.busy_s
    seen = windows[-1].all
    if not seen.prefill_s or not seen.started:
        return None
    return seen.prompt_tokens / seen.arrived * seen.started / seen.prefill_s


# --- verify -----------------------------------------------------------------------------------------------------


def _verify(windows: Sequence[Window], workers: Sequence[WorkerTelemetry], progress: Progress) -> float:
    """The larger of what arrives and what is there: at the goal's pace a worker has so much of each second left for
    requests and their KV, after what every step costs.
    """
    line = StepLine.fit(progress.steps)
    if line is None or not workers:
        return 0.0
    pace_s = PACE_SHARE * strictest(windows[-1], lambda t: t.tpot_goal_s)
    step_s = pace_s * progress.tokens_per_verify
    spare_s = max(step_s - line.base, LEAST_SPARE * step_s)
    room = KV_SHARE * sum(w.load.kv_blocks_total * w.load.block_size for w in workers) / len(workers)

    running = sum(worker.load.running_requests for worker in workers)
    held = sum(worker.load.kv_blocks_used * worker.load.block_size for worker in workers)
    present = max((line.each * running + line.held * held) / spare_s, held / room)

    done = windows[rate(windows, lambda t: t.output_tokens, lambda t: t.output_squares).window]
    arrivals = rate(windows, lambda t: t.arrived, lambda t: t.arrived).per_s
    traffic = done.all
    if not traffic.finished:
        return present
    grows = min(max(arrivals / (traffic.finished / done.seconds), 1.0), MOST_GROWTH)
    at_once = grows * traffic.output_tokens / done.seconds * pace_s  # requests that decode, at the goal's pace
    held = grows * traffic.attended_tokens / done.seconds * pace_s
    return max((line.each * at_once + line.held * held) / spare_s, held / room, present)
