"""Clients that know two routers: what came before one was lost is not asked for again, and the rest is the same."""

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterable

import pytest

from router.server import RouterServer
from tests.support.local import RouterProcess
from tests.support.scripted_worker import ScriptedWorker, expected_tokens, obliging_verify, router_settings, step, whole
from tests.support.stage import silent, started
from tidemill import AsyncClient, Client, InvalidRequest, TokenLogprobs, Unavailable
from tidemill.core.messages import Command, Event, Submit
from tidemill.core.model import Role
from tidemill.proto import inference_pb2 as pb


@pytest.fixture
async def worker() -> AsyncIterator[ScriptedWorker]:
    worker = ScriptedWorker("verify-0", Role.VERIFY)
    await worker.start()
    yield worker
    await worker.stop()


def begins(count: int) -> Callable[[Command], Iterable[Event]]:
    """Some tokens of a fresh request, and then nothing; all the rest of one that goes on."""

    def on(command: Command) -> Iterable[Event]:
        if not isinstance(command, Submit):
            return ()
        request = command.request
        if request.output:
            return [
                step(request, 1, at, end=at == 19, logprobs=(TokenLogprobs(at, -float(at)),))
                for at in range(len(request.output), 20)
            ]
        return [step(request, 1, at, logprobs=(TokenLogprobs(at, -float(at)),)) for at in range(count)]

    return on


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_stream_goes_on_at_the_other_router(worker: ScriptedWorker, how: signal.Signals) -> None:
    """Killed, its streams break; stopped, its pings stay unanswered for the stall limit."""
    worker.on = begins(5)
    first = RouterProcess(router_settings(), [worker.member])
    other = await started(router_settings(), worker)
    try:
        async with AsyncClient([await first.address(), other.address], stall=1.0, timeout=20.0) as client:
            client._routers._next = 0
            chunks = []
            async for chunk in client.stream("def f(", max_tokens=20, temperature=1.0, logprobs=0):
                chunks.append(chunk)
                if sum(len(each.tokens) for each in chunks) == 5:
                    lost_at = time.monotonic()
                    first.signal(how)
            took = time.monotonic() - lost_at
        begun, resumed = (await worker.heard(Submit)).request, (await worker.heard(Submit, 2)).request
        assert resumed.output == expected_tokens(begun, 5)
        assert resumed.sampling == begun.sampling, "the seed too, though nobody gave one"
        assert resumed.id != begun.id
        assert tuple(token for each in chunks for token in each.tokens) == expected_tokens(begun, 20)
        assert [each.token for chunk in chunks for each in chunk.logprobs] == list(range(20))
        assert chunks[-1].summary is not None
        assert chunks[-1].summary.output_tokens == 20
        assert took < (1.0 if how is signal.SIGKILL else 3.0)
    finally:
        first.end()
        await other.stop(0.0)


async def test_a_blocking_client_and_unary_calls_go_to_the_other_too(worker: ScriptedWorker) -> None:
    one, other = await started(router_settings(), worker), await started(router_settings(), worker)
    where = f"{one.address},{other.address}"
    worker.on = silent

    def use() -> tuple[int, ...]:
        with Client(where) as client:
            client._routers._next = 0
            return client.generate("x", max_tokens=4).tokens

    answer = asyncio.create_task(asyncio.to_thread(use))
    begun = (await worker.heard(Submit)).request
    worker.on = obliging_verify(worker)
    await one.stop(0.0)
    assert await answer == expected_tokens(begun, 4)
    assert worker.streams == 1, "the first router's stream ended, and with it what its request held"
    await other.stop(0.0)


async def test_a_router_without_workers_is_passed_over(worker: ScriptedWorker) -> None:
    worker.on = obliging_verify(worker)
    empty, other = (
        await started(router_settings(deadlines={"reserve_s": 0.2})),
        await started(router_settings(), worker),
    )
    async with AsyncClient([empty.address, other.address]) as client:
        client._routers._next = 0
        await client.generate("x", max_tokens=2)
        began = time.monotonic()
        for _ in range(20):
            await client.generate("x", max_tokens=2)
        assert time.monotonic() - began < 2.0, "it is not asked again and again"
        assert await client.health()
    await empty.stop(0.0)
    await other.stop(0.0)


async def test_with_no_router_left_the_error_is_typed_and_in_time() -> None:
    async with AsyncClient("127.0.0.1:1,127.0.0.1:2", timeout=1.0, retries=50) as client:
        began = time.monotonic()
        with pytest.raises(Unavailable):
            await client.generate("x")
        assert time.monotonic() - began < 1.5
        assert not await client.health()


async def test_two_routers_share_the_workers_evenly(worker: ScriptedWorker) -> None:
    """Each sees the other's requests in what the workers report."""
    second = ScriptedWorker("verify-1", Role.VERIFY)
    await second.start()
    held: dict[str, int] = {"verify-0": 0, "verify-1": 0}

    def holding(at: ScriptedWorker) -> Callable[[Command], Iterable[Event]]:
        def on(command: Command) -> Iterable[Event]:
            if isinstance(command, Submit):
                held[at.id.name] += 1
                at.load = type(at.load)(kv_blocks_total=100, running_requests=held[at.id.name])
                at.say()
            return ()

        return on

    worker.on, second.on = holding(worker), holding(second)
    routers = [await started(router_settings(), worker, second) for _ in range(2)]
    async with AsyncClient([each.address for each in routers], retries=0) as client:
        calls = []
        for _ in range(20):
            calls.append(asyncio.create_task(client.generate("x", max_tokens=2)))
            await asyncio.sleep(0.02)
        while sum(held.values()) < 20:  # noqa: ASYNC110 - tests poll
            await asyncio.sleep(0.01)
        assert abs(held["verify-0"] - held["verify-1"]) <= 2, held
        for at in (worker, second):
            at.say(*[event for each in at.commands if isinstance(each, Submit) for event in whole(each.request)])
        await asyncio.gather(*calls)
    for router in routers:
        await router.stop(0.0)
    await second.stop()


async def test_tokens_received_are_checked(worker: ScriptedWorker) -> None:
    worker.on = obliging_verify(worker)
    router = await started(router_settings(), worker)

    async def refusal(router: RouterServer, received: list[int], **sampling: float) -> str:
        async with AsyncClient(router.address) as client:
            request = pb.GenerateRequest(text="x", received=received, sampling=pb.SamplingParams(**sampling))  # type: ignore[arg-type]
            with pytest.raises(InvalidRequest) as caught:
                await client._unary("Generate", request, None)
            return str(caught.value)

    assert "it is complete" in await refusal(router, [5, 6], max_tokens=2)
    assert "outside the vocabulary" in await refusal(router, [10**6], max_tokens=2)
    assert "send the seed too" in await refusal(router, [5], temperature=1.0)
    await router.stop(0.0)
