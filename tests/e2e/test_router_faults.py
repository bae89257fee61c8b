"""The router against scripted workers that fail, and clients that leave: at every stage of a request's life."""

import asyncio
import time
from collections.abc import Callable, Iterable

import pytest

from tests.support.local import local_cluster, settings_for
from tests.support.scripted_worker import (
    ScriptedWorker,
    expected_tokens,
    lease_for,
    obliging_prefill,
    obliging_verify,
    router_settings,
    step,
    whole,
)
from tests.support.stage import LONG, SHORT, Stage, silent, stage, verify
from tidemill import AsyncClient, DeadlineExceeded, Unavailable
from tidemill.core import metrics
from tidemill.core.messages import Cancel, Command, Event, Failed, Failure, Prefill, Prefilled, Proceed, Reserve, Submit
from tidemill.core.model import Request, Role, WorkerLoad
from tidemill.core.settings import EmulatedSettings, LatencySettings
from tidemill.types import TokenLogprobs

# --- failures: the request goes on elsewhere --------------------------------------------------------------------


async def resumed_on_the_other(it: Stage, break_it: Callable[[ScriptedWorker, Request], object]) -> None:
    """Three tokens from one worker, which then fails; the other goes on from exactly there."""
    one, other = it.workers
    one.on = other.on = silent
    stream = it.client.stream(SHORT, max_tokens=6)
    first = asyncio.ensure_future(anext(stream))
    await it.until(lambda: bool(one.commands or other.commands))
    if other.commands:
        one, other = other, one
    request = (await one.heard(Submit)).request
    one.say(step(request), step(request, 2, 1))
    chunks = [await first]
    while sum(len(chunk.tokens) for chunk in chunks) < 3:
        chunks.append(await anext(stream))
    outcome = break_it(one, request)
    if asyncio.iscoroutine(outcome):
        await outcome
    again = (await other.heard(Submit)).request
    assert again.output == expected_tokens(request, 3)
    assert again.id != request.id, "late words about the first try must not be taken for the second's"
    other.say(*whole(again))
    chunks += [chunk async for chunk in stream]
    assert tuple(t for chunk in chunks for t in chunk.tokens) == expected_tokens(request, 6)
    summary = chunks[-1].summary
    assert summary is not None
    assert summary.route.retries == 1
    assert summary.route.verify_worker == str(other.id)
    assert summary.output_tokens == 6


@pytest.mark.parametrize("failure", list(Failure))
async def test_a_failed_event_moves_the_request(failure: Failure) -> None:
    async with stage(router_settings(), verify("verify-0"), verify("verify-1")) as it:
        await resumed_on_the_other(it, lambda worker, request: worker.say(Failed(request.id, failure, "scripted")))
        assert it.count(metrics.RETRIES, failure=str(failure)) == 1


async def test_a_killed_worker_moves_the_request() -> None:
    async with stage(router_settings(), verify("verify-0"), verify("verify-1")) as it:
        await resumed_on_the_other(it, lambda worker, _: worker.stop())


async def test_a_lost_worker_is_shown_without_the_load_it_had() -> None:
    async with stage(router_settings(), verify("verify-0"), verify("verify-1")) as it:
        one = it.workers[0]

        def shown() -> tuple[object, object]:
            each = next(each for each in it.router.describe()["workers"] if each["worker"] == str(one.id))  # type: ignore[attr-defined]
            return each["state"], each["kv_blocks_used"]

        one.load = WorkerLoad(kv_blocks_total=100, kv_blocks_used=7)
        await it.until(lambda: shown() == ("serving", 7))
        await one.stop()
        await it.until(lambda: shown() == ("unreachable", 0))


async def test_a_broken_stream_moves_the_request_and_is_opened_again() -> None:
    async with stage(router_settings(), verify("verify-0"), verify("verify-1")) as it:
        await resumed_on_the_other(it, lambda worker, _: worker.break_streams())
        await it.until(lambda: len(it.router._pools.snapshot().workers) == 2)


