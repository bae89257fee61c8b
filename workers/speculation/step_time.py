"""How long an engine's step takes, learnt from the steps themselves.

    seconds = level(rows) + slope * context + kv_slope * kv + prompt_slope * prompts

`rows` decode or verify; `context` is how many tokens they attend to, summed over the rows; `kv` the same with the rows
of a sequence counted once, for engines that read its KV once for all of them; `prompts` the tokens of prompts that the
step computes beside them. `level` is piecewise linear between knots at powers of two and never falls. It is SmartSpec's
model (arXiv 2406.14066) with a curve in place of its line: a step costs almost the same up to some number of rows, and
speculation lives on that.
"""

from bisect import bisect_right

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
KNOTS = tuple(1 << power for power in range(14))  # rows
_FAR = 1_000_000  # rows; the curve is a straight line up to here
_LEAST_S = 1e-6
_MEMORY = 100.0  # observations after which one counts for little
_KEPT = 3.0  # observations that a knot stands for even if it was not visited for long
_RIDGE = np.array([256.0, 256.0, 16.0]) ** 2  # squared tokens: what differs by less tells little of the slope
_SURPRISE = 3.0  # typical errors
_FIRST_ERROR, _LEAST_ERROR, _ERROR_STEP = 0.1, 0.01, 1.05


