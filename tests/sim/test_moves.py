"""Requests that move while they decode, under every combination of faults: the real router and real workers, virtual
time. Whatever is moved, breaks, freezes or changes its role: the same tokens, and in the end nobody holds anything.
"""

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.move import MoveOutcome
from router.moves import MoveReason
from tests.support.engines import SMALL, VOCABULARY, one_by_one
from tests.support.virtual_time import run_virtual
from tests.support.wired import STEP_S, Wired
from tidemill.core import metrics
from tidemill.core.messages import Tokens
from tidemill.core.model import Request, Role
from tidemill.types import SamplingParams
from workers.engine.emulated import EmulatedEngine

DEADLINES = {"move_s": 1.0, "resume_s": 0.5, "token_s": 3.0, "transfer_s": 3.0, "prefill_s": 3.0, "lease_s": 4.0}


def request_of(index: int, prompt: int = 60, tokens: int = 60) -> Request:
    sampling = SamplingParams(
        max_tokens=tokens,
        temperature=index % 2,
        repetition_penalty=1.1,
        frequency_penalty=0.3,
        seed=index,
        ignore_eos=True,
        logprobs=2 if index % 3 == 0 else None,
    )
    return Request(f"r{index}", tuple(2 + (i * (3 + index)) % (VOCABULARY - 2) for i in range(prompt)), sampling)


def plain(request: Request) -> tuple[int, ...]:
    return one_by_one(EmulatedEngine(SMALL, VOCABULARY), [request])[request.id]


def tokens_of(steps: list[Tokens]) -> tuple[int, ...]:
    return tuple(token for step in steps for token in step.tokens)


async def decoding(cluster: Wired, request_id: str) -> None:
    while request_id not in cluster.router.decoding():  # noqa: ASYNC110 - virtual time
        await asyncio.sleep(STEP_S)


async def move_all(cluster: Wired, rng: random.Random) -> list[MoveOutcome]:
    """Everything that decodes goes elsewhere, at once."""
    workers = [each.peer.id for each in cluster.pools.snapshot().of(Role.VERIFY)]
    wanted = [
        (request_id, rng.choice([each for each in workers if each != at] or workers))
        for request_id, at in cluster.router.decoding().items()
    ]
    return list(await asyncio.gather(*(cluster.router.move(*each, MoveReason.ASKED) for each in wanted)))


def test_back_and_forth_many_at_once() -> None:
    async def run() -> None:
        async with Wired([Role.VERIFY, Role.VERIFY, Role.PREFILL], **DEADLINES).running() as cluster:
            requests = [request_of(i) for i in range(9)]
            answers = [asyncio.create_task(cluster.serve(each)) for each in requests]
            outcomes: list[MoveOutcome] = []
            for each in requests:
                await decoding(cluster, each.id)
            while not all(each.done() for each in answers):
                outcomes += await move_all(cluster, random.Random(len(outcomes)))
                await asyncio.sleep(STEP_S)
            for request, answer in zip(requests, answers, strict=True):
                assert tokens_of(answer.result()) == plain(request)
            assert outcomes.count(MoveOutcome.MOVED) >= 18
            assert set(outcomes) <= {MoveOutcome.MOVED, MoveOutcome.OVER}
            moved = cluster.counters.value(metrics.MIGRATIONS, outcome="moved", reason="asked")
            assert moved == outcomes.count(MoveOutcome.MOVED)
            assert cluster.counters.value(metrics.MIGRATION_PAUSE) == moved

    run_virtual(run())


def test_log_probabilities_come_as_they_would_have() -> None:
    async def run(move: bool) -> list[Tokens]:
        async with Wired([Role.VERIFY, Role.VERIFY], **DEADLINES).running() as cluster:
            answer = asyncio.create_task(cluster.serve(request_of(0)))
            await decoding(cluster, "r0")
            while move and not answer.done():
                await move_all(cluster, random.Random(0))
            return await answer

    undisturbed, moved = run_virtual(run(False)), run_virtual(run(True))
    assert [step.logprobs for step in moved] == [step.logprobs for step in undisturbed]
    assert all(step.logprobs for step in moved)


def test_a_draining_worker_is_emptied_by_moves() -> None:
    async def run() -> None:
        async with Wired([Role.VERIFY, Role.VERIFY], **DEADLINES).running() as cluster:
            requests = [request_of(i, tokens=200) for i in range(12)]
            answers = [asyncio.create_task(cluster.serve(each)) for each in requests]
            for each in requests:
                await decoding(cluster, each.id)
            leaving = cluster.workers[0]
            assert leaving.me.id in cluster.router.decoding().values()
            began = asyncio.get_running_loop().time()
            wish = leaving.begin_switch(Role.PREFILL, drain_s=60.0)
            while not wish.done.done():  # noqa: ASYNC110 - virtual time
                await asyncio.sleep(STEP_S)
            assert asyncio.get_running_loop().time() - began < 60 * STEP_S, "long before they would have ended"
            assert leaving.loop.standing.role is Role.PREFILL
            for request, answer in zip(requests, answers, strict=True):
                assert tokens_of(await answer) == plain(request)
            assert cluster.counters.value(metrics.MIGRATIONS, outcome="moved", reason="drain") >= 5
            assert cluster.counters.value(metrics.RETRIES, failure="role_changed") == 0

    run_virtual(run())