async def test_a_worker_that_goes_silent_is_left_and_not_chosen() -> None:
    settings = router_settings(deadlines={"token_s": 0.4})
    async with stage(settings, verify("verify-0"), verify("verify-1")) as it:
        await resumed_on_the_other(it, lambda worker, _: setattr(worker, "silent", True))
        quiet = next(worker for worker in it.workers if worker.silent)
        await it.until(lambda: len(it.router._pools.snapshot().workers) == 1)
        before = quiet.count(Submit)
        for worker in it.workers:
            worker.on = obliging_verify(worker)
        await asyncio.gather(*(it.client.generate(SHORT, max_tokens=2) for _ in range(6)))
        assert quiet.count(Submit) == before
        await quiet.heard(Cancel)  # it hears of it when it wakes


async def test_a_worker_that_stands_still_is_left_long_before_a_token_is_overdue() -> None:
    settings = router_settings(deadlines={"stall_s": 0.5})
    async with stage(settings, verify("verify-0"), verify("verify-1")) as it:
        started = time.monotonic()
        await resumed_on_the_other(it, lambda worker, _: setattr(worker, "silent", True))
        assert time.monotonic() - started < settings.deadlines.token_s / 10
        await it.until(lambda: len(it.router._pools.snapshot().workers) == 1)
        next(worker for worker in it.workers if worker.silent).silent = False
        await it.until(lambda: len(it.router._pools.snapshot().workers) == 2)


async def test_a_role_change_moves_the_request() -> None:
    async with stage(router_settings(), verify("verify-0"), verify("verify-1")) as it:
        await resumed_on_the_other(it, lambda worker, _: worker.become(Role.PREFILL, 2))
        roles = {each["worker"]: each["role"] for each in it.router.describe()["workers"]}  # type: ignore[attr-defined]
        assert "prefill" in roles.values()
        changed = next(worker for worker in it.workers if worker.role is Role.PREFILL)
        assert str(changed.id) in roles


async def test_a_worker_that_leaves_the_pool_moves_its_requests() -> None:
    async with stage(router_settings(), verify("verify-0"), verify("verify-1")) as it:

        async def leave(worker: ScriptedWorker, _: Request) -> None:
            await it.router.set_members([each.member for each in it.workers if each is not worker])

        await resumed_on_the_other(it, leave)


@pytest.mark.parametrize("when", ["reserving", "prefilling", "transferring"])
async def test_a_failure_before_the_first_token_starts_over_elsewhere(when: str) -> None:
    one, other = verify("verify-0"), verify("verify-1")
    other.load = WorkerLoad(kv_blocks_total=100, running_requests=9)  # `one` is asked first
    prefill = ScriptedWorker("prefill-0", Role.PREFILL, silent)
    if when == "reserving":
        one.on = silent
    settings = router_settings(deadlines={"reserve_s": 0.3, "prefill_s": 0.3, "transfer_s": 0.3, "lease_s": 1.0})
    async with stage(settings, one, other, prefill) as it:
        task = asyncio.create_task(it.client.generate(LONG, max_tokens=3))
        reserve = await one.heard(Reserve)
        if when == "transferring":
            prefill.say(Prefilled((await prefill.heard(Prefill)).request.id, 0.0, 0.0))
        if when == "reserving":
            prefill.on = obliging_prefill(other)
        done = await task
        assert done.tokens == expected_tokens(reserve.request, 3)
        assert done.summary.route.retries == 1
        assert (await one.heard(Cancel)).request_id == reserve.request.id, "the lease is given back"
        if when == "reserving":
            assert done.summary.route.verify_worker == "verify-1@1"
        else:  # the prefill worker is the one to be avoided
            assert (await prefill.heard(Cancel)).request_id == reserve.request.id
            assert done.summary.route.prefill_worker == ""


async def test_a_verify_worker_that_kv_does_not_reach_is_not_preferred_for_a_while() -> None:
    one, other = verify("verify-0"), verify("verify-1")
    other.load = WorkerLoad(kv_blocks_total=100, running_requests=9)  # `one` is asked first
    prefill = ScriptedWorker("prefill-0", Role.PREFILL, silent)
    async with stage(router_settings(), one, other, prefill) as it:
        assert (await it.client.generate(SHORT, max_tokens=3)).summary.route.verify_worker == str(one.id)
        task = asyncio.create_task(it.client.generate(LONG, max_tokens=3))
        request = (await prefill.heard(Prefill)).request
        prefill.say(Failed(request.id, Failure.KV_LINK, "scripted"))
        await one.heard(Proceed)
        one.say(*whole(request))
        assert (await task).tokens == expected_tokens(request, 3), "it stays where its lease is"
        assert (await it.client.generate(SHORT, max_tokens=3)).summary.route.verify_worker == str(other.id)


