"""Live roles against static ones on a virtual clock: the policies of production, workers with the times of OPT-13B.

The whole table, with longer phases: python -m benchmarks.roles
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from statistics import mean

import pytest

from benchmarks.roles import GOALS, OUTPUTS, PROMPTS, WORKERS, roles
from cluster.bench.arrivals import TraceEntry
from cluster.policy.rebalance import RebalanceConfig
from cluster.sim.cluster import Outcome, SimConfig, Simulation
from cluster.sim.traffic import Arrival, Mix, from_trace, square_wave
from cluster.sim.worker import OPT_13B_80GB
from tidemill.core.model import Role

PHASE_S = 45.0
SEEDS = (3, 4, 5)  # how a change of traffic goes is partly chance


def simulate(prefill: int, arrivals: Sequence[Arrival], *, live: bool = False, drain_s: float = 30.0) -> Outcome:
    config = SimConfig(roles(prefill), slo=GOALS, rebalance=RebalanceConfig() if live else None)
    return Simulation(config, arrivals).run(arrivals[-1].at_s + drain_s)


@cache
def wave(seed: int = SEEDS[0]) -> tuple[Arrival, ...]:
    return tuple(square_wave((OUTPUTS, PROMPTS), PHASE_S, 2, seed=seed))


@cache
def live(seed: int = SEEDS[0]) -> Outcome:
    return simulate(5, wave(seed), live=True)


def attainment(outcomes: Sequence[Outcome], phase: str | None = None, since_s: float = 0.0) -> float:
    return mean(each.attainment(phase, since_s) for each in outcomes)


def test_every_request_ends_once() -> None:
    assert len(live().ended) == len({id(each.arrival) for each in live().ended}) == len(wave())
    assert all(each.ttft_s is not None for each in live().ended), "none failed"


def test_live_roles_serve_both_halves_of_a_square_wave() -> None:
    alive = [live(seed) for seed in SEEDS]
    assert attainment(alive, OUTPUTS.name) >= 0.95
    assert attainment(alive, PROMPTS.name) >= 0.7, "with the seconds in which roles change"
    assert attainment(alive, PROMPTS.name, since_s=PHASE_S + 15.0) >= 0.9
    static = [simulate(6, wave(seed)) for seed in SEEDS]  # the best of them here
    assert attainment(alive) >= attainment(static) + 0.15
    assert attainment(alive, PROMPTS.name) >= attainment(static, PROMPTS.name) + 0.5
    assert all(1 <= len(each.changes) <= 4 for each in alive), "as many as it takes"


def test_live_roles_beat_chunked_prefill_on_every_worker() -> None:
    config = SimConfig(roles(0), slo=GOALS, hardware=replace(OPT_13B_80GB, max_batch_tokens=2048))
    chunked = Simulation(config, wave()).run(2 * PHASE_S + 30.0)
    assert live().attainment() >= chunked.attainment() + 0.1


@pytest.mark.parametrize(("mix", "start"), [(PROMPTS, 9), (OUTPUTS, 3), (Mix("too much", 30, 1200, 150), 6)])
def test_under_a_constant_load_no_role_changes_after_the_first_minute(mix: Mix, start: int) -> None:
    outcome = simulate(start, square_wave((mix,), 90.0, 1, seed=5), live=True, drain_s=0.0)
    assert not [at for at, _, _ in outcome.changes if at > 60.0]


def test_the_same_seed_gives_the_same_run() -> None:
    short = wave()[:300]
    one, two = simulate(6, short, live=True), simulate(6, short, live=True)
    assert one.ended == two.ended
    assert one.changes == two.changes


def test_a_trace_is_played_at_any_speed() -> None:
    trace = [TraceEntry(float(index), 200, 20) for index in range(20)]
    arrivals = from_trace(trace, speedup=10.0)
    assert arrivals[-1].at_s == pytest.approx(1.9)
    assert simulate(2, arrivals).attainment() == 1.0


def test_draft_workers_shorten_answers_while_batches_are_small() -> None:
    mix = square_wave((Mix("few", 2, 200, 200),), 30.0, 1, seed=1)
    without = Simulation(SimConfig([Role.PREFILL, Role.VERIFY, Role.VERIFY], slo=GOALS), mix).run(60.0)
    with_drafts = Simulation(SimConfig([Role.PREFILL, Role.VERIFY, Role.DRAFT], slo=GOALS), mix).run(60.0)

    def tpot(outcome: Outcome) -> float:
        return sum(each.tpot_s or 0.0 for each in outcome.ended) / len(outcome.ended)

    assert tpot(with_drafts) < 0.6 * tpot(without)
    assert WORKERS == 12
