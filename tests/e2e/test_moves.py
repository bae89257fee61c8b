"""Requests move between real workers while their clients read: the same tokens, text and log-probabilities.

The bundled models, native engine, a process for each worker. `make switches` makes 60 changes of role in a row.
"""

import asyncio
import random
import statistics

import pytest

from router.move import MoveOutcome
from tests.support.load import Hand, Load, mixed_items
from tests.support.local import process_cluster, settings_for
from tidemill import AsyncClient
from tidemill.core import metrics
from tidemill.core.model import Role


@pytest.mark.parametrize("speculation", [False, True])
async def test_back_and_forth_under_load(speculation: bool) -> None:
    roles = (Role.PREFILL, Role.VERIFY, Role.VERIFY, *([Role.DRAFT] if speculation else []))
    settings, rng, outcomes = settings_for("native", speculation=speculation), random.Random(0), []
    # Four workers may share two cores with other tests: none of the moves is to be called off for being slow.
    patient = settings.deadlines.model_copy(update={"resume_s": 30.0, "move_s": 30.0})
    settings = settings.model_copy(update={"deadlines": patient})
    async with process_cluster(settings, roles) as (_, router, workers):
        async with AsyncClient(router.address, retries=0) as client:
            load = await Load.of(client, mixed_items(12))
            verify = [each.peer.id for each in workers if each.role is Role.VERIFY and each.peer is not None]
            async with load.running(streams=5):
                while outcomes.count(MoveOutcome.MOVED) < 40:
                    for request_id, at in router.decoding().items():
                        to = next(each for each in verify if each != at)
                        outcomes.append(await router.move(request_id, to))
                    await asyncio.sleep(rng.random() * 0.05)
        assert not load.errors
        assert not load.different, f"of {load.answered} requests"
        assert set(outcomes) <= {MoveOutcome.MOVED, MoveOutcome.OVER}, outcomes
        assert router.metrics.value(metrics.MIGRATION_PAUSE) == outcomes.count(MoveOutcome.MOVED)
        await Hand(workers).nothing_held()


async def test_changes_of_role_in_a_row(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> None:
    """No request fails, none gets other tokens, nothing is left behind."""
    switches = 60 if request.config.getoption("--all-switches") else 6
    took: dict[tuple[Role, Role], list[float]] = {}
    async with process_cluster(settings_for("native")) as (_, router, workers):
        async with AsyncClient(router.address, retries=0) as client:
            load = await Load.of(client, mixed_items(16))
            hand = Hand(workers)
            async with load.running(streams=6):
                for number in range(switches):
                    before, to, seconds = await hand.switch(number)
                    took.setdefault((before, to), []).append(seconds)
                    await asyncio.sleep(0.2)
        moved = router.metrics.value(metrics.MIGRATIONS, outcome="moved", reason="drain")
        retried = router.metrics.value(metrics.RETRIES, failure="role_changed")
        with capsys.disabled():
            print(f"\n{load.answered} requests, {moved:.0f} moved, {retried:.0f} taken elsewhere")
            for (before, to), times in took.items():
                print(f"{before:>8} -> {to:8} median {statistics.median(times):.3f} s, worst {max(times):.3f} s")
        assert not load.errors
        assert not load.different, f"of {load.answered} requests"
        assert moved > 0
        await hand.nothing_held()
        if request.config.getoption("--all-switches"):
            between = [t for pair in (Hand.PAIRS[0], Hand.PAIRS[1]) for t in took[pair]]
            assert statistics.median(between) < 1.0
            assert max(between) < 3.0
