"""Requests move from crowded workers to free ones, and only as far as that helps."""

import math
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from cluster.policy.levelling import Held, Holder, LevellingConfig, LevellingReason, freeness, level

CONFIG = LevellingConfig(headroom_blocks=2, low=math.inf, gap=4.0, at_once=3)


def holder(name: str, *blocks: int, pool: int = 100, leaving: bool = False) -> Holder:
    running = tuple(Held(f"{name}/{index}", size) for index, size in enumerate(blocks))
    return Holder(name, pool, running, leaving=leaving)


holders = st.lists(st.tuples(st.lists(st.integers(1, 20), max_size=5), st.booleans()), min_size=1, max_size=5).map(
    lambda found: [holder(f"w{index}", *sizes, leaving=goes) for index, (sizes, goes) in enumerate(found)]
)


@given(holders, st.randoms(use_true_random=False))
def test_a_migration_has_room_and_brings_workers_nearer(workers: list[Holder], random: object) -> None:
    decision = level(workers, CONFIG)
    shuffled = list(workers)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert level(shuffled, CONFIG) == decision, "the order of workers does not matter"
    assert len(decision.choice) <= CONFIG.at_once
    by_name = {each.worker: each for each in workers}
    moved = [each.request_id for each in decision.choice]
    assert len(set(moved)) == len(moved), "no request moves twice"
    taken: dict[str, int] = {}
    for each in decision.choice:
        source, taker = by_name[each.source], by_name[each.destination]
        assert not taker.leaving
        held = next(held for held in source.running if held.request_id == each.request_id)
        taken[each.destination] = taken.get(each.destination, 0) + held.blocks
        assert taken[each.destination] <= taker.free
    if not any(each.leaving for each in workers):
        spread = [freeness(each, CONFIG) for each in workers]
        assert decision.choice == () or max(spread) - min(spread) > CONFIG.gap


def test_a_worker_that_leaves_is_emptied_first() -> None:
    decision = level([holder("a", 5, 6, leaving=True), holder("b", 30), holder("c", 60)], CONFIG)
    assert {each.source for each in decision.choice} == {"a"}
    assert len(decision.choice) == 2
    assert decision.reason is LevellingReason.LEAVING
    assert freeness(holder("a", leaving=True), CONFIG) == -math.inf


def test_nothing_moves_where_nobody_has_room_or_all_are_alike() -> None:
    full = level([holder("a", 5, leaving=True), holder("b", 99)], CONFIG)
    assert (full.choice, full.reason) == ((), LevellingReason.NO_ROOM)
    alike = level([holder("a", 40), holder("b", 41)], CONFIG)
    assert (alike.choice, alike.reason) == ((), LevellingReason.EVEN)
    assert level([], CONFIG).reason is LevellingReason.EVEN


def test_a_worker_that_is_not_short_keeps_what_it_has() -> None:
    workers = [holder("a", 10, 10), holder("b")]
    assert level(workers, replace(CONFIG, low=30.0)).choice == (), "it has 38 blocks for each of its requests"
    assert level(workers, replace(CONFIG, low=60.0)).choice != ()


def test_of_the_least_priority_the_shortest_moves() -> None:
    running = (Held("long", 40), Held("short", 10), Held("important", 5, priority=1))
    decision = level([Holder("a", 60, running), holder("b")], LevellingConfig(at_once=1))
    assert [each.request_id for each in decision.choice] == ["short"]
