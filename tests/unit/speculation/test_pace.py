"""What follows from how fast a verify worker goes."""

import numpy as np
import pytest

from tests.support.workers import fixed_drafts
from tidemill.core.tree import Shape
from workers.engine.base import SequenceOutput, StepOutput
from workers.speculation.pace import MAX_AHEAD, AtHand, Pace
from workers.speculation.remote import NextAnswer
from workers.speculation.step_time import StepTimes

STEP_S = 0.01


def pace_of(row_s: float, requests: int = 1, **settings: object) -> Pace:
    """A step of 10 ms, and `row_s` more for each row after the first. So many requests got a token from each step."""
    times = StepTimes()
    for rows in (1, 2, 4, 8, 16, 32) * 20:
        times.observe(rows, 20 * rows, STEP_S + row_s * (rows - 1))
    pace = Pace(fixed_drafts(**({"adaptive": True} | settings)), times)
    for step in range(60):
        outputs = (SequenceOutput("r", (1,)),) * requests
        pace.stepped(StepOutput(outputs, batch_tokens=1, seconds=STEP_S), 20, 20, step * STEP_S)
    return pace


def at_hand(*requests: tuple[float, float]) -> AtHand:
    """Tokens and alpha of each."""
    tokens, alphas = np.array(requests).T
    return AtHand(tokens, alphas)


class TestShape:
    """How large drafts are to be, and how far ahead they are made."""

    def test_deep_where_rows_are_cheap_and_none_where_they_are_not(self) -> None:
        cheap, _ = pace_of(0.0001).shape([0.8], 100, 0.001, 0.0005)
        assert cheap.depth == 8
        dear, _ = pace_of(STEP_S).shape([0.8] * 8, 800, 0.001, 0.0005)
        assert dear == Shape(0, 0, 0)

    def test_far_ahead_where_the_draft_worker_is_far_away(self) -> None:
        pace = pace_of(0.0001)
        ahead = [pace.shape([0.8], 100, trip_s, 0.0005)[1] for trip_s in (0.001, 0.011, 0.021, 0.081)]
        assert ahead == [1, 2, 3, MAX_AHEAD]
        assert pace_of(0.0001, ahead=0).shape([0.8], 100, 0.03, 0.0005)[1] == 0

    def test_none_where_it_is_too_far_away_to_be_of_use(self) -> None:
        assert pace_of(0.0001).shape([0.8], 100, 1.0, 0.0005) == (Shape(0, 0, 0), 0)

    def test_fixed_drafts_are_fixed(self) -> None:
        pace = pace_of(STEP_S, adaptive=False, max_depth=4, width=1, max_nodes=4)
        assert pace.shape([0.1] * 50, 5000, 1.0, 1.0) == (Shape(4, 1, 4), 1)
        assert pace.budget(50, 5000).rows >= 50 * 5


class TestWaiting:
    """A step waits if that is expected to bring more tokens than it costs."""

    @pytest.fixture
    def pace(self) -> Pace:
        return pace_of(0.0001)

    @pytest.mark.parametrize(("expected_s", "waits"), [(0.004, True), (0.007, True), (0.0095, False), (0.05, False)])
    def test_not_for_what_comes_no_sooner_than_a_step(self, pace: Pace, expected_s: float, waits: bool) -> None:
        """The step gives a token, which the answer has with a chance of 0.8."""
        assert pace.wait_until(at_hand((0.0, 0.8)), NextAnswer(expected_s, 0.1), 0.0) == (0.1 if waits else None)

    def test_not_while_there_is_enough_at_hand(self, pace: Pace) -> None:
        assert pace.wait_until(at_hand((2.0, 0.8)), NextAnswer(0.004, 0.1), 0.0) is None

    def test_not_for_what_the_answer_will_hardly_be_right_about(self, pace: Pace) -> None:
        assert pace.wait_until(at_hand((0.0, 0.3)), NextAnswer(0.004, 0.1), 0.0) is None

    def test_many_do_not_wait_for_what_few_lack(self) -> None:
        pace, answer = pace_of(0.0001, requests=31), NextAnswer(0.004, 0.1)
        assert pace.wait_until(at_hand((0.0, 0.5), *[(1.0, 0.5)] * 30), answer, 0.0) is None
        assert pace.wait_until(at_hand(*[(0.0, 0.5)] * 31), answer, 0.0) == 0.1

    def test_an_overdue_answer_is_not_for_nothing(self, pace: Pace) -> None:
        """It may come any moment, or not at all: what it is waited for with is a part of a round."""
        overdue = NextAnswer(0.004, 0.1)
        assert pace.wait_until(at_hand((0.0, 0.8)), overdue, 0.05) == 0.1
        assert pace.wait_until(at_hand((0.9, 0.6)), overdue, 0.05) is None
