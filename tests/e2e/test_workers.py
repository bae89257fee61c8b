"""Requests through workers over loopback, as a router sends them: real streams, real links, engines without a model."""

import asyncio
import random
import time
from collections.abc import AsyncIterator

import grpc
import pytest

from tests.support.engines import SMALL, VOCABULARY, one_by_one, random_requests
from tests.support.workers import LiveTrio, Outcome, attached, decode, live_trio, running, settings_of, submit, worker
from tidemill.core import control_pb2 as pb
from tidemill.core import metrics, wire
from tidemill.core.control_pb2_grpc import WorkerStub
from tidemill.core.messages import (
    Cancel,
    Failed,
    Failure,
    LeaseGranted,
    Prefill,
    Prefilled,
    Released,
    Reserve,
    Submit,
    Tokens,
)
from tidemill.core.model import Peer, Request, Role, WorkerId
from tidemill.core.settings import Settings
from tidemill.types import SamplingParams
from workers import service
from workers.engine.emulated import EmulatedEngine

LONG = SMALL.model_copy(update={"kv_blocks": 1024, "max_batch_tokens": 16})


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


# --- same tokens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["submitted", "handed over"])
@pytest.mark.parametrize("drafts", [False, True], ids=["without drafts", "with drafts"])
async def test_every_way_gives_the_same_tokens(trio: LiveTrio, way: str, drafts: bool) -> None:
    requests = random_requests(seed=3)
    expected = plain(*requests)
    drafter = trio.draft.peer if drafts else None

    async def one(request: Request) -> Outcome:
        if way == "submitted":
            return await submit(trio.to_verify, request, drafter)
        return await trio.hand_over(request, drafter)

    for outcomes in ([await one(request) for request in requests], await asyncio.gather(*(map(one, requests)))):
        assert {request.id: each.tokens for request, each in zip(requests, outcomes, strict=True)} == expected
        assert (sum(each.accepted for each in outcomes) > 0) is drafts
    if way == "handed over":
        sent = trio.prefill.metrics.value(metrics.TRANSFER_BYTES, direction="sent")
        assert 0 < sent == trio.verify.metrics.value(metrics.TRANSFER_BYTES, direction="received")
    await trio.released()


async def test_times_of_a_handed_over_request(trio: LiveTrio) -> None:
    outcome = await trio.hand_over(request_of())
    granted, prefilled, first, *rest = outcome.events
    assert isinstance(granted, LeaseGranted)
    assert isinstance(prefilled, Prefilled)
    assert isinstance(first, Tokens)
    assert first.first is not None
    assert first.first.queue_s == first.first.prefill_s == 0.0
    assert 0 < first.first.decode_s < 1
    assert 0 < prefilled.prefill_s < 1
    assert all(isinstance(each, Tokens) and each.first is None for each in rest)


async def test_one_message_a_step(trio: LiveTrio) -> None:
    """However many requests a step serves, each router gets one message of it."""
    requests = [request_of(f"r{index}", tokens=20 + index, max_tokens=40) for index in range(8)]
    await asyncio.gather(*(submit(trio.to_verify, request) for request in requests))
    steps = trio.verify.metrics.value(metrics.STEPS, role="verify")
    reports = trio.to_verify.reports
    with_tokens = [r for r in reports if any(isinstance(event, Tokens) for event in r.events)]
    assert len(with_tokens) <= steps
    assert max(len(report.events) for report in with_tokens) >= 8
    assert [report.sequence for report in reports] == list(range(len(reports)))
    assert trio.verify.metrics.value(metrics.REPORTS) == len(reports)


async def test_two_routers_hear_of_their_own_requests(trio: LiveTrio) -> None:
    async with attached(trio.verify.peer) as (second,):
        mine, others = request_of("a", 30), request_of("b", 40)
        outcomes = await asyncio.gather(submit(trio.to_verify, mine), submit(second, others))
        assert [each.tokens for each in outcomes] == list(plain(mine, others).values())
        assert not second.heard["a"].qsize()
        assert not trio.to_verify.heard["b"].qsize()


# --- cancelled, expired, abandoned ------------------------------------------------------------------------------


