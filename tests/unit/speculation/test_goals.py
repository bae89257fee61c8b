"""Goals say who takes part in a step, and how fast prompts are computed; nobody starves for it."""

from hypothesis import given
from hypothesis import strategies as st

from workers.speculation.goals import LOST_TURNS, RESERVE, Progress, Standing, Waiting, prompt_tokens, standing

GOAL_S, ROUND_S, BEST_S = 0.05, 0.06, 0.02

progresses = st.lists(
    st.builds(
        Progress,
        st.floats(0, 100),
        st.integers(0, 2000),
        st.integers(1, 2000),
        st.sampled_from((0.03, 0.05, 0.2)),
        st.booleans(),
    ),
    max_size=12,
)
waitings = st.lists(
    st.builds(Waiting, st.integers(1, 4000), st.floats(0, 30), st.sampled_from((0.2, 1.0, 10.0))), max_size=8
)


def ahead(seconds: float, remaining: int = 100) -> Progress:
    """Of its goal, after 100 tokens."""
    return Progress(100 * GOAL_S * 0.97 - seconds, 100, remaining, GOAL_S)


LOST = Progress(100 * GOAL_S, 10, 20, GOAL_S)
BEHIND = ahead(-0.1)


class TestStanding:
    def test_while_nobody_is_behind_everybody_takes_part(self) -> None:
        assert standing([ahead(0.0), ahead(5.0), LOST], ROUND_S, BEST_S, 1) == Standing(lost=frozenset({2}))
        assert standing([], ROUND_S, BEST_S, 1) == Standing()

    def test_those_at_ease_make_room_for_one_that_is_behind(self) -> None:
        found = standing([BEHIND, ahead(3.0), ahead((1 + RESERVE) * ROUND_S - 0.01)], ROUND_S, BEST_S, 1)
        assert (found.resting, found.lost, found.pressed) == ({1}, frozenset(), True)

    def test_a_first_token_that_was_late_is_a_goal_that_is_lost(self) -> None:
        late = Progress(0.0, 0, 100, GOAL_S, late=True)
        assert standing([late], ROUND_S, BEST_S, 1) == Standing(lost=frozenset({0}))

    def test_lost_is_what_the_best_pace_would_not_save(self) -> None:
        """100 of 200 tokens took 7.9 s of 10 s: 100 more at 20 ms each would be in time."""
        tight = Progress(7.9, 100, 100, GOAL_S)
        assert not tight.lost(0.020)
        assert tight.lost(0.022)

    @given(progresses, st.floats(0.001, 1.0), st.floats(0.001, 0.1), st.integers(0, 1000))
    def test_nobody_starves_and_whoever_is_behind_takes_part(
        self, requests: list[Progress], round_s: float, best_s: float, step: int
    ) -> None:
        found = [standing(requests, round_s, best_s, step + more) for more in range(LOST_TURNS)]
        for place, each in enumerate(requests):
            turns = sum(place not in one.resting for one in found)
            if place in found[0].lost:
                assert turns >= 1, "a lost request sits out every step"
            elif each.ahead_s < 0.0:
                assert turns == LOST_TURNS
            elif turns < LOST_TURNS:
                assert each.ahead_s - round_s > 0.0, "it falls behind by sitting out"
        assert not found[0].resting or found[0].pressed
        assert not requests or len(found[0].resting) < len(requests), "the step is empty"


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