async def test_the_only_verify_worker_gets_another_chance() -> None:
    worker = verify(on=silent)
    async with stage(router_settings(), worker) as it:
        task = asyncio.create_task(it.client.generate(SHORT, max_tokens=3))
        first = (await worker.heard(Submit)).request
        worker.say(step(first), Failed(first.id, Failure.ENGINE, "scripted"))
        second = (await worker.heard(Submit, 2)).request
        worker.say(step(first, 1, 1))  # a late word of the first try
        worker.say(*whole(second))
        assert (await task).tokens == expected_tokens(first, 3), "nothing twice, nothing missing"


async def test_a_restarted_worker_takes_what_its_former_self_lost() -> None:
    worker = verify(on=silent)
    async with stage(router_settings(), worker) as it:
        task = asyncio.create_task(it.client.generate(SHORT, max_tokens=3))
        first = (await worker.heard(Submit)).request
        await worker.stop()
        worker.become(Role.VERIFY, 2)
        worker.on = obliging_verify(worker)
        await worker.start()
        done = await task
        assert done.tokens == expected_tokens(first, 3)
        assert done.summary.route.verify_worker == "verify-0@2"


async def test_failing_too_often_is_unavailable() -> None:
    def fail(command: Command) -> Iterable[Event]:
        return () if isinstance(command, Cancel) else (Failed(command.request.id, Failure.ENGINE, "scripted"),)

    workers = [verify(f"verify-{index}", fail) for index in range(3)]
    async with stage(router_settings(router={"max_retries": 1}), *workers) as it:
        with pytest.raises(Unavailable, match=r"2 workers in turn failed the request; the last: .*engine: scripted"):
            await it.client.generate(SHORT, max_tokens=3)
        assert sum(worker.count(Submit) for worker in workers) == 2
        assert it.count(metrics.REQUESTS, outcome="unavailable") == 1


async def test_a_prefill_worker_that_changes_its_role_before_its_turn_comes_has_failed_nobody() -> None:
    """It was chosen, but the lease took its time; with every retry spent on such, requests would be lost in a wave."""
    worker, prefill = verify("verify-0", silent), ScriptedWorker("prefill-0", Role.PREFILL, silent)
    async with stage(router_settings(router={"max_retries": 0}), worker, prefill) as it:
        task = asyncio.create_task(it.client.generate(LONG, max_tokens=3))
        request = (await worker.heard(Reserve)).request
        prefill.become(Role.VERIFY, 2)
        prefill.say()
        await it.until(lambda: "prefill-0@2" in str(it.router.describe()))
        worker.on, prefill.on = obliging_verify(worker), obliging_verify(prefill)
        worker.say(lease_for(worker, request))
        done = await task
        assert done.summary.output_tokens == 3
        assert it.count(metrics.RETRIES, failure="role_changed") == 1


async def test_a_finished_answer_survives_the_death_of_its_worker() -> None:
    worker = verify()
    async with stage(router_settings(router={"max_retries": 0}), worker) as it:

        def last_words(command: Command) -> Iterable[Event]:
            assert isinstance(command, Submit)
            return (*whole(command.request), Failed(command.request.id, Failure.STOPPING, "scripted"))

        worker.on = last_words
        assert (await it.client.generate(SHORT, max_tokens=3)).summary.output_tokens == 3


