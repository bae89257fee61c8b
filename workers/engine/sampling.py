"""From logits to tokens: penalties, temperature, top-k, top-p, min-p, keyed noise, log-probabilities.

A row's token depends on its logits, its request's parameters, its position and the tokens before it; on nothing else.
Ties go to the lowest token id.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tidemill.types import SamplingParams, TokenLogprobs
from workers.engine.noise import HighNoise, gumbel, key_of
from workers.engine.penalties import TokenCounts, has_penalties

Floats = npt.NDArray[np.floating]
Ids = npt.NDArray[np.int64]
Ranking = tuple[list[int], list[float]]  # tokens, best first, and the chance of each
LOWEST_TEMPERATURE = 1e-5  # below it the likeliest token is taken: scores would overflow


class Sampler:
    """How one sequence chooses: its parameters, and what they need to know of its tokens so far."""

    __slots__ = ("counts", "filtered", "sampling", "seed", "temperature")

    def __init__(self, sampling: SamplingParams, prompt: Iterable[int], output: Iterable[int]) -> None:
        self.sampling = sampling
        self.seed = sampling.seed or 0
        self.temperature = sampling.temperature if sampling.temperature >= LOWEST_TEMPERATURE else 0.0
        self.filtered = sampling.top_k > 0 or sampling.top_p < 1.0 or sampling.min_p > 0.0
        self.counts = TokenCounts(prompt, output) if has_penalties(sampling) else None

    @property
    def greedy(self) -> bool:
        """True if the likeliest token is taken as it is."""
        return self.temperature == 0.0 and self.counts is None

    @property
    def plain(self) -> bool:
        """True if nothing but temperature and noise comes between logits and token."""
        return self.counts is None and not self.filtered

    def add(self, token: int) -> None:
        """A token was decoded."""
        if self.counts is not None:
            self.counts.add(token)


@dataclass(slots=True)
class SampleRow:
    """One row of logits whose token is not simply the likeliest."""

    index: int  # of the row
    sampler: Sampler
    position: int  # of the token to be chosen
    drafted: tuple[int, ...] = ()  # tokens before it that the sampler has not been told of


class Chooser:
    """Chooses tokens for an engine's rows. Owns the memory it works in."""

    def __init__(self, vocabulary: int) -> None:
        self._high = HighNoise(vocabulary)

    def choose(self, best: list[int], logits: Floats, rows: Sequence[SampleRow]) -> None:
        """Overwrite `best`, the likeliest token of each row of `logits` [rows, vocabulary], where `rows` say so."""
        plain = [row for row in rows if row.sampler.plain]
        if plain:
            indices = [row.index for row in plain]
            first, end = indices[0], indices[-1] + 1
            values = logits[first:end] if end - first == len(plain) else logits[indices]
            for index, token in zip(indices, self._draw(values, [best[i] for i in indices], plain), strict=True):
                best[index] = token
        for row in rows:
            if not row.sampler.plain:
                best[row.index] = self._choose_one(logits[row.index], row)

    def _choose_one(self, logits: Floats, row: SampleRow) -> int:
        sampler = row.sampler
        scores = logits.astype(np.float64)
        if sampler.counts is not None:
            sampler.counts.penalise(scores, sampler.sampling, row.drafted)
        best = int(scores.argmax())
        if sampler.temperature == 0.0 or not np.isfinite(scores[best]):  # the model is broken, the worker need not be
            return best
        if not sampler.filtered:
            return self._draw(scores[None], [best], [row])[0]
        scores /= sampler.temperature
        kept = survivors(scores, sampler.sampling)
        noise = gumbel(key_of(sampler.seed, row.position), kept)
        return int(kept[(scores[kept] + noise).argmax()])

    def _draw(self, values: Floats, best: list[int], rows: Sequence[SampleRow]) -> list[int]:
        """argmax of values / temperature + noise for each row of `values` [rows, vocabulary]; `best` have the largest.

        Exact, though noise is computed for few tokens: see `_contenders`.
        """
        likeliest = np.array(best)[:, None]
        contenders = self._contenders(values, likeliest, rows)
        return [int(tokens[scores.argmax()]) for tokens, scores in contenders]

    def _contenders(self, values: Floats, likeliest: Ids, rows: Sequence[SampleRow]) -> list[tuple[Ids, Floats]]:
        """Of each row of `values` [rows, vocabulary] the tokens, ascending, that may be among the k that score highest,
        and their scores: value / temperature + noise. `likeliest` [rows, k] have the largest values.

        The k best score at least as high as the worst of the likeliest. So a token that is one of them either has much
        noise, which its random bits tell, or its value is not far below.
        """
        keys = [key_of(row.sampler.seed, row.position) for row in rows]
        temperatures = np.array([row.sampler.temperature for row in rows])
        key_of_row, numbers = np.array(keys, np.uint64), np.arange(len(rows))
        at = numbers[:, None]
        noise = gumbel(key_of_row[:, None], likeliest)
        to_beat = (values[at, likeliest] / temperatures[:, None] + noise).min(1)
        low = (to_beat - self._high.least) * temperatures
        low -= 1e-5 * (np.abs(low) + temperatures)  # far more than what rounding to the values' type can do
        may_win = values >= low.astype(values.dtype)[:, None]
        for row, key in enumerate(keys):
            may_win[row, self._high.tokens(key)] = True
        may_win[at, likeliest] = True
        row_of, tokens = np.nonzero(may_win)
        scores = values[row_of, tokens] / temperatures[row_of] + gumbel(key_of_row[row_of], tokens)
        bounds = np.searchsorted(row_of, np.arange(len(rows) + 1)).tolist()
        return [(tokens[bounds[i] : bounds[i + 1]], scores[bounds[i] : bounds[i + 1]]) for i in numbers]

    def rank(self, logits: Floats, rows: Sequence[SampleRow], count: int) -> list[Ranking]:
        """The `count` tokens each row of `logits` [rows, vocabulary] would choose first, best first, and a chance each.

        The chance is the model's own probability where the likeliest token is taken. With noise it says how far apart
        the scores are: it is their softmax over the tokens that come near the best.
        """
        count = min(count, logits.shape[1])
        ranked: list[Ranking | None] = [None] * len(rows)
        greedy = [row for row in rows if row.sampler.greedy]
        sampled = [row for row in rows if row.sampler.plain and row.sampler.temperature > 0.0]
        if greedy:
            values = logits[[row.index for row in greedy]]
            chances = _softmax_at(values, best := likeliest_tokens(values, count))
            for row, tokens, chance in zip(greedy, best.tolist(), chances.tolist(), strict=True):
                ranked[row.index] = tokens, chance
        if sampled:
            values = logits[[row.index for row in sampled]]
            contenders = self._contenders(values, likeliest_tokens(values, count), sampled)
            for row, (few, scores) in zip(sampled, contenders, strict=True):
                ranked[row.index] = _best(few, scores, count)
        return [each or self._rank_one(logits[index], rows[index], count) for index, each in enumerate(ranked)]

    def _rank_one(self, logits: Floats, row: SampleRow, count: int) -> Ranking:
        sampler = row.sampler
        scores = logits.astype(np.float64)
        if sampler.counts is not None:
            sampler.counts.penalise(scores, sampler.sampling, row.drafted)
        if sampler.temperature == 0.0:
            return _best(np.arange(scores.size), scores, count)
        scores /= sampler.temperature
        kept = survivors(scores, sampler.sampling)
        return _best(kept, scores[kept] + gumbel(key_of(sampler.seed, row.position), kept), count)


