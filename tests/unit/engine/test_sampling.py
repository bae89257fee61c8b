"""Keyed sampling: a pure function of logits, parameters, position and the tokens before."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import gold
from tidemill.types import SamplingParams
from workers.engine.noise import HighNoise, bits_of, gumbel, gumbel_of_bits, key_of, mix, mix_all
from workers.engine.penalties import TokenCounts
from workers.engine.sampling import Chooser, Sampler, SampleRow, log_probabilities

Logits = npt.NDArray[np.float32]
Row = tuple[SamplingParams, list[int], list[int], int]  # parameters, prompt, output, and how much of it was drafted

SIZE = 50
LOGITS = np.random.default_rng(0).normal(size=(1, SIZE)).astype(np.float32) * 2
PARAMETERS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 1e-9, 0.3, 0.8, 1.0, 3.0, 100.0]),
    top_k=st.sampled_from([0, 1, 5, SIZE, 1000]),
    top_p=st.sampled_from([0.0, 0.1, 0.9, 0.999999, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.5]),
    presence_penalty=st.sampled_from([0.0, 0.5, -1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.3, -0.2]),
    seed=st.integers(0, 2**63 - 1),
)
NOISE_OF_42_AT_17 = [-1.8682979277467042, 2.1736023025434883, -0.7621939497361786]  # tokens 0, 1, 4095
TOKENS = st.lists(st.integers(0, SIZE - 1), max_size=12)
ROWS = st.tuples(PARAMETERS, TOKENS, TOKENS, st.integers(0, 4))


def pick(logits: Logits, position: int = 5, prompt: Sequence[int] = (), output: Sequence[int] = (), **p: object) -> int:
    sampler = Sampler(SamplingParams(**p), prompt, output)  # type: ignore[arg-type]
    best = logits.argmax(-1).tolist()
    Chooser(logits.shape[1]).choose(best, logits, [] if sampler.greedy else [SampleRow(0, sampler, position)])
    return int(best[0])


def softmax(scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


class TestAgainstTheObvious:
    """The fast code gives what plain Python gives, row by row, whatever shares the step."""

    @settings(max_examples=150, deadline=None)
    @given(st.lists(ROWS, min_size=1, max_size=6), st.integers(0, 99))
    def test_same_token(self, rows: list[Row], seed: int) -> None:
        random = np.random.default_rng(seed)
        logits = (random.normal(size=(len(rows), SIZE)) * random.choice([0.01, 1, 5, 40])).astype(np.float32)
        best = logits.argmax(-1).tolist()
        to_choose, expected = [], []
        for index, (sampling, prompt, output, drafted) in enumerate(rows):
            told = len(output) - min(drafted, len(output))
            sampler = Sampler(sampling, prompt, output[:told])
            if not sampler.greedy:
                position = len(prompt) + len(output)
                to_choose.append(SampleRow(index, sampler, position, tuple(output[told:])))
            expected.append(gold.choose(logits[index], sampling, prompt, output))
        Chooser(SIZE).choose(best, logits, to_choose)
        assert best == expected

    @pytest.mark.parametrize("scale", [0.0, 0.5, 3.0, 30.0])
    def test_noise_left_out_would_not_have_won(self, scale: float) -> None:
        """A vocabulary large enough that most tokens are passed over; flat logits leave it all to the noise."""
        size = 5000
        random = np.random.default_rng(1)
        logits = (random.normal(size=(40, size)) * scale).astype(np.float32)
        rows = [
            SampleRow(i, Sampler(SamplingParams(temperature=0.7, seed=i), (), ()), 9 * i) for i in range(len(logits))
        ]
        best = logits.argmax(-1).tolist()
        Chooser(size).choose(best, logits, rows)
        for index, row in enumerate(rows):
            noise = gumbel(key_of(row.sampler.seed, row.position), np.arange(size))
            assert best[index] == int((logits[index].astype(np.float64) / 0.7 + noise).argmax())

    def test_ties_go_to_the_lowest_token(self) -> None:
        logits = np.zeros((1, 9), np.float32)
        logits[0, [3, 6]] = 1.0
        assert pick(logits) == 3
        assert pick(logits, temperature=1.0, top_k=1, seed=4) == 3
        assert pick(logits, temperature=1.0, top_p=0.0, seed=4) == 3
        assert pick(np.zeros((1, 9), np.float32), temperature=1e-9, top_k=3, seed=4) == 0

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_broken_logits_give_some_token(self, value: float) -> None:
        """A broken model costs the sequences it breaks, not the worker."""
        logits = np.full((1, SIZE), value, np.float32)
        with np.errstate(invalid="ignore"):
            for parameters in ({}, {"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.1}, {"presence_penalty": 1.0}):
                assert 0 <= pick(logits, temperature=1.0, seed=1, **parameters) < SIZE

    def test_forbidden_tokens_are_never_chosen(self) -> None:
        logits = np.full((1, SIZE), -np.inf, np.float32)
        logits[0, 7] = -3.0
        assert {pick(logits, position, temperature=5.0, seed=3) for position in range(50)} == {7}


class TestDistribution:
    def frequencies(self, count: int = 8_000, **p: object) -> npt.NDArray[np.float64]:
        sampler = Sampler(SamplingParams(seed=7, **p), (), ())  # type: ignore[arg-type]
        logits = np.repeat(LOGITS, 500, 0)
        chooser, counts = Chooser(SIZE), np.zeros(SIZE)
        for first in range(0, count, len(logits)):
            best = logits.argmax(-1).tolist()
            chooser.choose(best, logits, [SampleRow(i, sampler, first + i) for i in range(len(logits))])
            counts += np.bincount(best, minlength=SIZE)
        return counts

    def fits(self, counts: npt.NDArray[np.float64], expected: npt.NDArray[np.float64]) -> bool:
        """Chi-square within five standard deviations of its mean, over cells with enough expected."""
        cells = expected * counts.sum() >= 5
        wanted = expected[cells] * counts.sum()
        degrees = cells.sum() - 1
        return bool(((counts[cells] - wanted) ** 2 / wanted).sum() < degrees + 5 * math.sqrt(2 * degrees))

    def test_draws_follow_the_softmax(self) -> None:
        counts = self.frequencies(temperature=1.0)
        assert self.fits(counts, softmax(LOGITS[0].astype(float)))
        assert not self.fits(counts, softmax(LOGITS[0].astype(float) / 1.2)), "another temperature would be noticed"

    @pytest.mark.parametrize("filters", [{"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.2}])
    def test_filters_keep_the_likeliest_and_their_proportions(self, filters: dict[str, float]) -> None:
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
        counts = self.frequencies(4_000, temperature=1.0, **filters)
        assert set(np.flatnonzero(counts)) <= set(kept.tolist())
        assert self.fits(counts, expected)


class TestNoise:
    def test_depends_on_seed_position_and_token_alone(self) -> None:
        tokens = np.arange(50)
        assert (gumbel(key_of(1, 2), tokens[10:20]) == gumbel(key_of(1, 2), tokens)[10:20]).all()
        assert (gumbel(key_of(1, 2), tokens) != gumbel(key_of(1, 3), tokens)).all()
        assert (gumbel(key_of(1, 2), tokens) != gumbel(key_of(2, 2), tokens)).all()
        assert gumbel(key_of(5, 5), np.arange(10**5)).mean() == pytest.approx(np.euler_gamma, abs=0.02)

    def test_is_what_it_has_always_been(self) -> None:
        """A change would break requests that go on elsewhere while a cluster is being upgraded."""
        assert mix(0) == 0xE220A8397B1DCDAF  # SplitMix64's first output for seed 0
        assert gumbel(key_of(42, 17), np.array([0, 1, 4095])).tolist() == pytest.approx(NOISE_OF_42_AT_17, abs=1e-12)

    @given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=5))
    def test_arrays_mix_as_numbers_do(self, numbers: list[int]) -> None:
        assert mix_all(np.array(numbers, np.uint64)).tolist() == [mix(number) for number in numbers]

    def test_all_tokens_with_much_noise_are_known(self) -> None:
        high = HighNoise(SIZE, kept=2)
        for position in (0, 1, 0, 2, 0, 1):  # some are remembered, others forgotten
            noise = gumbel(key_of(3, position), np.arange(SIZE))
            found = high.tokens(key_of(3, position))
            assert set(np.flatnonzero(noise >= high.least)) <= set(found.tolist())
            assert (noise[found] > high.least - 1e-3).all()
            assert len(high._known) <= 2

    def test_noise_of_many_positions_at_once(self) -> None:
        keys = np.array([key_of(3, position) for position in range(4)], np.uint64)
        tokens = np.array([5, 0, 7, 7])
        each = [gumbel(int(key), np.array([token]))[0] for key, token in zip(keys, tokens, strict=True)]
        assert gumbel(keys, tokens).tolist() == each

    @given(st.floats(-2.5, 20.0))
    def test_larger_bits_are_more_noise(self, noise: float) -> None:
        assert noise - 0.01 <= gumbel_of_bits(np.array([bits_of(noise)]))[0] <= noise + 1e-9

    def test_extremes_are_finite(self) -> None:
        assert np.isfinite(gumbel_of_bits(np.array([0, 2**64 - 1], np.uint64))).all()


class TestPenalties:
    def test_repetition_counts_prompt_and_output_others_the_output(self) -> None:
        logits = np.zeros((1, 9), np.float32)
        logits[0, [1, 3, 5]] = [3.0, 2.9, 2.0]
        tokens = {"prompt": (1, 2, 3), "output": (4, 3)}
        assert pick(logits, **tokens) == 1
        assert pick(logits, **tokens, repetition_penalty=2.0) == 5  # 1 is in the prompt, 3 in the output
        assert pick(logits, **tokens, presence_penalty=1.0) == 1
        assert pick(logits, prompt=(7, 7, 7), output=(1, 1), frequency_penalty=0.1) == 3  # twice in the output

    @given(TOKENS, TOKENS, TOKENS)
    def test_drafted_tokens_leave_no_trace(self, prompt: list[int], output: list[int], drafted: list[int]) -> None:
        sampling = SamplingParams(repetition_penalty=1.5, presence_penalty=0.3, frequency_penalty=0.1)
        counts = TokenCounts(prompt, output)
        before, with_drafts, after, all_told = (LOGITS[0].astype(np.float64) for _ in range(4))
        counts.penalise(before, sampling)
        counts.penalise(with_drafts, sampling, drafted)
        counts.penalise(after, sampling)
        TokenCounts(prompt, output + drafted).penalise(all_told, sampling)
        assert (before == after).all()
        assert (with_drafts == all_told).all()

    def test_grow_with_the_sequence(self) -> None:
        counts = TokenCounts((), ())
        for token in range(1000):
            counts.add(token)
        scores = np.zeros(1001)
        counts.penalise(scores, SamplingParams(presence_penalty=1.0))
        assert scores.tolist() == [-1.0] * 1000 + [0.0]


class TestLogProbabilities:
    def test_are_of_the_raw_distribution(self) -> None:
        found = log_probabilities(LOGITS[0], 7, 3)
        expected = np.log(softmax(LOGITS[0].astype(float)))
        assert found.logprob == pytest.approx(expected[7])
        assert [token for token, _ in found.top] == np.argsort(-expected)[:3].tolist()
        assert log_probabilities(LOGITS[0], 7, 0).top == ()
        assert len(log_probabilities(LOGITS[0], 7, 20).top) == 20

    def test_ties_go_to_the_lowest_tokens(self) -> None:
        assert [token for token, _ in log_probabilities(np.zeros(9, np.float32), 4, 3).top] == [0, 1, 2]

    def test_more_than_there_are(self) -> None:
        assert len(log_probabilities(np.zeros(9, np.float32), 4, 20).top) == 9
