"""The router against scripted workers, where all goes well or a worker is full: to the command and the token."""

import asyncio

import pytest

from tests.support.scripted_worker import (
    ScriptedWorker,
    expected_tokens,
    lease_for,
    obliging_prefill,
    obliging_verify,
    refusing,
    router_settings,
    step,
    whole,
)
from tests.support.stage import LONG, SHORT, silent, stage, verify
from tidemill import InvalidRequest, Overloaded
from tidemill.core import metrics
from tidemill.core.messages import Cancel, Prefill, Prefilled, Refusal, Reserve, Submit
from tidemill.core.model import Role, WorkerLoad

# --- the straight way -------------------------------------------------------------------------------------------


async def test_short_prompts_are_prefilled_in_place() -> None:
    worker, prefill = verify(), ScriptedWorker("prefill-0", Role.PREFILL)
    async with stage(router_settings(), worker, prefill) as it:
        done = await it.client.generate(SHORT, max_tokens=5)
        submit = await worker.heard(Submit)
        assert done.tokens == expected_tokens(submit.request, 5)
        assert done.summary.route.split_reason == "short_prompt"
        assert done.summary.route.verify_worker == "verify-0@1"
        assert done.summary.speculation.verify_steps == 5
        assert [type(each) for each in worker.commands] == [Submit], "one command, and nothing after a regular end"
        assert not prefill.commands


async def test_long_prompts_are_prefilled_elsewhere() -> None:
    worker = verify()
    prefill = ScriptedWorker("prefill-0", Role.PREFILL, obliging_prefill(worker))
    drafter = ScriptedWorker("draft-0", Role.DRAFT)
    async with stage(router_settings(), worker, prefill, drafter) as it:
        done = await it.client.generate(LONG, max_tokens=4)
        reserve, order = await worker.heard(Reserve), await prefill.heard(Prefill)
        assert done.tokens == expected_tokens(reserve.request, 4)
        assert reserve.drafter == drafter.member.peer
        assert order.lease == lease_for(worker, reserve.request).lease
        assert order.request.prompt == tuple(LONG)
        route = done.summary.route
        assert (route.prefill_worker, route.draft_worker) == ("prefill-0@1", "draft-0@1")
        assert route.split_reason == "disaggregated"
        assert (worker.commands, prefill.commands) == ([reserve], [order]), "one command each"
        assert not drafter.commands


async def test_prefix_cached_prompts_skip_the_prefill_worker() -> None:
    prefill = ScriptedWorker("prefill-0", Role.PREFILL)
    worker = ScriptedWorker("verify-0", Role.VERIFY)
    worker.on = lambda c: (lease_for(worker, c.request, 0), *whole(c.request)) if isinstance(c, Reserve) else ()
    async with stage(router_settings(), worker, prefill) as it:
        done = await it.client.generate(LONG, max_tokens=3)
        assert done.summary.output_tokens == 3
        assert not prefill.commands
        timing = done.summary.timing
        assert timing.prefill_s == 0.0
        parts = timing.queue_s + timing.prefill_s + timing.transfer_s + timing.first_decode_s
        assert parts == pytest.approx(timing.ttft_s)


