"""What a worker does besides serving requests: changing its role, describing itself, coming and going."""

import asyncio
import os
import threading
import time
import urllib.request
from collections.abc import AsyncIterator

import grpc
import pytest

from tests.support.engines import SMALL, VOCABULARY, one_by_one
from tests.support.workers import (
    LiveTrio,
    Outcome,
    attached,
    decode,
    hand_over,
    live_trio,
    running,
    settings_of,
    submit,
    worker,
)
from tidemill.core import control_pb2 as pb
from tidemill.core import wire
from tidemill.core.control_pb2_grpc import WorkerStub
from tidemill.core.messages import Failed, Failure, Refusal, Refused, Submit
from tidemill.core.model import Peer, Request, Role
from tidemill.core.settings import Settings
from tidemill.types import SamplingParams
from workers.engine.emulated import EmulatedEngine


def request_of(name: str = "r", tokens: int = 50, max_tokens: int = 8) -> Request:
    prompt = tuple(2 + i * 7 % (VOCABULARY - 2) for i in range(tokens))
    return Request(name, prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=1))


def plain(*requests: Request) -> dict[str, tuple[int, ...]]:
    engine = SMALL.model_copy(update={"kv_blocks": 2048, "max_batch_tokens": 512})
    return one_by_one(EmulatedEngine(engine, VOCABULARY), requests)


@pytest.fixture
def settings() -> Settings:
    return settings_of()


@pytest.fixture
async def trio(settings: Settings) -> AsyncIterator[LiveTrio]:
    async with live_trio(settings) as made:
        yield made


# --- roles and the control service ------------------------------------------------------------------------------


async def set_role(peer: Peer, role: str, drain_s: float = 2.0) -> pb.Description:
    async with grpc.aio.insecure_channel(peer.address) as channel:
        return await WorkerStub(channel).SetRole(pb.SetRoleRequest(role=role, drain_s=drain_s))  # type: ignore[misc]


async def test_roles_change_and_tokens_do_not(trio: LiveTrio) -> None:
    """Prefill and verify trade places, then one of them drafts, then everything goes back."""
    workers = {"x": trio.prefill, "y": trio.verify}
    streams = {"x": trio.to_prefill, "y": trio.to_verify}
    for round_, (prefill, verify) in enumerate([("x", "y"), ("y", "x"), ("x", "y")]):
        for name, role in ((prefill, Role.PREFILL), (verify, Role.VERIFY)):
            before = workers[name].peer.id
            said = await set_role(before and workers[name].peer, role)
            assert said.role == role
            report = await streams[name].report(lambda report, role=role: report.role is role)  # type: ignore[misc]
            assert report.worker == workers[name].peer.id
        for drafter in (None, trio.draft.peer):
            request = request_of(f"{round_}{drafter is None}", tokens=40 + 13 * round_)
            outcome = await hand_over(streams[prefill], streams[verify], request, drafter)
            assert outcome.tokens == plain(request)[request.id]
    await set_role(trio.prefill.peer, "draft")
    request = request_of("drafted", 33)
    outcome = await submit(trio.to_verify, request, trio.prefill.peer)
    assert outcome.tokens == plain(request)["drafted"]
    assert outcome.accepted > 0
    await set_role(trio.prefill.peer, "prefill")
    request = request_of("last", 44)
    assert (await trio.hand_over(request)).tokens == plain(request)["last"]
    await trio.released()


async def test_a_change_of_role_gives_up_what_does_not_end_in_time(trio: LiveTrio) -> None:
    long = request_of("long", max_tokens=3000)
    trio.to_verify.send(Submit(long, trio.draft.peer))
    await trio.to_verify.event("long")
    old = trio.verify.peer.id
    changing = asyncio.create_task(set_role(trio.verify.peer, "prefill", drain_s=0.1))
    outcome = await decode(trio.to_verify, "long", Outcome())
    await changing
    assert isinstance(outcome.last, Failed)
    assert outcome.last.failure is Failure.ROLE_CHANGED
    assert trio.verify.peer.id.epoch > old.epoch
    refused = await submit(trio.to_verify, request_of())
    assert refused.last == Refused("r", Refusal.WRONG_ROLE)
    await trio.released()


async def test_roles_that_do_not_exist(trio: LiveTrio) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="no role 'decode'"):
        await set_role(trio.verify.peer, "decode")


async def test_describe(trio: LiveTrio) -> None:
    async with grpc.aio.insecure_channel(trio.verify.peer.address) as channel:
        said = await WorkerStub(channel).Describe(pb.DescribeRequest())  # type: ignore[misc]
    assert wire.peer_from_pb(said.peer) == trio.verify.peer
    assert (said.role, said.accepting, said.model, said.engine) == ("verify", True, "target", "emulated")
    assert said.load.kv_blocks_total == SMALL.kv_blocks
    await submit(trio.to_verify, request_of())
    text = await asyncio.to_thread(lambda: urllib.request.urlopen(f"http://{said.metrics_address}/metrics").read())
    assert b'tidemill_worker_steps_total{role="verify"}' in text


# --- the end ----------------------------------------------------------------------------------------------------


async def test_stopping_tells_the_routers_and_ends_every_thread() -> None:
    before = set(threading.enumerate())
    workers = [worker(role) for role in (Role.PREFILL, Role.VERIFY, Role.DRAFT)]
    prefill, verify, draft = workers
    with running(*workers):
        async with attached(prefill.peer, verify.peer) as (to_prefill, to_verify):
            await hand_over(to_prefill, to_verify, request_of("a"), draft.peer)
            to_verify.send(Submit(request_of("b", max_tokens=3000), draft.peer))
            await to_verify.event("b")
            await asyncio.to_thread(verify.stop)
            outcome = await decode(to_verify, "b", Outcome())
            assert isinstance(outcome.last, Failed)
            assert outcome.last.failure is Failure.STOPPING
    verify.stop()
    left = [each.name for each in set(threading.enumerate()) - before]
    deadline = time.monotonic() + 20
    while any(name.startswith(("engine", "control", "kv", "load")) for name in left):
        assert time.monotonic() < deadline, left
        await asyncio.sleep(0.02)
        left = [each.name for each in set(threading.enumerate()) - before]
    with pytest.raises(RuntimeError, match="not running"):
        verify.set_role(Role.PREFILL).result(0)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts in /proc")
async def test_workers_that_come_and_go_leave_no_files_open() -> None:
    async def once() -> int:
        prefill, verify = worker(Role.PREFILL), worker(Role.VERIFY)
        with running(prefill, verify):
            async with attached(prefill.peer, verify.peer) as (to_prefill, to_verify):
                await hand_over(to_prefill, to_verify, request_of())
        return len(os.listdir("/proc/self/fd"))

    first = await once()
    counts = [await once() for _ in range(4)]
    assert min(counts) <= first + 1, (first, counts)
