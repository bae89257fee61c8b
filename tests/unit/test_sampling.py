"""Keyed sampling: a pure function of logits, parameters, position and the tokens before."""

import math

import numpy as np
import pytest

from tidemill.types import SamplingParams
from workers.engine.noise import gumbel, mix
from workers.engine.sampling import SampleRow, choose, log_probabilities

LOGITS = np.random.default_rng(0).normal(size=(1, 50)).astype(np.float32) * 2


def pick(
    logits: np.ndarray, position: int = 5, tokens: tuple[int, ...] = (1, 2, 3, 4, 3), prompt: int = 3, **p: object
) -> int:
    row = SampleRow(SamplingParams(**p), position, prompt, tokens)  # type: ignore[arg-type]
    return choose(logits, [row])[0]


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def frequencies(count: int = 20_000, **p: object) -> np.ndarray:
    counts = np.zeros(LOGITS.shape[1])
    for position in range(count):
        counts[pick(LOGITS, position=position, seed=7, **p)] += 1
    return counts


def chi_square_fits(counts: np.ndarray, expected: np.ndarray) -> bool:
    """Within five standard deviations of the statistic's mean, over cells with enough expected."""
    total = counts.sum()
    cells = expected * total >= 5
    statistic = ((counts[cells] - expected[cells] * total) ** 2 / (expected[cells] * total)).sum()
    degrees = cells.sum() - 1
    return bool(statistic < degrees + 5 * math.sqrt(2 * degrees))


def test_draws_follow_the_softmax() -> None:
    counts = frequencies(temperature=1.0)
    expected = softmax(LOGITS[0].astype(float))
    assert chi_square_fits(counts, expected)
    assert not chi_square_fits(counts, softmax(LOGITS[0].astype(float) / 1.2)), "another temperature would be noticed"


@pytest.mark.parametrize("filters", [{"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.2}])
def test_filters_keep_the_likeliest_and_their_proportions(filters: dict[str, float]) -> None:
    probabilities = softmax(LOGITS[0].astype(float))
    order = np.argsort(-probabilities, kind="stable")
    if "top_k" in filters:
        kept = order[:5]
    elif "top_p" in filters:
        kept = order[: int(np.searchsorted(np.cumsum(probabilities[order]), 0.6)) + 1]
    else:
        kept = order[probabilities[order] >= 0.2 * probabilities.max()]
    expected = np.zeros_like(probabilities)
    expected[kept] = probabilities[kept] / probabilities[kept].sum()
    counts = frequencies(temperature=1.0, **filters)
    assert set(np.flatnonzero(counts)) <= set(kept.tolist())
    assert chi_square_fits(counts, expected)


def test_noise_depends_on_seed_position_and_token_alone() -> None:
    tokens = np.arange(50)
    assert (gumbel(1, 2, tokens) == gumbel(1, 2, tokens)).all()
    assert (gumbel(1, 2, tokens[10:20]) == gumbel(1, 2, tokens)[10:20]).all()
    assert (gumbel(1, 2, tokens) != gumbel(1, 3, tokens)).all()
    assert (gumbel(1, 2, tokens) != gumbel(2, 2, tokens)).all()
    assert gumbel(5, 5, np.arange(10**5)).mean() == pytest.approx(np.euler_gamma, abs=0.02)
    assert mix(0) == 0xE220A8397B1DCDAF  # SplitMix64's first output for seed 0


def test_greedy_is_the_first_maximum() -> None:
    logits = np.zeros((1, 9), np.float32)
    logits[0, [3, 6]] = 1.0
    assert pick(logits) == 3


def test_repetition_penalty_counts_prompt_and_output_others_the_output() -> None:
    logits = np.zeros((1, 9), np.float32)
    logits[0, [1, 3, 5]] = [3.0, 2.9, 2.0]
    assert pick(logits) == 1
    assert pick(logits, repetition_penalty=2.0) == 5  # 1 is in the prompt, 3 in the output
    assert pick(logits, presence_penalty=1.0) == 1
    assert pick(logits, tokens=(7, 7, 7, 1, 1), frequency_penalty=0.1) == 3  # twice in the output


def test_log_probabilities() -> None:
    found = log_probabilities(LOGITS[0], 7, 3)
    expected = np.log(softmax(LOGITS[0].astype(float)))
    assert found.logprob == pytest.approx(expected[7])
    assert [token for token, _ in found.top] == np.argsort(-expected)[:3].tolist()
