"""Goals say which requests are lost, which are behind, and how fast prompts are computed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.speculation.goals import STRICTER, Progress, Waiting, prompt_tokens

GOAL_S = 0.05

waitings = st.lists(
    st.builds(Waiting, st.integers(1, 4000), st.floats(0, 30), st.sampled_from((0.2, 1.0, 10.0))), max_size=8
)


def progress(elapsed_s: float, decoded: int, remaining: int, late: bool = False) -> Progress:
    """Of one request."""
    return Progress(*(np.array([float(each)]) for each in (elapsed_s, decoded, remaining, GOAL_S)), np.array([late]))


class TestProgress:
    def test_behind_is_later_than_a_little_less_than_the_goal(self) -> None:
        due_s = 100 * GOAL_S * STRICTER
        assert not progress(due_s - 0.01, 100, 50).behind
        assert progress(due_s + 0.01, 100, 50).behind

    def test_lost_is_what_the_best_pace_would_not_save(self) -> None:
        """100 of 200 tokens took 7.9 s of 10 s: 100 more at 20 ms each would be in time."""
        tight = progress(7.9, 100, 100)
        assert not tight.lost(0.020)
        assert tight.lost(0.022)

    @pytest.mark.parametrize("late", [False, True])
    def test_a_first_token_that_was_late_is_a_goal_that_is_lost(self, late: bool) -> None:
        assert progress(0.0, 0, 100, late).lost(0.001) == late

    def test_needed_is_what_makes_a_request_be_on_time_after_the_round(self) -> None:
        assert progress(1.0, 20, 5).needs(0.1) == pytest.approx(2.0)
        assert progress(0.5, 20, 5).needs(0.1) < 1.0


class TestPrompts:
    def test_as_fast_as_the_first_token_is_due(self) -> None:
        """1,000 tokens in 0.85 s less a step: nine steps of 0.1 s, of which the last yields the token."""
        assert prompt_tokens([Waiting(1000, 0.0, 1.0)], 0.085) == 112
        assert prompt_tokens([Waiting(1000, 0.5, 1.0)], 0.085) > 112

    def test_those_before_it_have_to_be_done_too(self) -> None:
        urgent = Waiting(100, 0.7, 1.0)
        assert prompt_tokens([Waiting(2000, 0.0, 10.0), urgent], 0.05) == 1050

    @given(waitings, st.floats(0.001, 1.0))
    def test_all_are_done_in_time_where_that_is_possible_and_nobody_starves(
        self, waiting: list[Waiting], round_s: float
    ) -> None:
        tokens = prompt_tokens(waiting, round_s)
        assert (tokens == 0) == (not waiting)
        before = 0
        for each in waiting:
            before += each.tokens
            steps_s = (before / tokens + 1.0) * round_s
            due_s = 0.85 * each.ttft_s - each.waited_s
            assert steps_s <= max(due_s if due_s > 0 else each.ttft_s, 2 * round_s) + 1e-6