# --- leaving ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["queued", "reserving", "prefilling", "transferring", "decoding"])
@pytest.mark.parametrize("how", ["cancelled", "deadline"])
async def test_whoever_leaves_is_released_everywhere_at_once(state: str, how: str) -> None:
    worker, prefill = verify(), ScriptedWorker("prefill-0", Role.PREFILL, silent)
    if state == "reserving":
        worker.on = silent
    settings = router_settings(router={"max_active": 1, "max_queued": 4})
    async with stage(settings, worker, prefill) as it:
        holder = None
        if state == "queued":
            worker.on = silent
            holder = asyncio.create_task(it.client.generate(SHORT, max_tokens=2))
            await worker.heard(Submit)
        stream = it.client.stream(LONG, max_tokens=9, timeout=1.0 if how == "deadline" else None)
        first = asyncio.ensure_future(anext(stream))
        holding: list[ScriptedWorker] = []
        if state == "queued":
            await it.until(lambda: it.router.describe()["queued"] == 1)
        else:
            request = (await worker.heard(Reserve)).request
            holding.append(worker)
        if state in {"prefilling", "transferring", "decoding"}:
            await prefill.heard(Prefill)
            holding.append(prefill)
        if state in {"transferring", "decoding"}:
            prefill.say(Prefilled(request.id, 0.0, 0.0))
        if state == "decoding":
            worker.say(step(request))
            await first
            holding.remove(prefill)  # its part is done
            first = asyncio.ensure_future(anext(stream))
        if how == "cancelled":
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
        else:
            with pytest.raises(DeadlineExceeded):
                await first
        for each in holding:
            assert (await each.heard(Cancel)).request_id == request.id
        if holder is not None:
            request = (await worker.heard(Submit)).request
            assert not worker.count(Reserve), "it never left the queue"
            worker.say(*whole(request))
            await holder
        outcome = "cancelled" if how == "cancelled" else "deadline_exceeded"
        await it.until(lambda: it.count(metrics.REQUESTS, outcome=outcome) == 1)
        await it.until(lambda: it.count(metrics.CANCEL_TO_RELEASE) == len(holding))
        worker.on, prefill.on = obliging_verify(worker), obliging_prefill(worker)
        assert (await it.client.generate(SHORT, max_tokens=2)).summary.output_tokens == 2  # serves on


async def test_a_client_that_reads_nothing_is_released_when_it_leaves() -> None:
    """Its handler is held in a write then, not in a wait for tokens."""
    worker = verify(on=silent)
    async with stage(router_settings(), worker) as it:
        stream = it.client.stream(SHORT, max_tokens=2000, logprobs=20)
        first = asyncio.ensure_future(anext(stream))
        request = (await worker.heard(Submit)).request
        top = tuple((token, -1.0) for token in range(20))
        for at in range(1000):
            worker.say(step(request, 1, at, logprobs=(TokenLogprobs(5, -1.0, top),)))
        await first
        await asyncio.sleep(0.3)
        await stream.aclose()  # type: ignore[attr-defined]
        assert (await worker.heard(Cancel)).request_id == request.id


async def test_requests_without_a_deadline_have_the_routers() -> None:
    worker = verify(on=silent)
    async with stage(router_settings(router={"default_deadline_s": 0.3}), worker) as it:
        async with AsyncClient(it.router.address, retries=0, timeout=None) as patient:
            with pytest.raises(DeadlineExceeded, match="the deadline passed after 0 tokens"):
                await patient.generate(SHORT, max_tokens=3)
        await worker.heard(Cancel)


async def test_the_default_deadline_holds_in_the_queue_too() -> None:
    worker = verify(on=silent)
    async with stage(router_settings(router={"default_deadline_s": 0.4, "max_active": 1}), worker) as it:
        holder = asyncio.create_task(it.client.generate(SHORT, max_tokens=2, timeout=5.0))
        await worker.heard(Submit)
        async with AsyncClient(it.router.address, retries=0, timeout=None) as patient:
            with pytest.raises(DeadlineExceeded, match="in state queued"):
                await patient.generate(SHORT, max_tokens=3)
        worker.say(*whole((await worker.heard(Submit)).request))
        assert (await holder).summary.output_tokens == 2, "its own deadline is longer than the default, and holds"


async def test_a_worker_in_a_long_step_does_not_stand_still() -> None:
    """Its engine is not heard of for longer than the stall limit; the worker is."""
    slow = EmulatedSettings(target=LatencySettings(step_s=3.0))
    settings = settings_for("emulated", speculation=False, deadlines={"stall_s": 2.0}, emulated=slow)
    async with local_cluster(settings, (Role.VERIFY, Role.VERIFY)) as cluster, AsyncClient(cluster.address) as client:
        answer = await client.generate(SHORT, max_tokens=2)
        assert answer.summary.route.retries == 0
