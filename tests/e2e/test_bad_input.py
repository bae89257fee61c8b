"""Whatever a careless or hostile client sends: the right status, a sentence that helps, and the cluster serves on."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from tests.support.local import LocalCluster, local_cluster, settings_for
from tidemill import (
    AsyncClient,
    DeadlineExceeded,
    InvalidRequest,
    Message,
    MessageTooLarge,
    ModelNotFound,
    Overloaded,
    SamplingParams,
    TidemillError,
    Unavailable,
)
from tidemill.core.model import Role
from tidemill.proto import inference_pb2 as pb

LONG = "x = compute_something(argument)\n" * 12


@pytest.fixture
async def cluster() -> AsyncIterator[LocalCluster]:
    async with local_cluster(settings_for(router={"max_message_bytes": 100_000})) as cluster:
        yield cluster
        async with AsyncClient(cluster.address) as client:  # it serves on
            assert (await client.generate(LONG, max_tokens=3)).summary.output_tokens == 3


@pytest.fixture
async def client(cluster: LocalCluster) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(cluster.address, retries=0) as client:
        yield client


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature": -1.0}, "temperature is -1.0; expected a number from 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_p": 0.0}, "top_p is 0.0; expected a number above 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"min_p": 2.0}, "min_p is 2.0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty is nan"),
        ({"presence_penalty": 3.0}, "presence_penalty is 3.0; expected a number from -2 to 2"),
        ({"max_tokens": 0}, "max_tokens is 0; expected at least 1"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"logprobs": 50}, "at most 20"),
        ({"stop": ("",)}, "stop must be at most 16 strings"),
        ({"stop_token_ids": (999_999,)}, "below the vocabulary's size"),
        ({"seed": 2**63}, "seed"),
        ({"seed": -1}, "seed"),
        ({"bogus": 1}, "unknown sampling parameter 'bogus'"),
    ],
)
async def test_impossible_sampling_parameters(client: AsyncClient, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequest, match=".*") as caught:
        await client.generate("def f():", **options)
    assert said in str(caught.value)


async def test_empty_prompt(client: AsyncClient) -> None:
    for prompt in ([], ""):
        with pytest.raises(InvalidRequest, match="the prompt is empty; send at least one token"):
            await client.generate(prompt)


async def test_prompt_longer_than_the_context(client: AsyncClient) -> None:
    with pytest.raises(InvalidRequest, match="the prompt has 5000 tokens, which leaves no room in the context of 2048"):
        await client.generate([5] * 5000)


async def test_prompt_that_leaves_room_for_one_token(client: AsyncClient) -> None:
    assert (await client.generate([5] * 2047, max_tokens=10)).summary.output_tokens == 1


async def test_unknown_model(client: AsyncClient) -> None:
    with pytest.raises(ModelNotFound, match="'gpt-9' is not served here; 'tiny' is"):
        await client.generate("x", model="gpt-9")
    with pytest.raises(ModelNotFound):
        await client.tokenize("x", model="gpt-9")


async def test_token_ids_outside_the_vocabulary(client: AsyncClient) -> None:
    with pytest.raises(InvalidRequest, match="token id 4096 is outside the vocabulary of 'tiny', which has 4096"):
        await client.generate([1, 4096])
    with pytest.raises(InvalidRequest, match="token ids from 0 up"):
        await client.generate([-1])
    with pytest.raises(InvalidRequest, match="text, or token ids"):
        await client.generate(["a"])  # type: ignore[list-item]


async def test_huge_max_tokens_ends_with_the_context(client: AsyncClient) -> None:
    done = await client.generate([5] * 2000, max_tokens=2**32 - 1)
    assert (done.summary.output_tokens, done.summary.finish_reason) == (48, "length")


async def test_message_over_the_size_limit(client: AsyncClient) -> None:
    with pytest.raises(MessageTooLarge, match=r"larger than max.*router\.max_message_bytes"):
        await client.generate("x" * 200_000)


async def test_invalid_utf8(cluster: LocalCluster, client: AsyncClient) -> None:
    method = "/tidemill.v1.Inference/Generate"
    async with grpc.aio.insecure_channel(cluster.address) as channel:
        call = channel.unary_unary(method, None, pb.GenerateResponse.FromString)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(b"\x12\x02\xff\xfe")  # field 2, text: two bytes that are no UTF-8
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "valid UTF-8" in (caught.value.details() or "")


async def test_deadline_already_past(client: AsyncClient) -> None:
    with pytest.raises(DeadlineExceeded):
        await client.generate("x", timeout=0.0)
    with pytest.raises(DeadlineExceeded):
        await client.generate("x", timeout=-1.0)


async def test_unknown_chat_role_and_empty_chat(client: AsyncClient) -> None:
    with pytest.raises(InvalidRequest, match="role 'wizard' is unknown"):
        await client.chat([Message("wizard", "hi")])
    with pytest.raises(InvalidRequest, match="messages is empty"):
        await client.chat([])


async def test_unknown_slo_class_and_impossible_ids(client: AsyncClient) -> None:
    with pytest.raises(InvalidRequest, match="slo_class 'gold' is not in the settings; there are default"):
        await client.generate("x", slo="gold")
    with pytest.raises(InvalidRequest, match="at most 128 printable"):
        await client.generate("x", request_id="r" * 200)
    with pytest.raises(InvalidRequest, match="at most 128 printable"):
        await client.generate("x", request_id="a\nb")


async def test_same_id_twice_at_once(client: AsyncClient) -> None:
    stream = client.stream(LONG, max_tokens=2000, request_id="same")
    await anext(stream)
    with pytest.raises(InvalidRequest, match="ids must be unique"):
        await client.generate("x", request_id="same")
    await stream.aclose()  # type: ignore[attr-defined]


async def test_stop_strings_of_absurd_number(client: AsyncClient) -> None:
    with pytest.raises(InvalidRequest, match="stop must be"):
        await client.generate("x", SamplingParams(stop=("a",) * 100))


@pytest.mark.parametrize("moment", ["before the first token", "during prefill", "mid-stream"])
async def test_client_gone(cluster: LocalCluster, client: AsyncClient, moment: str) -> None:
    for _ in range(5):
        stream = client.stream([7] * 1500, max_tokens=400)
        if moment == "mid-stream":
            for _ in range(3):
                await anext(stream)
            await stream.aclose()  # type: ignore[attr-defined]
        else:
            task = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0.0 if moment == "before the first token" else 0.02)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
    await cluster.nothing_held()


async def test_deadline_mid_stream_stops_everything(cluster: LocalCluster, client: AsyncClient) -> None:
    with pytest.raises(DeadlineExceeded):
        async for _ in client.stream([7] * 100, max_tokens=1900, timeout=0.15):
            await asyncio.sleep(0.01)
    await cluster.nothing_held()


async def test_overload_is_typed_and_passes() -> None:
    async with local_cluster(settings_for(router={"max_active": 1, "max_queued": 1})) as cluster:
        async with AsyncClient(cluster.address, retries=0) as client:
            first = client.stream(LONG, max_tokens=1500)
            await anext(first)
            second = asyncio.create_task(client.generate(LONG, max_tokens=2))
            await cluster.settled(lambda: cluster.router.describe()["queued"] == 1)
            with pytest.raises(Overloaded, match="1 requests are being served and 1 wait"):
                await client.generate("x")
            await first.aclose()  # type: ignore[attr-defined]
            assert (await second).summary.output_tokens == 2
        async with AsyncClient(cluster.address, retries=5) as patient:
            hold = client = None
            answers = await asyncio.gather(*(patient.generate("x", max_tokens=2) for _ in range(4)))
            assert all(each.summary.output_tokens == 2 for each in answers), (hold, client)


async def test_a_full_verify_pool_is_waited_for() -> None:
    settings = settings_for(kv_blocks=40)
    async with local_cluster(settings, (Role.PREFILL, Role.VERIFY)) as cluster:
        async with AsyncClient(cluster.address) as client:
            answers = await asyncio.gather(*(client.generate([i + 5] * 300, max_tokens=20) for i in range(6)))
            assert all(each.summary.output_tokens == 20 for each in answers)


async def test_no_worker_at_all() -> None:
    async with local_cluster(settings_for(deadlines={"reserve_s": 0.2}), ()) as cluster:
        async with AsyncClient(cluster.address, retries=0) as client:
            with pytest.raises(Unavailable, match="no verify worker can be reached"):
                await client.generate("x")


async def test_no_router_at_all() -> None:
    async with AsyncClient("127.0.0.1:1", retries=1) as client:
        with pytest.raises(TidemillError) as caught:
            await client.generate("x")
    assert caught.value.kind == "unavailable"