class StepTimes:
    """The model, from nothing. Seed it with measured steps of several sizes and contexts, then tell it of every step.

    The machine may be shared, so a step can be slowed from outside, but not sped up: one that took far longer than
    foreseen is believed only in part, unless that becomes usual; one that took less is believed.
    """

    def __init__(self) -> None:
        self._weights = [0.0] * len(KNOTS)  # observations of each knot, faded
        self._seconds = [0.0] * len(KNOTS)  # their mean duration
        self._features = np.zeros((len(KNOTS), _RIDGE.size))  # and their mean context, kv and prompts
        self._slopes = np.zeros(_RIDGE.size)
        self._information = np.zeros((_RIDGE.size, _RIDGE.size))  # products of deviations from these means, faded
        self._reach = _RIDGE**0.5  # the largest of these deviations
        self._error = _FIRST_ERROR  # running median of |observed / foreseen - 1|
        self._rows: list[float] = []  # the curve, at the knots that were observed and at _FAR
        self._levels: list[float] = []

    @property
    def ready(self) -> bool:
        """True once two knots were observed; before it nothing is known of what a row costs."""
        return sum(weight >= 1.0 for weight in self._weights) >= 2

    @property
    def slope(self) -> float:
        """Seconds per token of context."""
        return float(self._slopes[0])

    @property
    def kv_slope(self) -> float:
        """Seconds per token of a sequence, however many rows attend to it."""
        return float(self._slopes[1])

    @property
    def prompt_slope(self) -> float:
        """Seconds per token of a prompt."""
        return float(self._slopes[2])

    def seconds(self, rows: float, context: float, kv: float = 0.0, prompts: float = 0.0) -> float:
        """Of a step. Raises ValueError before the first observation."""
        return self.level(rows) + float(self._slopes @ (context, kv, prompts))

    def marginal(self, rows: float, more: float, context: float) -> float:
        """Seconds that `more` rows, which attend to `context` tokens, add to a step of `rows`."""
        return self.level(rows + more) - self.level(rows) + self.slope * context

    def levels(self, rows: npt.NDArray[np.integer]) -> Floats:
        """Seconds of steps of `rows` [steps] rows, without what their contexts cost: [steps]."""
        self._require_observations()
        return np.interp(rows.astype(np.float64), self._rows, self._levels)

    def level(self, rows: float) -> float:
        """Seconds of a step of so many rows, without what its contexts cost. Raises ValueError as `seconds` does."""
        self._require_observations()
        end = min(max(bisect_right(self._rows, rows), 1), len(self._rows) - 1)
        first, last = self._rows[end - 1], self._rows[end]
        share = max((rows - first) / (last - first), 0.0)  # fewer rows than ever observed are no cheaper
        return self._levels[end - 1] + share * (self._levels[end] - self._levels[end - 1])

    def _require_observations(self) -> None:
        if not self._rows:
            raise ValueError("no step was observed; tell `observe` of some first")

    def observe(self, rows: int, context: float, seconds: float, kv: float = 0.0, prompts: float = 0.0) -> None:
        """A step was measured. Raises ValueError if it has no rows, or took no time."""
        if rows < 1 or seconds <= 0.0:
            raise ValueError(f"a step has rows and takes time; this one has {rows} rows and took {seconds} s")
        if not self._rows:
            self._rows, self._levels = [1.0, _FAR], [seconds, seconds]
        shares, features = _shares(rows), np.array([context, kv, prompts], np.float64)
        error = self._believed(shares, features, seconds, self.seconds(rows, context, kv, prompts))
        beside = float(self._slopes @ features)
        as_if = [self.level(KNOTS[knot]) + beside + error for knot, _ in shares]
        keep = 1.0 - 1.0 / _MEMORY
        self._weights = [weight * keep if weight > _KEPT else weight for weight in self._weights]
        self._learn_slopes(shares, features, error)
        for (knot, share), value in zip(shares, as_if, strict=True):
            gain = self._gain(knot, share)
            if error < 0.0 and self._weights[knot] < _KEPT:
                gain = max(gain, share)  # the few observations before this one were slowed
            self._seconds[knot] += gain * (value - self._seconds[knot])
            self._features[knot] += gain * (features - self._features[knot])
            self._weights[knot] += share
        self._rows, self._levels = self._curve()

    def _gain(self, knot: int, share: float) -> float:
        return share / (self._weights[knot] + share)

    def _believed(self, shares: list[tuple[int, float]], features: Floats, seconds: float, foreseen: float) -> float:
        """The part of `seconds - foreseen` to learn from: all of it where little is known."""
        error = seconds - foreseen
        known = all(
            self._weights[knot] >= 2.0 and (np.abs(features - self._features[knot]) <= 2 * self._reach).all()
            for knot, _ in shares
        )
        if not known:
            return error
        relative = abs(error) / foreseen
        # Up if the error is larger, down if smaller: it settles where both are as frequent, however large errors are.
        self._error = max(self._error * (_ERROR_STEP if relative > self._error else 1 / _ERROR_STEP), _LEAST_ERROR)
        return min(error, _SURPRISE * self._error * foreseen)

    def _learn_slopes(self, shares: list[tuple[int, float]], features: Floats, error: float) -> None:
        """Least squares over deviations from the knots' means, so that levels do not answer for the slopes."""
        self._information *= 1.0 - 1.0 / _MEMORY
        agreement = np.zeros_like(features)
        for knot, share in shares:
            if self._weights[knot] > 0.0:
                deviation = features - self._features[knot]
                weighted = share * (1.0 - self._gain(knot, share)) * deviation
                self._information += np.outer(weighted, deviation)
                self._reach = np.maximum(self._reach, np.abs(deviation))
                agreement += weighted * error
        change = np.linalg.solve(self._information + np.diag(_RIDGE), agreement)
        self._slopes = np.maximum(self._slopes + change, 0.0)

    def _curve(self) -> tuple[list[float], list[float]]:
        """The observed knots' rows and levels, made monotone; beyond, as steep as at the end, or as on average."""
        knots = [knot for knot, weight in enumerate(self._weights) if weight > 0.0]
        rows = [float(KNOTS[knot]) for knot in knots]
        levels = _monotone(
            [max(self._seconds[knot] - float(self._slopes @ self._features[knot]), _LEAST_S) for knot in knots],
            [self._weights[knot] for knot in knots],
        )
        slope = 0.0
        if len(knots) > 1:
            at_end = (levels[-1] - levels[-2]) / (rows[-1] - rows[-2])
            slope = max(at_end, (levels[-1] - levels[0]) / (rows[-1] - rows[0]))
        return [*rows, _FAR], [*levels, levels[-1] + slope * (_FAR - rows[-1])]


def _shares(rows: int) -> list[tuple[int, float]]:
    """The knots around `rows`, and how much of an observation belongs to each."""
    knot = min(rows.bit_length(), len(KNOTS)) - 1
    beyond = rows / KNOTS[knot] - 1.0
    if beyond == 0.0 or knot == len(KNOTS) - 1:
        return [(knot, 1.0)]
    return [(knot, 1.0 - beyond), (knot + 1, beyond)]


def _monotone(values: list[float], weights: list[float]) -> list[float]:
    """The closest values that never fall, by weighted squares (pool adjacent violators)."""
    if values == sorted(values):
        return values
    pools: list[tuple[float, float, int]] = []  # mean, weight, how many values
    for value, weight in zip(values, weights, strict=True):
        mean, total, count = value, weight, 1
        while pools and pools[-1][0] > mean:
            before, more, values_before = pools.pop()
            mean = (mean * total + before * more) / (total + more)
            total, count = total + more, count + values_before
        pools.append((mean, total, count))
    return [mean for mean, _, count in pools for _ in range(count)]