async def test_streamed_text_is_the_text_of_the_whole_answer() -> None:
    async with stage(router_settings(), verify()) as it:
        for options in ({}, {"stop": ("zq",)}):
            whole_answer = await it.client.generate(SHORT, max_tokens=40, seed=1, **options)
            chunks = [chunk async for chunk in it.client.stream(SHORT, max_tokens=40, seed=1, **options)]
            assert "".join(chunk.text for chunk in chunks) == whole_answer.text
            assert tuple(token for chunk in chunks for token in chunk.tokens) == whole_answer.tokens
            assert [chunk.summary is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


async def test_one_command_and_one_stream_serve_everything() -> None:
    worker = verify()
    async with stage(router_settings(), worker) as it:
        await asyncio.gather(*(it.client.generate([5, index], max_tokens=10) for index in range(20)))
        assert worker.streams == 1
        assert worker.count(Submit) == len(worker.commands) == 20


async def test_a_step_is_one_message_to_a_client_that_keeps_up() -> None:
    worker = verify(on=silent)
    async with stage(router_settings(), worker) as it:
        stream = it.client.stream(SHORT, max_tokens=20)
        first = asyncio.ensure_future(anext(stream))
        request = (await worker.heard(Submit)).request
        for at in range(0, 20, 2):
            worker.say(step(request, 2, at, end=at == 18, drafted=3, accepted=1))
            chunk = await (first if at == 0 else anext(stream))
            assert chunk.tokens == expected_tokens(request, 2, at)
        assert chunk.summary is not None
        speculation = chunk.summary.speculation
        assert (speculation.verify_steps, speculation.drafted_tokens, speculation.accepted_tokens) == (10, 30, 10)
        assert len(worker.commands) == 1


async def test_a_slow_reader_gets_fewer_and_larger_chunks() -> None:
    worker = verify(on=silent)
    async with stage(router_settings(), worker) as it:
        stream = it.client.stream(SHORT, max_tokens=300)
        first = asyncio.ensure_future(anext(stream))
        request = (await worker.heard(Submit)).request
        worker.say(step(request))
        await first
        worker.say(*(step(request, 1, at, end=at == 299) for at in range(1, 300)))  # all in one report
        rest = [chunk async for chunk in stream]
        assert sum(len(chunk.tokens) for chunk in rest) == 299
        assert len(rest) < 10, "tokens that were there together came together"
        assert tuple(t for chunk in rest for t in chunk.tokens) == expected_tokens(request, 299, 1)


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reason", [Refusal.NO_BLOCKS, Refusal.QUEUE_FULL, Refusal.DRAINING, Refusal.WRONG_ROLE])
async def test_a_refusal_is_tried_elsewhere_and_is_no_failure(reason: Refusal) -> None:
    full, free = verify("verify-0", refusing(reason)), verify("verify-1")
    free.load = WorkerLoad(kv_blocks_total=100, running_requests=9)  # so that the full one is asked first
    async with stage(router_settings(router={"max_retries": 0}), full, free) as it:
        done = await it.client.generate(SHORT, max_tokens=3)
        assert done.summary.route.verify_worker == "verify-1@1"
        assert done.summary.route.retries == 0
        assert full.count(Submit) == 1


async def test_every_worker_full_is_overloaded_after_a_while() -> None:
    workers = [verify(f"verify-{index}", refusing(Refusal.NO_BLOCKS)) for index in range(2)]
    async with stage(router_settings(deadlines={"reserve_s": 0.5}), *workers) as it:
        with pytest.raises(Overloaded, match=r"every worker is full \(no_blocks\); try again"):
            await it.client.generate(SHORT, max_tokens=3)
        asked = sum(worker.count(Submit) for worker in workers)
        assert 4 <= asked <= 30, f"{asked} refusals: pauses must grow"


async def test_a_worker_that_was_full_is_asked_again() -> None:
    worker = verify(on=refusing(Refusal.NO_BLOCKS))
    async with stage(router_settings(), worker) as it:
        task = asyncio.create_task(it.client.generate(SHORT, max_tokens=3))
        await worker.heard(Submit, 2)
        worker.on = obliging_verify(worker)
        assert (await task).summary.output_tokens == 3


async def test_a_full_prefill_worker_means_prefill_in_place() -> None:
    worker, prefill = verify(), ScriptedWorker("prefill-0", Role.PREFILL, refusing(Refusal.QUEUE_FULL))
    async with stage(router_settings(), worker, prefill) as it:
        done = await it.client.generate(LONG, max_tokens=3)
        assert done.summary.route.prefill_worker == ""
        assert done.summary.route.split_reason == "no_prefill_workers"
        assert it.count(metrics.DECISIONS, policy="split", reason="no_prefill_workers") == 1
        await worker.heard(Cancel)  # the lease of the first try
        assert [type(each) for each in worker.commands] == [Reserve, Cancel, Submit]


async def test_too_long_for_any_pool_is_the_requests_own_fault() -> None:
    async with stage(router_settings(), verify(on=refusing(Refusal.TOO_LONG))) as it:
        with pytest.raises(InvalidRequest, match="do not fit a worker's KV pool"):
            await it.client.generate(SHORT, max_tokens=3)


# --- placement --------------------------------------------------------------------------------------------------


async def test_requests_spread_before_any_load_is_reported() -> None:
    workers = [verify(f"verify-{index}", silent) for index in range(3)]
    async with stage(router_settings(), *workers) as it:
        tasks = [asyncio.create_task(it.client.generate(SHORT, max_tokens=1)) for _ in range(9)]
        await it.until(lambda: sum(worker.count(Submit) for worker in workers) == 9)
        assert [worker.count(Submit) for worker in workers] == [3, 3, 3]
        for worker in workers:
            for command in list(worker.commands):
                assert isinstance(command, Submit)
                worker.say(*whole(command.request))
        await asyncio.gather(*tasks)


async def test_a_finished_prefill_is_no_load_any_more() -> None:
    worker = verify()
    prefill = ScriptedWorker("prefill-0", Role.PREFILL, silent)
    async with stage(router_settings(), worker, prefill) as it:
        task = asyncio.create_task(it.client.generate(LONG, max_tokens=1))
        request = (await prefill.heard(Prefill)).request

        def seen() -> tuple[int, int]:
            (found,) = it.router._pools.snapshot().of(Role.PREFILL)
            return found.inflight_requests, found.inflight_tokens

        assert seen() == (1, 99)
        prefill.say(Prefilled(request.id, 0.0, 0.0))
        await it.until(lambda: seen() == (0, 0))
        worker.say(*whole(request))
        await task


async def test_workers_come_and_go() -> None:
    one, other = verify("verify-0"), verify("verify-1")
    async with stage(router_settings(deadlines={"reserve_s": 2.0}), one) as it:
        member = await other.start()
        await it.router.set_members([member])
        await it.until(lambda: one.streams == 0)
        done = await it.client.generate(SHORT, max_tokens=2)  # waits until the newcomer is connected
        assert done.summary.route.verify_worker == "verify-1@1"
        one.accepting = other.accepting = False
        other.say()
        await it.until(lambda: not it.router._pools.snapshot().workers)
        await it.router.set_members([one.member])
        await other.stop()
