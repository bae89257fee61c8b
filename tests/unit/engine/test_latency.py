"""Latency models against figures worked out by hand."""

import random
from dataclasses import astuple, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tidemill.core.settings import LatencySettings
from workers.engine.latency import (
    OPT_13B,
    BadMeasurements,
    LinearLatency,
    StepWork,
    latency_model,
    read_steps,
    write_steps,
)

TRUTH = LinearLatency(0.004, 2e-4, 1e-8, 3e-4, 2e-7, 1e-4)
counts = st.integers(0, 5000)
works = st.builds(StepWork, counts, counts, counts, counts, counts)


def some_steps(rng: random.Random, count: int = 60) -> list[StepWork]:
    return [
        StepWork(
            tokens := rng.choice([0, 0, 64, 512]),
            tokens * rng.randrange(1, 2000),
            rows := rng.randrange(1, 40),
            rows * rng.randrange(100, 2000),
            rows * rng.randrange(4),
        )
        for _ in range(count)
    ]


class TestLinear:
    def test_by_hand(self) -> None:
        model = LinearLatency(0.01, 0.001, 1e-6, 0.002, 1e-5, 0.0005)
        assert model(StepWork(100, 10_000, 4, 2000, 12)) == pytest.approx(0.01 + 0.1 + 0.01 + 0.008 + 0.02 + 0.006)

    def test_constants_alone(self) -> None:
        assert LinearLatency(0.02)(StepWork(512, 512**2, 8, 9000, 0)) == 0.02

    def test_a_prompt_costs_the_same_attention_in_chunks(self) -> None:
        model = LinearLatency(prefill_token_s=1e-4, prefill_square_s=1e-8)
        whole = model(StepWork(1000, 1000**2))
        assert model(StepWork(600, 600**2)) + model(StepWork(400, 1000**2 - 600**2)) == pytest.approx(whole)


class TestFit:
    def test_finds_the_coefficients_that_made_the_steps(self) -> None:
        steps = [(work, TRUTH(work)) for work in some_steps(random.Random(1))]
        assert astuple(LinearLatency.fit(steps)) == pytest.approx(astuple(TRUTH), rel=1e-6)

    def test_noise_moves_them_little(self) -> None:
        rng = random.Random(2)
        steps = [(work, TRUTH(work) * rng.uniform(0.95, 1.05)) for work in some_steps(rng, 400)]
        model = LinearLatency.fit(steps)
        for work in some_steps(rng):
            assert model(work) == pytest.approx(TRUTH(work), rel=0.05)

    def test_what_never_occurred_costs_nothing(self) -> None:
        steps = [(StepWork(decode_rows=rows, context_tokens=rows**2), 0.01 + 0.001 * rows) for rows in range(1, 20)]
        model = LinearLatency.fit(steps)
        assert (model.step_s, model.decode_row_s) == pytest.approx((0.01, 0.001))
        assert model.prefill_token_s == model.drafted_row_s == 0.0

    @settings(deadline=None)
    @given(st.lists(st.tuples(works, st.floats(1e-4, 10.0)), min_size=6, max_size=30))
    def test_nothing_ever_costs_less_than_nothing(self, steps: list[tuple[StepWork, float]]) -> None:
        assert min(astuple(LinearLatency.fit(steps))) >= 0.0

    @pytest.mark.parametrize("seconds", [[1.0] * 5, [1.0] * 6 + [0.0]])
    def test_too_few_steps_or_none_at_all(self, seconds: list[float]) -> None:
        with pytest.raises(ValueError, match="6 measured steps or more"):
            LinearLatency.fit([(StepWork(decode_rows=1), each) for each in seconds])