class TestReleased:
    @pytest.fixture
    def settings(self) -> Settings:
        return settings_of(LONG)

    async def granted(self, trio: LiveTrio, request: Request, ttl_s: float = 30.0) -> LeaseGranted:
        trio.to_verify.send(Reserve(request, ttl_s, trio.draft.peer))
        event = await trio.to_verify.event(request.id)
        assert isinstance(event, LeaseGranted)
        return event

    async def test_cancelled_with_a_lease(self, trio: LiveTrio) -> None:
        await self.granted(trio, request_of(tokens=2000))
        assert trio.verify.describe().load.kv_blocks_leased > 0
        trio.to_verify.send(Cancel("r"))
        await trio.released()
        assert trio.verify.metrics.value(metrics.LEASES, end="aborted") == 1

    async def test_cancelled_during_prefill_and_transfer(self, trio: LiveTrio) -> None:
        granted = await self.granted(trio, request_of(tokens=4000))
        trio.to_prefill.send(Prefill(request_of(tokens=4000), granted.lease))
        await trio.to_prefill.report(lambda report: report.load.kv_blocks_used > 20)
        for stream in (trio.to_prefill, trio.to_verify):
            stream.send(Cancel("r"))
        await trio.released()
        assert await trio.to_prefill.event("r") == Released("r")
        # The link is still good.
        assert (await trio.hand_over(request_of("next", 70))).tokens == plain(request_of("next", 70))["next"]

    async def test_cancelled_while_it_decodes_with_drafts(self, trio: LiveTrio) -> None:
        trio.to_verify.send(Submit(request_of(max_tokens=5000), trio.draft.peer))
        for _ in range(3):
            await trio.to_verify.event("r")
        trio.to_verify.send(Cancel("r"))
        await trio.released()

    async def test_a_lease_that_nobody_fills_expires(self, trio: LiveTrio) -> None:
        await self.granted(trio, request_of(tokens=2000), ttl_s=0.2)
        event = await trio.to_verify.event("r", timeout_s=10.0)
        assert isinstance(event, Failed)
        assert event.failure is Failure.LEASE_EXPIRED
        await trio.released()

    async def test_a_router_that_goes_away_leaves_nothing_behind(self, trio: LiveTrio) -> None:
        async with attached(trio.prefill.peer, trio.verify.peer) as (prefill, verify):
            verify.send(Submit(request_of("a", max_tokens=5000), trio.draft.peer))
            verify.send(Reserve(request_of("b", 4000), 30.0, trio.draft.peer))
            granted = await verify.event("b")
            assert isinstance(granted, LeaseGranted)
            prefill.send(Prefill(request_of("b", 4000), granted.lease))
            await verify.event("a")
        started = time.monotonic()
        await trio.released()
        assert time.monotonic() - started < 10

    async def test_a_router_that_does_not_read_is_cut_off(
        self, trio: LiveTrio, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(service, "MAX_UNREAD_EVENTS", 200)
        small_window = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65536)]
        async with grpc.aio.insecure_channel(trio.verify.peer.address, options=small_window) as channel:
            call = WorkerStub(channel).Attach()  # type: ignore[call-arg]
            for index in range(8):
                command = Submit(request_of(f"deaf{index}", tokens=20, max_tokens=1900))
                await call.write(wire.command_to_pb(command))
            deadline = time.monotonic() + 20
            while "does not read" not in caplog.text:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.01)
            await trio.released()
            assert (await submit(trio.to_verify, request_of())).tokens == plain(request_of())["r"]
            with pytest.raises(grpc.aio.AioRpcError):
                async with asyncio.timeout(20):
                    while await call.read() is not grpc.aio.EOF:
                        pass


async def test_many_at_once_some_of_whom_leave(trio: LiveTrio) -> None:
    rng = random.Random(1)
    requests = [request_of(f"r{i}", tokens=rng.randrange(2, 120), max_tokens=rng.randrange(1, 40)) for i in range(60)]
    expected = plain(*requests)

    async def one(request: Request) -> None:
        handed_over, drafter = rng.random() < 0.6, rng.choice([None, trio.draft.peer])
        way = trio.hand_over(request, drafter) if handed_over else submit(trio.to_verify, request, drafter)
        leaves_after_s = rng.choice([None, None, 0.0, 0.01, 0.05, 0.1])
        try:
            async with asyncio.timeout(leaves_after_s):
                outcome = await way
        except TimeoutError:
            for stream in (trio.to_prefill, trio.to_verify):
                stream.send(Cancel(request.id))
        else:
            assert outcome.tokens == expected[request.id]

    await asyncio.gather(*map(one, requests))
    await trio.released()


# --- failures ---------------------------------------------------------------------------------------------------


async def test_a_step_that_raises_costs_its_requests_only(trio: LiveTrio, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = await asyncio.wrap_future(trio.verify.on_engine_thread(lambda loop: loop.engine))
    trio.to_verify.send(Submit(request_of("a", max_tokens=5000)))
    await trio.to_verify.event("a")
    real, calls = engine.step, iter([True])

    def step() -> object:
        if next(calls, False):
            raise RuntimeError("a defect")
        return real()

    monkeypatch.setattr(engine, "step", step)
    outcome = await decode(trio.to_verify, "a", Outcome())
    assert isinstance(outcome.last, Failed)
    assert outcome.last.failure is Failure.ENGINE
    assert "a defect" in outcome.last.detail
    await trio.released()
    await trio.to_verify.report(lambda report: report.accepting)
    assert (await submit(trio.to_verify, request_of("b"))).tokens == plain(request_of("b"))["b"]


async def test_a_lease_of_a_worker_that_is_gone(trio: LiveTrio) -> None:
    """The prefill worker says so at once, long before the prompt is computed."""
    request = request_of(tokens=400)
    trio.to_verify.send(Reserve(request, 30.0))
    granted = await trio.to_verify.event("r")
    assert isinstance(granted, LeaseGranted)
    lease = granted.lease
    gone = Peer(WorkerId(lease.holder.id.name, lease.holder.id.epoch - 1), lease.holder.address)
    old = type(lease)(lease.id, "r", gone, lease.first_block, lease.end_block, lease.ttl_s)
    trio.to_prefill.send(Prefill(request, old))
    outcome = await decode(trio.to_prefill, "r", Outcome())
    failed = next(each for each in outcome.events if isinstance(each, Failed))
    assert failed.failure is Failure.KV_LINK
    assert "is gone" in failed.detail
    trio.to_verify.send(Cancel("r"))
    await trio.released()


async def test_layouts_that_differ_are_refused_by_name(settings: Settings) -> None:
    other = settings_of(SMALL.model_copy(update={"block_size": 32}))
    prefill, verify = worker(Role.PREFILL, other), worker(Role.VERIFY, settings)
    with running(prefill, verify):
        async with grpc.aio.insecure_channel(verify.peer.address) as channel:
            request = pb.OpenLinkRequest(
                sender=wire.peer_to_pb(prefill.peer),
                receiver=wire.worker_id_to_pb(verify.peer.id),
                kv_layout="1x2x1x32x4:float32:rows",
            )
            with pytest.raises(grpc.aio.AioRpcError, match="KV layouts differ"):
                await WorkerStub(channel).OpenLink(request)  # type: ignore[misc]