def test_what_has_nowhere_to_go_is_given_up_at_the_deadline_and_comes_back() -> None:
    async def run() -> None:
        async with Wired([Role.VERIFY], max_retries=0, **DEADLINES).running() as cluster:
            answer = asyncio.create_task(cluster.serve(request_of(0, tokens=100)))
            await decoding(cluster, "r0")
            (worker,) = cluster.workers
            for to in (Role.PREFILL, Role.VERIFY):
                wish = worker.begin_switch(to, drain_s=0.2)
                while not wish.done.done():  # noqa: ASYNC110 - virtual time
                    await asyncio.sleep(STEP_S)
            assert tokens_of(await answer) == plain(request_of(0, tokens=100)), "a change of role is no failure"

    run_virtual(run())


@pytest.mark.parametrize("moment", [0.0, 0.03, 0.06, 0.09, 0.12, 0.15, 0.2])
@pytest.mark.parametrize("victim", ["source", "target"])
@pytest.mark.parametrize("fault", ["freeze", "stream", "link", "message"])
def test_a_fault_in_the_middle_of_a_move(fault: str, victim: str, moment: float) -> None:
    async def run() -> None:
        async with Wired([Role.VERIFY, Role.VERIFY], **DEADLINES).running() as cluster:
            request = request_of(1, prompt=200, tokens=120)
            answer = asyncio.create_task(cluster.serve(request))
            await decoding(cluster, "r1")
            at = cluster.router.decoding()["r1"]
            source = cluster.by_name[at.name]
            (target,) = [each for each in cluster.workers if each is not source]
            move = asyncio.create_task(cluster.router.move("r1", target.me.id, MoveReason.ASKED))
            await asyncio.sleep(moment)
            worker = source if victim == "source" else target
            match fault:
                case "freeze":
                    worker.frozen_until = asyncio.get_running_loop().time() + 8.0
                case "stream":
                    worker.break_streams()
                case "link":
                    cluster.break_links()
                case "message":
                    cluster.lose_messages()
            assert tokens_of(await answer) == plain(request)
            await move
            await asyncio.sleep(10.0)

    run_virtual(run())


FAULTS = st.sampled_from(["move", "move", "move", "freeze", "stream", "links", "lose", "leave", "role"])
events = st.lists(st.tuples(st.floats(0.0, 0.4), FAULTS, st.integers(0, 5)), min_size=3, max_size=20)


@settings(max_examples=25, deadline=None)
@given(events, st.integers(2, 8))
def test_anything_in_any_order(script: list[tuple[float, str, int]], count: int) -> None:
    """Small pools, so that targets refuse and sources preempt."""

    async def run() -> None:
        engine = SMALL.model_copy(update={"kv_blocks": 40})
        roles = [Role.VERIFY, Role.VERIFY, Role.VERIFY, Role.PREFILL]
        async with Wired(roles, engine, **DEADLINES).running() as cluster:
            requests = [request_of(i, prompt=20 + 15 * i, tokens=80) for i in range(count)]
            answers = [asyncio.create_task(cluster.serve(each)) for each in requests]
            moves = []
            for pause_s, what, which in script:
                await asyncio.sleep(pause_s)
                worker = cluster.workers[which % 3]
                match what:
                    case "move":
                        moves.append(asyncio.create_task(move_all(cluster, random.Random(which))))
                    case "freeze":
                        worker.frozen_until = asyncio.get_running_loop().time() + 0.3 * (which + 1)
                    case "stream":
                        worker.break_streams()
                    case "links":
                        cluster.break_links()
                    case "lose":
                        cluster.lose_messages()
                    case "leave":
                        answers[which % count].cancel()
                    case "role":
                        worker.begin_switch(Role.PREFILL, 1.0)
                        await asyncio.sleep(1.5)
                        worker.begin_switch(Role.VERIFY, 1.0)
            results = await asyncio.gather(*answers, return_exceptions=True)
            await asyncio.gather(*moves)
            for request, result in zip(requests, results, strict=True):
                if not isinstance(result, asyncio.CancelledError):
                    assert not isinstance(result, BaseException), result
                    assert tokens_of(result) == plain(request)
            await asyncio.sleep(2.0)

    run_virtual(run())