class TestOpt13B:
    """Against the published coefficients, in milliseconds."""

    def test_prefill(self) -> None:
        expected = 16.45686 + 0.0926475 * 1155 + 6.474786e-6 * 1155**2
        assert OPT_13B(StepWork(1155, 1155**2)) * 1e3 == pytest.approx(expected, rel=1e-6)
        assert expected == pytest.approx(132.1, abs=0.05)

    def test_decode_of_few_and_of_many(self) -> None:
        few = 19.934703 + 0.00062693565 * 40_000 + 0.038506977 * 40
        many = 7.166189 + 0.00057980004 * 100_000 + 0.15831096 * 100
        assert OPT_13B(StepWork(decode_rows=40, context_tokens=40_000)) * 1e3 == pytest.approx(few, rel=1e-6)
        assert OPT_13B(StepWork(decode_rows=100, context_tokens=100_000)) * 1e3 == pytest.approx(many, rel=1e-6)

    def test_drafted_rows_make_the_batch_larger(self) -> None:
        plain = StepWork(decode_rows=20, context_tokens=20_000)
        drafted = StepWork(decode_rows=20, context_tokens=20_000, drafted_rows=60)
        assert (OPT_13B(drafted) - OPT_13B(plain)) * 1e3 == pytest.approx(60 * 0.038506977, rel=1e-6)

    def test_a_mixed_step_reads_the_weights_once(self) -> None:
        prompt, decodes = StepWork(512, 512**2), StepWork(decode_rows=30, context_tokens=30_000)
        both = StepWork(512, 512**2, 30, 30_000)
        assert OPT_13B(prompt) + OPT_13B(decodes) - OPT_13B(both) == pytest.approx(16.45686e-3, rel=1e-6)

    def test_a_prompt_adds_as_much_to_few_rows_as_to_many(self) -> None:
        def added(rows: int) -> float:
            plain = StepWork(decode_rows=rows, context_tokens=300 * rows)
            return OPT_13B(replace(plain, prefill_tokens=512, prefill_squares=512**2)) - OPT_13B(plain)

        assert added(95) == pytest.approx(added(94), rel=1e-6)


class TestSettings:
    def test_coefficients(self) -> None:
        model = latency_model(LatencySettings(step_s=0.01, prefill_token_s=1e-4, decode_row_s=1e-3, scale=2.0))
        assert model(StepWork(100, 10_000, 3, 1000)) == pytest.approx(2 * (0.01 + 0.01 + 0.003))

    def test_published(self) -> None:
        work = StepWork(decode_rows=1, context_tokens=500)
        assert latency_model(LatencySettings(model="opt-13b", scale=0.5))(work) == OPT_13B(work) / 2

    def test_fitted(self, tmp_path: Path) -> None:
        steps = [(work, TRUTH(work)) for work in some_steps(random.Random(3))]
        write_steps(tmp_path / "steps.csv", steps)
        assert [work for work, _ in read_steps(tmp_path / "steps.csv")] == [work for work, _ in steps]
        model = latency_model(LatencySettings(model="fitted", measured=tmp_path / "steps.csv"))
        for work, seconds in steps:
            assert model(work) == pytest.approx(seconds, rel=1e-4)

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("a,b\n1,2\n", "expected the columns prefill_tokens,prefill_squares"),
            ("{columns}\n1,1,1,1,1,soon\n", ":2: could not convert"),
            ("{columns}\n1,1,1\n", ":2: "),
            ("{columns}\n1,1,1,1,1,0.5\n", "6 measured steps or more"),
        ],
    )
    def test_bad_measurements_say_where(self, tmp_path: Path, text: str, said: str) -> None:
        columns = "prefill_tokens,prefill_squares,decode_rows,context_tokens,drafted_rows,seconds"
        path = tmp_path / "steps.csv"
        path.write_text(text.replace("{columns}", columns))
        with pytest.raises(BadMeasurements) as caught:
            latency_model(LatencySettings(model="fitted", measured=path))
        assert str(path) in str(caught.value)
        assert said in str(caught.value)

    def test_missing_measurements(self, tmp_path: Path) -> None:
        with pytest.raises(BadMeasurements, match="cannot be read"):
            latency_model(LatencySettings(model="fitted", measured=tmp_path / "none.csv"))
        for wrong in ({"model": "fitted"}, {"measured": tmp_path}):
            with pytest.raises(ValueError, match="need each other"):
                LatencySettings(**wrong)  # type: ignore[arg-type]
