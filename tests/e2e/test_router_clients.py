"""Both clients against a router and a scripted worker: every method, leaving, retries, restarts."""

import asyncio
import inspect
from collections.abc import AsyncIterator

import pytest

from router.server import RouterServer
from tests.support.scripted_worker import ScriptedWorker, expected_tokens, obliging_verify, router_settings, step, whole
from tests.support.stage import started
from tidemill import AsyncClient, Client, Message, Overloaded, SamplingParams, Unavailable
from tidemill.core import metrics
from tidemill.core.messages import Cancel, Submit
from tidemill.core.model import Role


@pytest.fixture
async def worker() -> AsyncIterator[ScriptedWorker]:
    worker = ScriptedWorker("verify-0", Role.VERIFY)
    worker.on = obliging_verify(worker)
    await worker.start()
    yield worker
    await worker.stop()


@pytest.fixture
async def router(worker: ScriptedWorker) -> AsyncIterator[RouterServer]:
    router = await started(router_settings(), worker)
    yield router
    assert not router._servicer._active
    await router.stop(0.0)


def test_both_clients_have_the_same_methods_and_arguments() -> None:
    def surface(of: type) -> dict[str, list[str]]:
        public = {name: each for name, each in vars(of).items() if not name.startswith("_")}
        return {name: list(inspect.signature(each).parameters) for name, each in public.items()}

    assert surface(Client) == surface(AsyncClient)
    assert list(inspect.signature(Client).parameters) == list(inspect.signature(AsyncClient).parameters)


async def test_every_method_of_the_blocking_client(router: RouterServer, worker: ScriptedWorker) -> None:
    def use() -> None:
        with Client(router.address, retries=0) as client:
            done = client.generate("x", SamplingParams(max_tokens=7), seed=3)
            chunks = list(client.stream("x", max_tokens=7, seed=3))
            assert tuple(token for chunk in chunks for token in chunk.tokens) == done.tokens
            assert "".join(chunk.text for chunk in chunks) == done.text
            assert chunks[-1].summary is not None
            chat = [Message("system", "be brief"), Message("user", "hello")]
            said = client.chat(chat, max_tokens=3)
            assert "".join(chunk.text for chunk in client.stream_chat(chat, max_tokens=3)) == said.text
            ids = client.tokenize("def f():")
            assert client.generate(ids, max_tokens=2).tokens == client.generate("def f():", max_tokens=2).tokens
            (card,) = client.models()
            assert (card.name, card.context_length, card.vocab_size, card.has_chat_template) == (
                "tiny",
                2048,
                4096,
                True,
            )

    await asyncio.to_thread(use)


async def test_the_async_client_says_the_same(router: RouterServer) -> None:
    async with AsyncClient(router.address, retries=0) as client:
        chat = [Message("user", "hello")]
        said = await client.chat(chat, max_tokens=3)
        assert "".join([chunk.text async for chunk in client.stream_chat(chat, max_tokens=3)]) == said.text
        assert [card.name for card in await client.models()] == ["tiny"]


@pytest.mark.parametrize("how", ["break", "close"])
async def test_leaving_a_blocking_stream_cancels_it(router: RouterServer, worker: ScriptedWorker, how: str) -> None:
    worker.on = lambda c: [step(c.request)] if isinstance(c, Submit) else ()  # and never more

    def use() -> None:
        with Client(router.address, retries=0) as client:
            stream = client.stream("x", max_tokens=50)
            for _ in stream:
                break
            if how == "close":
                stream.close()  # type: ignore[attr-defined]
            del stream

    await asyncio.to_thread(use)
    assert (await worker.heard(Cancel)).request_id == (await worker.heard(Submit)).request.id
    worker.on = obliging_verify(worker)


async def test_retries_with_growing_pauses_until_there_is_room(worker: ScriptedWorker) -> None:
    router = await started(router_settings(router={"max_active": 1, "max_queued": 0}), worker)
    worker.on = lambda c: ()
    async with AsyncClient(router.address, retries=0) as hasty, AsyncClient(router.address, retries=8) as patient:
        first = asyncio.create_task(hasty.generate("x", max_tokens=2))
        request = (await worker.heard(Submit)).request
        with pytest.raises(Overloaded):
            await hasty.generate("y", max_tokens=2)
        second = asyncio.create_task(patient.generate("y", max_tokens=2))
        await asyncio.sleep(0.3)
        worker.on = obliging_verify(worker)
        worker.say(*whole(request))
        assert (await first).tokens == expected_tokens(request, 2)
        assert (await second).summary.output_tokens == 2
        assert router.metrics.value(metrics.REQUESTS, outcome="overloaded") >= 2
    await router.stop(0.0)


async def test_a_request_waits_out_a_restart_of_the_router(worker: ScriptedWorker) -> None:
    router = await started(router_settings(), worker)
    port = int(router.address.rpartition(":")[2])
    async with AsyncClient(router.address, retries=10) as client:
        await client.generate("x", max_tokens=2)
        await router.stop(0.0)
        task = asyncio.create_task(client.generate("x", max_tokens=2))
        await asyncio.sleep(0.2)
        router = await started(router_settings(router={"port": port}), worker)
        assert (await task).summary.output_tokens == 2
    await router.stop(0.0)


async def test_a_stream_waits_out_a_restart_and_goes_on_after_its_tokens(worker: ScriptedWorker) -> None:
    router = await started(router_settings(), worker)
    port = int(router.address.rpartition(":")[2])
    worker.on = lambda c: [step(c.request)] if isinstance(c, Submit) else ()
    async with AsyncClient(router.address, retries=10) as client:
        stream = aiter(client.stream("x", max_tokens=9))
        first = await anext(stream)
        await router.stop(0.0)
        worker.on = obliging_verify(worker)
        router = await started(router_settings(router={"port": port}), worker)
        rest = [chunk async for chunk in stream]
    sent = (await worker.heard(Submit)).request
    assert (await worker.heard(Submit, 2)).request.output == first.tokens
    assert tuple(token for chunk in [first, *rest] for token in chunk.tokens) == expected_tokens(sent, 9)
    assert rest[-1].summary is not None
    assert rest[-1].summary.output_tokens == 9
    await router.stop(0.0)


async def test_a_stream_whose_router_stays_away_ends_with_a_typed_error(worker: ScriptedWorker) -> None:
    router = await started(router_settings(), worker)
    worker.on = lambda c: [step(c.request)] if isinstance(c, Submit) else ()
    async with AsyncClient(router.address, retries=2) as client:
        stream = aiter(client.stream("x", max_tokens=50))
        await anext(stream)
        await router.stop(0.0)
        with pytest.raises(Unavailable):
            await anext(stream)
    assert worker.count(Submit) == 1


async def test_stopping_gives_running_requests_their_grace(worker: ScriptedWorker) -> None:
    router = await started(router_settings(), worker)
    worker.on = lambda c: ()
    async with AsyncClient(router.address, retries=0) as client:
        running = asyncio.create_task(client.generate("x", max_tokens=3))
        request = (await worker.heard(Submit)).request
        stopping = asyncio.create_task(router.stop(5.0))
        await asyncio.sleep(0.1)
        with pytest.raises(Unavailable):
            await client.generate("y", max_tokens=3)
        worker.say(*whole(request))
        assert (await running).tokens == expected_tokens(request, 3)
        await asyncio.wait_for(stopping, 3.0)
