"""Raw chances become measured ones: by source, fading, with priors where little was seen."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidemill.core.tree import ROOT, TokenTree
from workers.speculation.calibration import Alpha, Calibration, Rates

chances = st.floats(0, 1)


def observed(rate: float, raw: float, count: int, seed: int = 3) -> Calibration:
    calibration, rng = Calibration(), random.Random(seed)
    for _ in range(count):
        calibration.observe("a", raw, rng.random() < rate)
    return calibration


def chance(calibration: Calibration, source: str, raw: float) -> float:
    return float(calibration.calibrated(source, np.array([raw]))[0])


class TestCalibration:
    @given(st.floats(0.02, 0.98))
    def test_a_source_nobody_has_observed_is_believed(self, raw: float) -> None:
        assert chance(Calibration(), "new", raw) == pytest.approx(raw, abs=0.01)

    @pytest.mark.parametrize(("raw", "rate"), [(0.99, 0.7), (0.6, 0.9), (0.3, 0.05), (0.08, 0.2)])
    def test_overconfident_and_timid_sources_are_set_right(self, raw: float, rate: float) -> None:
        assert chance(observed(rate, raw, 3000), "a", raw) == pytest.approx(rate, abs=0.05)

    def test_sources_are_told_apart(self) -> None:
        calibration = observed(0.1, 0.75, 500)
        assert chance(calibration, "a", 0.75) < 0.2
        assert chance(calibration, "b", 0.75) == pytest.approx(0.75, abs=0.02)

    def test_one_observation_does_not_overturn_the_prior(self) -> None:
        assert 0.6 < chance(observed(0.0, 0.72, 1), "a", 0.72) < 0.72

    def test_what_is_old_fades(self) -> None:
        calibration, rng = observed(0.9, 0.72, 3000), random.Random(5)
        for _ in range(4000):
            calibration.observe("a", 0.72, rng.random() < 0.3)
        assert chance(calibration, "a", 0.72) == pytest.approx(0.3, abs=0.06)

    def test_a_calibrated_model_stays_as_it_is(self) -> None:
        calibration, rng = Calibration(), random.Random(11)
        for _ in range(20_000):
            raw = rng.random()
            calibration.observe("a", raw, rng.random() < raw)
        for raw in (0.05, 0.15, 0.4, 0.6, 0.85, 0.95):
            assert chance(calibration, "a", raw) == pytest.approx(raw, abs=0.06)

    @given(st.lists(st.tuples(chances, st.booleans()), max_size=60), st.lists(chances, max_size=20))
    def test_chances_stay_chances(self, seen: list[tuple[float, bool]], raw: list[float]) -> None:
        calibration = Calibration()
        for each, taken in seen:
            calibration.observe("a", each, taken)
        calibrated = calibration.calibrated("a", np.array(raw))
        assert list(calibrated) == [chance(calibration, "a", each) for each in raw]
        assert all(0.0 <= each <= 1.0 for each in calibrated)


class TestVerdicts:
    # Root's children 0 and 1; 2 and 3 follow 1; 4 follows 0; 5 follows 3.
    TREE = TokenTree((7, 8, 9, 10, 11, 12), (ROOT, ROOT, 1, 1, 0, 3), (0.6, 0.4, 0.7, 0.2, 0.9, 0.5))

    def test_only_nodes_whose_parent_was_taken_count(self) -> None:
        told, expected = Calibration(), Calibration()
        told.observe_verdict("a", self.TREE, (1, 3))
        for raw, taken in [(0.6, False), (0.4, True), (0.7, False), (0.2, True), (0.5, False)]:
            expected.observe("a", raw, taken)
        every = np.arange(21) / 20
        assert list(told.calibrated("a", every)) == list(expected.calibrated("a", every))

    def test_nodes_without_chances_share_what_was_measured(self) -> None:
        calibration = Calibration()
        for turn in range(1000):
            calibration.observe_verdict("lookup", TokenTree.chain((1, 2)), (0, 1) if turn % 4 else ())
        assert chance(calibration, "lookup", 1.0) == pytest.approx(6 / 7, abs=0.03)


class TestAlpha:
    def test_hits_and_the_miss_that_ends_them(self) -> None:
        alpha, chain = Alpha(0.5), TokenTree.chain((1, 2, 3, 4))
        for _ in range(200):
            alpha.observe(chain, (0, 1, 2))
        assert alpha.value == pytest.approx(3 / 4, abs=0.05)

    def test_a_leaf_ends_nothing(self) -> None:
        alpha = Alpha(0.5)
        for _ in range(200):
            alpha.observe(TokenTree.chain((1, 2)), (0, 1))
        assert alpha.value > 0.9
        before = alpha.value
        alpha.observe(TokenTree(), ())
        assert alpha.value == before

    def test_it_begins_at_its_prior_and_moves(self) -> None:
        alpha = Alpha(0.8)
        assert alpha.value == 0.8
        for _ in range(300):
            alpha.observe(TokenTree.chain((1,)), ())
        assert alpha.value < 0.15


@given(st.lists(st.booleans(), max_size=100), st.floats(0, 1))
def test_rates_lie_between_prior_and_what_was_seen(seen: list[bool], prior: float) -> None:
    rates = Rates((prior, 0.5), memory=20)
    for taken in seen:
        rates.observe(0, taken)
    first, other = rates.value(0), rates.value(1)
    assert 0.0 <= first <= 1.0
    assert other == 0.5
    assert not seen or min(prior, *seen) - 1e-9 <= first <= max(prior, *seen) + 1e-9
