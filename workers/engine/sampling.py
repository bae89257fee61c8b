"""From logits to tokens: penalties, temperature, top-k, top-p, min-p, keyed noise, log-probabilities.

A row's token depends on its logits, its request's parameters, its position and the tokens before it; on nothing else.
Ties go to the lowest token id.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tidemill.types import SamplingParams, TokenLogprobs
from workers.engine.noise import gumbel

Floats = npt.NDArray[np.floating]


@dataclass(frozen=True, slots=True)
class SampleRow:
    """What is needed beside the logits of one row. `position` is that of the token to be chosen."""

    sampling: SamplingParams
    position: int
    prompt_length: int
    tokens: Sequence[int]  # all tokens before it, `position` of them (drafts included)


def choose(logits: Floats, rows: Sequence[SampleRow]) -> list[int]:
    """One token for each row of logits [rows, vocabulary]."""
    tokens: list[int] = logits.argmax(-1).tolist()
    for index, row in enumerate(rows):
        if not _plain_greedy(row.sampling):
            tokens[index] = _choose_one(logits[index], row)
    return tokens


def log_probabilities(logits: Floats, token: int, top: int) -> TokenLogprobs:
    """Natural log-probabilities of the model's own distribution: the token's, and those of the `top` likeliest."""
    wide = logits.astype(np.float64)
    wide -= wide.max()
    wide -= np.log(np.exp(wide).sum())
    order = np.argsort(-wide, kind="stable")[:top]
    return TokenLogprobs(token, float(wide[token]), tuple((int(i), float(wide[i])) for i in order))


def _plain_greedy(sampling: SamplingParams) -> bool:
    return sampling.temperature == 0 and not _has_penalties(sampling)


def _has_penalties(sampling: SamplingParams) -> bool:
    return sampling.repetition_penalty != 1.0 or sampling.presence_penalty != 0.0 or sampling.frequency_penalty != 0.0


def _choose_one(logits: Floats, row: SampleRow) -> int:
    sampling = row.sampling
    scores = logits.astype(np.float64)
    if _has_penalties(sampling):
        _penalise(scores, row)
    if sampling.temperature == 0:
        return int(scores.argmax())
    scores /= sampling.temperature
    kept = _filtered(scores, sampling)
    noise = gumbel(sampling.seed or 0, row.position, kept)
    return int(kept[(scores[kept] + noise).argmax()])


def _penalise(scores: Floats, row: SampleRow) -> None:
    """In place, in the usual order: repetition over prompt and output, then frequency and presence over the output."""
    sampling = row.sampling
    seen = np.unique(np.asarray(row.tokens, dtype=np.int64))
    values = scores[seen]
    scores[seen] = np.where(values > 0, values / sampling.repetition_penalty, values * sampling.repetition_penalty)
    output = np.asarray(row.tokens[row.prompt_length :], dtype=np.int64)
    used, counts = np.unique(output, return_counts=True)
    scores[used] -= sampling.frequency_penalty * counts + sampling.presence_penalty


def _filtered(scores: Floats, sampling: SamplingParams) -> npt.NDArray[np.int64]:
    """Token ids that survive top-k, then top-p of what is left, then min-p; ascending."""
    size = scores.size
    if not 0 < sampling.top_k < size and sampling.top_p >= 1.0 and sampling.min_p <= 0.0:
        return np.arange(size)
    order = np.argsort(-scores, kind="stable")
    if 0 < sampling.top_k < size:
        order = order[: sampling.top_k]
    weights = np.exp(scores[order] - scores[order[0]])
    if sampling.top_p < 1.0:
        cumulative = np.cumsum(weights / weights.sum())
        order = order[: int(np.searchsorted(cumulative, sampling.top_p)) + 1]  # the one that reaches top_p included
        weights = weights[: order.size]
    if sampling.min_p > 0.0:
        order = order[weights >= sampling.min_p]
    return np.sort(order)
