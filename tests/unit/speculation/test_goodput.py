"""Drafts are as large as goodput says, within what the load allows, and do not flap."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidemill.core.model import Decision
from tidemill.core.tree import Shape
from workers.speculation.goodput import (
    DRAFTING,
    NO_DRAFTS,
    Conditions,
    Damping,
    DraftReason,
    LoadControl,
    draft_shape,
    speedups,
    verify_budget,
)
from workers.speculation.step_time import StepTimes

CONTROL, DAMPING = LoadControl(), Damping()


def step_times(row_s: float, free_rows: int = 0) -> StepTimes:
    """10 ms, and `row_s` for each row beyond the free ones."""
    times = StepTimes()
    for rows in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512):
        for context in (0, 10_000):
            times.observe(rows, context, 0.010 + row_s * max(rows - free_rows, 0) + 1e-8 * context)
    return times


def conditions(
    requests: int, alpha: float = 0.8, draft_step_s: float = 0.0005, round_trip_s: float = 0.0, ahead: bool = False
) -> Conditions:
    return Conditions((alpha,) * requests, 500.0 * requests, draft_step_s, round_trip_s, ahead)


def decide(
    given: Conditions,
    times: StepTimes,
    previous: Decision[Shape] | None = None,
    step: int = 1,
    control: LoadControl = CONTROL,
) -> Decision[Shape]:
    return draft_shape(given, times, control, DAMPING, previous, step)


class TestGoodput:
    def test_the_same_acceptance_pays_for_one_request_and_not_for_many(self) -> None:
        times = step_times(row_s=0.001, free_rows=8)
        assert decide(conditions(1), times).choice.depth >= 4
        assert decide(conditions(64), times) == Decision(NO_DRAFTS, DraftReason.NO_GAIN)

    def test_the_speedup_of_synchronous_drafting_is_the_known_one(self) -> None:
        """E / (gamma c + 1 + rho) for alpha .8, gamma 8, c .05, rho 2; ahead: E / max(gamma c + rho, 1)."""
        times = step_times(row_s=0.0)
        flat = Conditions((0.8,), 0.0, 0.0005, 0.02, ahead=False)
        tokens = (1 - 0.8**9) / (1 - 0.8)
        assert speedups(flat, times, 8)[8] == pytest.approx(tokens / 3.4, 0.01)
        assert speedups(replace(flat, ahead=True), times, 8)[8] == pytest.approx(tokens / 2.4, 0.01)
        assert speedups(replace(flat, ahead=True, round_trip_s=0.001), times, 8)[8] == pytest.approx(tokens, 0.01)

    def test_better_drafts_are_longer(self) -> None:
        times = step_times(row_s=0.001)
        depths = [decide(conditions(4, alpha), times).choice.depth for alpha in (0.05, 0.5, 0.8, 0.95)]
        assert depths == sorted(depths)
        assert depths[0] == 0
        assert depths[-1] > depths[1]

    def test_hidden_drafts_are_longer(self) -> None:
        times = step_times(row_s=0.0)
        synchronous = decide(conditions(2, 0.7, draft_step_s=0.003), times).choice.depth
        ahead = decide(conditions(2, 0.7, draft_step_s=0.003, ahead=True), times).choice.depth
        assert synchronous < ahead

    def test_a_far_draft_worker_is_not_asked(self) -> None:
        times = step_times(row_s=0.0)
        assert decide(conditions(2, round_trip_s=0.1), times).reason is DraftReason.NO_GAIN

    @given(
        st.lists(st.floats(0, 1), min_size=1, max_size=40),
        st.floats(0, 0.005),
        st.floats(0, 0.05),
        st.booleans(),
        st.floats(0, 0.002),
        st.integers(0, 200),
    )
    def test_a_draft_promises_to_pay_and_is_within_bounds(
        self, alphas: list[float], draft_s: float, trip_s: float, ahead: bool, row_s: float, step: int
    ) -> None:
        measured = Conditions(alphas, 100.0, draft_s, trip_s, ahead)
        times = step_times(row_s)
        decision = decide(measured, times, step=step)
        shape, most = decision.choice, CONTROL.depth(len(alphas))
        gains = speedups(measured, times, most)
        assert gains[0] == pytest.approx(1.0)
        assert shape.depth <= most
        if decision.reason in DRAFTING:
            assert gains[shape.depth] == max(gains[1:]) >= DAMPING.start
            assert 1 <= shape.width <= CONTROL.max_width
            assert shape.depth <= shape.nodes <= min(CONTROL.max_nodes, shape.depth * shape.width)
        elif decision.reason is DraftReason.NO_GAIN:
            assert shape == NO_DRAFTS
            assert max(gains[1:]) < DAMPING.start

    def test_nobody_decodes(self) -> None:
        assert decide(conditions(0), step_times(0.0)) == Decision(NO_DRAFTS, DraftReason.NO_REQUESTS)

    def test_before_steps_were_measured_drafts_are_small(self) -> None:
        decision = decide(conditions(3), StepTimes())
        assert (decision.choice.depth, decision.reason) == (CONTROL.min_depth, DraftReason.UNMEASURED)


class TestLoadControl:
    def test_the_formulas(self) -> None:
        control = LoadControl(
            max_depth=8, min_depth=2, depth_rows=100, depth_offset=2, max_width=4, width_rows=16, width_offset=1
        )
        assert [control.depth(n) for n in (1, 10, 18, 23, 200)] == [8, 7, 4, 3, 2]
        assert [control.shape(n, 2).width for n in (1, 5, 8, 16, 17)] == [4, 4, 3, 2, 1]
        assert control.shape(1, 3) == Shape(3, 4, 12)
        assert control.shape(1, 8).nodes == control.max_nodes

    def test_the_load_bounds_the_depth(self) -> None:
        decision = decide(conditions(64, alpha=0.95), step_times(0.0))
        assert decision == Decision(Shape(3, 1, 3), DraftReason.LOAD)

    @pytest.mark.parametrize("wrong", [{"min_depth": 0}, {"max_depth": 1, "min_depth": 2}, {"max_width": 0}])
    def test_bounds_that_allow_no_draft_are_refused(self, wrong: dict[str, int]) -> None:
        with pytest.raises(ValueError, match="at least"):
            LoadControl(**wrong)


class TestDamping:
    def test_a_draft_worker_is_probed_once_in_a_while(self) -> None:
        times, hopeless = step_times(row_s=0.01), conditions(32, alpha=0.2)
        decisions = [decide(hopeless, times, step=step) for step in range(1, 2 * DAMPING.probe_every + 1)]
        assert [each.reason for each in decisions].count(DraftReason.PROBE) == 2
        assert all((each.choice == NO_DRAFTS) == (each.reason is DraftReason.NO_GAIN) for each in decisions)

    def test_it_begins_later_than_it_ends(self) -> None:
        times = step_times(row_s=0.0)
        barely = Conditions((0.52,), 0.0, 0.005, 0.0, ahead=False)  # 1.52 tokens in 1.5 times the time
        off = decide(barely, times)
        assert off.reason is DraftReason.NO_GAIN
        on = Decision(Shape(1, 3, 3), DraftReason.GOODPUT)
        assert decide(barely, times, on).reason in DRAFTING
        probe = Decision(Shape(1, 3, 3), DraftReason.PROBE)
        assert decide(barely, times, probe).reason is DraftReason.NO_GAIN

    def test_depth_is_kept_where_another_gains_hardly_more(self) -> None:
        times, measured = step_times(row_s=0.0008), conditions(2, alpha=0.75)
        gains = speedups(measured, times, 8)
        best = decide(measured, times).choice.depth
        beside = next(k for k in (best - 1, best + 1) if gains[k] * DAMPING.change > gains[best])
        kept = decide(measured, times, Decision(CONTROL.shape(2, beside), DraftReason.GOODPUT))
        assert (kept.choice.depth, kept.reason) == (beside, DraftReason.KEPT)
        far = decide(measured, times, Decision(CONTROL.shape(2, 1), DraftReason.GOODPUT))
        assert (far.choice.depth, far.reason) == (best, DraftReason.GOODPUT)

    def test_noise_in_alpha_does_not_make_it_flap(self) -> None:
        times, previous, changes = step_times(row_s=0.0008), None, 0
        for step in range(1, 400):
            measured = conditions(4, alpha=0.7 + 0.02 * (-1) ** step)
            decision = decide(measured, times, previous, step)
            changes += previous is not None and decision.choice != previous.choice
            previous = decision
        assert changes <= 1


class TestVerifyBudget:
    def test_up_to_where_rows_begin_to_cost(self) -> None:
        times = step_times(row_s=0.001, free_rows=64)
        assert verify_budget(times, 8, 0.0, tolerance=0.0, max_rows=512) == 64
        assert verify_budget(times, 8, 0.0, tolerance=0.2, max_rows=512) == pytest.approx(66, abs=1)
        assert verify_budget(times, 8, 0.0, tolerance=0.2, max_rows=16) == 16

    def test_long_contexts_leave_less(self) -> None:
        times = step_times(row_s=0.0001)
        assert verify_budget(times, 8, 80_000.0, 0.1, 512) < verify_budget(times, 8, 0.0, 0.1, 512)

    @given(st.integers(1, 100), st.floats(0, 1e6), st.floats(0, 2), st.integers(1, 400))
    def test_the_largest_within_tolerance(self, requests: int, context: float, tolerance: float, most: int) -> None:
        times = step_times(row_s=0.0002, free_rows=16)

        def seconds(rows: int) -> float:
            return times.seconds(rows, context / requests * rows)

        rows = verify_budget(times, requests, context, tolerance, most)
        limit = (1 + tolerance) * seconds(requests)
        assert requests <= rows <= max(most, requests)
        assert seconds(rows) <= limit * (1 + 1e-9)
        assert rows >= most or seconds(rows + 1) >= limit * (1 - 1e-9)
