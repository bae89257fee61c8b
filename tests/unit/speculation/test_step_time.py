"""The model of a step's duration finds its curve and keeps it on a noisy machine."""

import random
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.speculation.step_time import StepTimes

SIZES = (1, 2, 4, 8, 16, 32, 64, 128)
observations = st.lists(
    st.tuples(st.integers(1, 300), st.floats(0, 1e6), st.floats(1e-4, 10.0)), min_size=1, max_size=40
)


def truth(rows: int, context: float) -> float:
    """Flat up to 32 rows, then rising."""
    return 0.008 + max(rows - 32, 0) * 1e-4 + context * 2e-7


def seeded() -> StepTimes:
    times = StepTimes()
    for context in (0, 4096):
        for rows in SIZES:
            times.observe(rows, context * rows, truth(rows, context * rows))
    return times


def close(times: StepTimes, factor: float = 1.0, within: float = 0.05) -> bool:
    steps = [(rows, rows * 1000.0) for rows in (8, 16, 24, 32, 40, 64)]
    return all(
        times.seconds(rows, context) == pytest.approx(factor * truth(rows, context), within) for rows, context in steps
    )


class TestSeeding:
    def test_start_up_measurements_give_the_curve_at_once(self) -> None:
        times = seeded()
        for rows in (*SIZES, 3, 48, 100, 250):
            for context in (0.0, 10_000.0, 60_000.0):
                assert times.seconds(rows, context) == pytest.approx(truth(rows, context), 0.01)
        assert times.slope == pytest.approx(2e-7, 0.01)

    def test_rows_beyond_what_was_measured_cost_at_least_what_rows_cost_on_average(self) -> None:
        times = StepTimes()
        for rows, seconds in ((1, 1.0), (2, 2.0), (4, 2.0)):
            times.observe(rows, 0, seconds)
        assert times.seconds(7, 0) == pytest.approx(2.0 + 3 * (2.0 - 1.0) / 3)

    def test_rows_between_measured_knots_lie_on_a_line(self) -> None:
        times = StepTimes()
        times.observe(2, 0, 1.0)
        times.observe(32, 0, 4.0)
        assert times.seconds(12, 0) == pytest.approx(2.0)
        assert times.seconds(1, 0) == pytest.approx(1.0)

    def test_ready_when_two_sizes_are_known(self) -> None:
        times = StepTimes()
        assert not times.ready
        with pytest.raises(ValueError, match="no step was observed"):
            times.seconds(1, 0)
        times.observe(1, 0, 1.0)
        times.observe(1, 0, 1.0)
        assert not times.ready
        times.observe(8, 0, 1.0)
        assert times.ready

    @pytest.mark.parametrize(("rows", "seconds"), [(0, 1.0), (-1, 1.0), (1, 0.0)])
    def test_what_is_no_step_is_refused(self, rows: int, seconds: float) -> None:
        with pytest.raises(ValueError, match="has rows and takes time"):
            StepTimes().observe(rows, 0, seconds)


class TestBeside:
    """What a step has beside its rows is told apart from them."""

    def test_prompts_and_kv_that_is_read_once(self) -> None:
        times, rng = seeded(), random.Random(3)
        for _ in range(600):
            rows, kv, prompts = rng.randrange(8, 60), rng.randrange(2000, 20_000), rng.choice((0, 0, 100, 300))
            context = kv * rng.randrange(1, 5)
            times.observe(rows, context, truth(rows, context) + 1e-6 * kv + 5e-5 * prompts, kv, prompts)
        assert times.slope == pytest.approx(2e-7, 0.1)
        assert times.kv_slope == pytest.approx(1e-6, 0.1)
        assert times.prompt_slope == pytest.approx(5e-5, 0.1)
        expected = truth(40, 30_000) + 1e-6 * 10_000 + 5e-5 * 200
        assert times.seconds(40, 30_000, 10_000, 200) == pytest.approx(expected, 0.05)


class TestNoise:
    def live(self, times: StepTimes, steps: int, factor: float = 1.0, outliers: float = 0.0) -> None:
        rng = random.Random(7)
        for _ in range(steps):
            rows = rng.choice((8, 12, 20, 40, 56))
            context = float(rows * rng.randrange(500, 2000))
            slowed = 10.0 if rng.random() < outliers else rng.uniform(0.95, 1.05)
            times.observe(rows, context, factor * slowed * truth(rows, context))

    def test_one_step_that_took_ten_times_as_long_is_not_believed(self) -> None:
        times = seeded()
        self.live(times, 100)
        times.observe(16, 16_000, 10 * truth(16, 16_000))
        assert close(times, within=0.1)

    def test_one_in_ten_neither(self) -> None:
        times = seeded()
        self.live(times, 1000, outliers=0.1)
        assert close(times, within=0.1)

    def test_a_disturbed_first_measurement_is_corrected_by_the_next(self) -> None:
        times = StepTimes()
        for seconds in (10.0, 1.0, 1.1):
            times.observe(4, 0, seconds)
        assert times.seconds(4, 0) == pytest.approx(1.0, 0.1)

    @pytest.mark.parametrize("factor", [0.5, 2.0])
    def test_a_machine_that_is_slower_or_faster_for_good_is_followed(self, factor: float) -> None:
        times = seeded()
        self.live(times, 300)
        self.live(times, 1500, factor)
        assert close(times, factor, within=0.1)


class TestShape:
    @given(observations)
    def test_more_rows_never_cost_less(self, steps: list[tuple[int, float, float]]) -> None:
        times = StepTimes()
        for rows, context, seconds in steps:
            times.observe(rows, context, seconds)
        levels = times.levels(np.arange(1, 600))
        assert np.all(np.diff(levels) >= -1e-12 * levels[1:])
        assert np.all(levels > 0.0)
        assert times.slope >= 0.0

    @given(observations, st.integers(1, 700), st.integers(0, 50), st.floats(0, 1e5))
    def test_the_ways_to_ask_agree(
        self, steps: list[tuple[int, float, float]], rows: int, more: int, context: float
    ) -> None:
        times = StepTimes()
        for step in steps:
            times.observe(*step)
        alone, together = times.seconds(rows, 0), times.seconds(rows + more, context)
        assert times.levels(np.array([rows]))[0] == pytest.approx(alone)
        assert times.marginal(rows, more, context) == pytest.approx(together - alone, abs=1e-9 * together)

    def test_a_step_in_the_curve_is_kept(self) -> None:
        """A kernel's tile is full: more than 32 rows cost twice as much."""
        times = StepTimes()
        for rows in (*SIZES, *SIZES):
            times.observe(rows, 0, 1.0 if rows <= 32 else 2.0)
        seconds = [times.seconds(rows, 0) for rows in SIZES]
        assert [round(after / before, 2) for before, after in pairwise(seconds)] == [1, 1, 1, 1, 1, 2, 1]
