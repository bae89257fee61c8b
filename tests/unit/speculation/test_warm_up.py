"""Step times as a worker measures them before it serves."""

from dataclasses import dataclass

import pytest

from tidemill.core.messages import Draft
from tidemill.core.settings import EngineSettings
from workers.engine.emulated import EmulatedEngine
from workers.engine.latency import LinearLatency
from workers.speculation.step_time import StepTimes
from workers.speculation.warm_up import measure_steps

STEP_S, ROW_S = 0.01, 0.001
POOL = EngineSettings(kind="emulated", kv_blocks=256, block_size=16)


@dataclass
class Time:
    """Passes by sleeping only."""

    now: float = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class ShortChains(EmulatedEngine):
    """Verifies two tokens of a draft, as an engine that was started with short drafts does."""

    def propose(self, draft: Draft) -> bool:
        return super().propose(Draft(draft.request_id, draft.base, draft.tree.up_to(2)))


def measured(kind: type[EmulatedEngine], settings: EngineSettings = POOL) -> StepTimes:
    """On an engine that is left as it was."""
    time, times = Time(), StepTimes()
    latency = LinearLatency(step_s=STEP_S, decode_row_s=ROW_S, drafted_row_s=ROW_S)
    engine = kind(settings, 500, 2048, latency=latency, clock=time, sleep=time.sleep)
    measure_steps(engine, times, settings.max_running)
    assert not engine.has_work()
    assert engine.load().kv_blocks_used == 0
    return times


@pytest.mark.parametrize("kind", [EmulatedEngine, ShortChains])
@pytest.mark.parametrize("rows", [1, 2, 4, 8, 12])
def test_what_a_row_costs_is_known_for_many_of_them(kind: type[EmulatedEngine], rows: int) -> None:
    """However short the drafts are that the engine verifies of one sequence."""
    assert measured(kind).level(rows) == pytest.approx(STEP_S + rows * ROW_S, rel=0.03)


def test_an_engine_for_one_sequence_at_a_time_is_measured_with_one() -> None:
    assert measured(EmulatedEngine, POOL.model_copy(update={"max_running": 1})).ready


def test_what_does_not_fit_is_left_out() -> None:
    assert not measured(EmulatedEngine, POOL.model_copy(update={"kv_blocks": 2})).ready
