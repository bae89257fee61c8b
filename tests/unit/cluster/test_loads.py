"""How loaded a role is: what was measured comes back out, and more load is never less."""

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.policy.loads import PrefillLoad, Seen, StepLine, VerifyLoad, prefill_load, steady, strictest, verify_load
from tests.support.fluid import Load, Speed, cluster_of
from tidemill.core.model import Role
from tidemill.core.telemetry import Progress, Steps, Traffic, Window


def window(seconds: float, rate: float, prompt: int = 100) -> Window:
    count = round(seconds * rate)
    traffic = Traffic(arrived=count, prompt_tokens=count * prompt, prompt_squares=count * prompt**2)
    return Window(seconds, (("default", traffic),))


def arrivals(windows: list[Window]) -> int:
    came = [each.all.arrived for each in windows]
    return steady([each.seconds for each in windows], came, came)


def test_a_step_line_is_found_again() -> None:
    rng, steps = random.Random(1), Steps()
    for _ in range(2000):
        running, context = rng.randint(1, 120), rng.choice((300, 1800))
        held = running * context
        steps += Steps.of(running, held, 0.02 + 0.00004 * running + 6e-7 * held + rng.gauss(0, 0.0002))
    line = StepLine.fit(steps)
    assert line is not None
    assert line.base == pytest.approx(0.02, rel=0.1)
    assert line.each * 60 + line.held * 60_000 == pytest.approx(0.0024 + 0.036, rel=0.1)


@given(st.lists(st.tuples(st.integers(1, 200), st.integers(1, 3000), st.floats(0.001, 0.5)), min_size=1, max_size=30))
def test_a_step_line_goes_through_the_mean_and_never_falls(samples: list[tuple[int, int, float]]) -> None:
    steps = sum((Steps.of(running, running * context, s) for running, context, s in samples), Steps())
    line = StepLine.fit(steps)
    assert line is not None
    assert min(line.base, line.each, line.held) >= -1e-9
    n = steps.samples
    mean = line.base + line.each * steps.running / n + line.held * steps.held / n
    assert mean == pytest.approx(steps.seconds / n, rel=1e-6)


def test_without_steps_there_is_no_line() -> None:
    assert StepLine.fit(Steps()) is None


def test_traffic_is_taken_from_the_longest_window_that_agrees() -> None:
    constant = [window(1, 20), window(3, 20), window(10, 20), window(90, 20)]
    assert arrivals(constant) == 3
    jumped = [window(1, 90), window(3, 85), window(10, 40), window(90, 20)]
    assert arrivals(jumped) == 1, "the last three seconds are another traffic than the ten before"
    noisy = [window(1, 26), window(3, 22), window(10, 21), window(90, 20)]
    assert arrivals(noisy) == 3, "a few more in a second are no change"
    fresh = [Window(5.0, (("default", Traffic(arrived=100)),))] * 4
    assert arrivals(fresh) == 0, "a router that is as old as its shortest window knows one only"


def test_the_strictest_goal_counts_if_a_tenth_of_the_requests_have_it() -> None:
    few, many = Traffic(arrived=5, tpot_goal_s=0.05), Traffic(arrived=95, tpot_goal_s=9.5)
    assert strictest(Window(1.0, (("tight", few), ("default", many))), lambda t: t.tpot_goal_s) == pytest.approx(0.1)
    some = Traffic(arrived=15, tpot_goal_s=0.15)
    assert strictest(Window(1.0, (("tight", some), ("default", many))), lambda t: t.tpot_goal_s) == pytest.approx(0.01)
    assert strictest(Window(1.0), lambda t: t.tpot_goal_s) == math.inf


@given(
    st.builds(
        PrefillLoad, st.floats(0, 30), st.floats(0.001, 2), st.floats(0, 100), st.floats(0, 1), st.floats(0.1, 5)
    ),
    st.integers(1, 20),
)
def test_prefill_is_less_loaded_with_more_workers(load: PrefillLoad, workers: int) -> None:
    assert load.ratio(workers + 1) <= load.ratio(workers) + 1e-9
    assert load.ratio(workers) >= (load.prompt_s + load.rest_s) / load.goal_s, "nothing is faster than without a queue"
    assert load.ratio(0) == (math.inf if load.busy else 0.0)


seconds = st.floats(0, 1)


@given(
    st.builds(
        VerifyLoad, seconds, seconds, st.floats(0, 20), st.floats(0, 9), st.floats(0, 9), st.floats(0.01, 1),
        st.floats(0, 4), seconds, st.floats(0, 4),
    ),
    st.integers(1, 20),
    st.integers(0, 5),
)  # fmt: skip
def test_verify_is_less_loaded_with_more_workers(load: VerifyLoad, workers: int, drafters: int) -> None:
    assert load.ratio(workers + 1, drafters) <= load.ratio(workers, drafters) + 1e-9


def test_drafts_that_pay_relieve_and_those_that_do_not_burden() -> None:
    paying = VerifyLoad(0.02, 0.1, 1.0, 0.0, 0.0, 0.05, accepted=2.0, drafted_s=0.05, drafters=2.0)
    assert paying.ratio(4, 2) < paying.ratio(4, 1) < paying.ratio(4, 0)
    assert paying.ratio(4, 9) == paying.ratio(4, 2), "more draft workers than there is to draft for change nothing"
    idle = VerifyLoad(0.02, 0.1, 0.0, 0.0, 0.0, 0.05, accepted=0.1, drafted_s=0.5, drafters=2.0)
    assert idle.ratio(4, 2) > idle.ratio(4, 0)


def test_loads_are_those_of_the_pools() -> None:
    """A pool at half its capacity is seen as such, from the sums alone."""
    cluster, speed = cluster_of(4, 0, 8), Speed()
    load = Load(rate=4 * speed.prompt_tokens_per_s / 2000 * 0.5, prompt=2000, output=100)
    for _ in range(240):
        cluster.advance(load)
    seen = Seen.of(cluster.picture())
    found = prefill_load(seen)
    assert found is not None
    assert found.busy == pytest.approx(2.0, rel=0.02)
    assert found.prompt_s == pytest.approx(0.25, rel=0.02)
    verify = verify_load(seen)
    assert verify is not None
    assert verify.ratio(8, 0) * verify.goal_s == pytest.approx(cluster.step_s, rel=0.1)
    assert seen.settled


def test_how_fast_prompts_are_computed_is_not_taken_from_a_moment() -> None:
    """Prompts count when they end: two more in a second are no faster workers, as long as the traffic is the same."""
    cluster, speed = cluster_of(8, 0, 4), Speed()
    load = Load(rate=8 * speed.prompt_tokens_per_s / 2000 * 0.9, prompt=2000, output=10)
    for _ in range(240):
        cluster.advance(load)
    picture = cluster.picture()
    calm = prefill_load(Seen.of(picture))
    lucky = [replace(each, roles=((Role.PREFILL, more(each.of(Role.PREFILL))),)) for each in picture.windows[:-1]]
    assert prefill_load(Seen.of(replace(picture, windows=(*lucky, picture.windows[-1])))) == calm


def more(progress: Progress) -> Progress:
    return replace(progress, prompt_tokens=progress.prompt_tokens + 4000)