def _best(tokens: Ids, scores: Floats, count: int) -> Ranking:
    """The tokens with the highest scores, the first of equals first, and the softmax of all scores at them."""
    if tokens.size > 256:
        among = np.flatnonzero(scores >= np.partition(scores, -count)[-count])
    else:
        among = np.arange(tokens.size)
    order = among[np.argsort(-scores[among], kind="stable")][:count]
    weights = np.exp(scores - scores[order[0]])
    return tokens[order].tolist(), (weights[order] / weights.sum()).tolist()


def survivors(scores: npt.NDArray[np.float64], sampling: SamplingParams) -> Ids:
    """Token ids that survive top-k, then top-p of what is left, then min-p; ascending. `scores`: logits / temperature.

    As in vLLM: top-p keeps the token that reaches it, min-p is relative to the likeliest. Ties go to the lowest ids.
    """
    size = scores.size
    ids = _largest(scores, sampling.top_k) if 0 < sampling.top_k < size else np.arange(size)
    if sampling.top_p >= 1.0 and sampling.min_p <= 0.0:
        return ids
    weights = np.exp(scores[ids] - scores[ids].max())
    if sampling.top_p < 1.0:
        kept = _nucleus(weights, sampling.top_p)
        ids, weights = ids[kept], weights[kept]
    return ids[weights >= sampling.min_p] if sampling.min_p > 0.0 else ids


def likeliest_tokens(logits: Floats, count: int) -> Ids:
    """Of each row of `logits` [rows, vocabulary] the `count` tokens with the largest: [rows, count], best first.

    Few are asked for, so looking for the largest so many times is faster than any partition.
    """
    left, rows = logits.copy(), np.arange(len(logits))
    found = np.empty((len(logits), count), np.int64)
    for place in range(count):
        found[:, place] = left.argmax(1)
        left[rows, found[:, place]] = -np.inf
    return found


def _softmax_at(logits: Floats, tokens: Ids) -> Floats:
    """The model's probabilities of some `tokens` [rows, n], the first of which is each row's likeliest."""
    values = np.take_along_axis(logits, tokens, 1)
    return np.exp(values - values[:, :1]) / np.exp(logits - values[:, :1]).sum(1, keepdims=True)


def _largest(values: Floats, count: int) -> Ids:
    """Indices of the `count` largest, ascending; of equal ones the first."""
    least = np.partition(values, values.size - count)[values.size - count]
    return _down_to(values, least, count)


def _nucleus(weights: npt.NDArray[np.float64], share: float) -> Ids:
    """Indices of the fewest weights that make up this share of the whole, ascending."""
    total = weights.sum()
    # What is left out here is less than half of what the nucleus leaves out, so the nucleus is among the rest.
    candidates = weights[weights >= (1.0 - share) * total / (2 * weights.size)]
    ordered = np.sort(candidates)[::-1]
    count = min(int(np.searchsorted(np.cumsum(ordered), share * total)) + 1, ordered.size)
    return _down_to(weights, ordered[count - 1], count)


def _down_to(values: Floats, least: np.floating, count: int) -> Ids:
    """Indices of all values above `least`, and of the first that equal it, `count` in all; ascending."""
    above = np.flatnonzero(values > least)
    equal = np.flatnonzero(values == least)[: count - above.size]
    return np.sort(np.concatenate([above, equal]))


def log_probabilities(logits: Floats, token: int, top: int) -> TokenLogprobs:
    """Natural log-probabilities of the model's own distribution: the token's, and those of the `top` likeliest."""
    wide = logits.astype(np.float64)
    wide -= wide.max()
    wide -= np.log(np.exp(wide).sum())
    if top == 0:
        return TokenLogprobs(token, float(wide[token]))
    ids = _largest(wide, min(top, wide.size))
    order = ids[np.argsort(-wide[ids], kind="stable")]
    return TokenLogprobs(token, float(wide[token]), tuple(zip(order.tolist(), wide[order].tolist(), strict=True)))
