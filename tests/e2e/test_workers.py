"""Workers over loopback, as a router sees them: real streams, real links, engines without a model."""

import asyncio
import os
import threading
import time
import urllib.request
from collections.abc import AsyncIterator

import grpc
import pytest

from tests.support.engines import SMALL, VOCABULARY, one_by_one, random_requests
from tests.support.workers import Outcome, Stream, attached, decode, emulated, hand_over, running, settings_of, submit
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
    Refusal,
    Refused,
    Reserve,
    Submit,
    Tokens,
)
from tidemill.core.model import Peer, Request, Role, WorkerId
from tidemill.core.settings import Settings
from tidemill.types import SamplingParams
from workers import service
from workers.engine.emulated import EmulatedEngine
from workers.loop import EngineLoop
from workers.worker import Worker

LONG = SMALL.model_copy(update={"kv_blocks": 1024, "max_batch_tokens": 16})


def request_of(name: str = "r", tokens: int = 50, max_tokens: int = 8) -> Request:
    prompt = tuple(2 + i * 7 % (VOCABULARY - 2) for i in range(tokens))
    return Request(name, prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=1))


def plain(*requests: Request) -> dict[str, tuple[int, ...]]:
    engine = SMALL.model_copy(update={"kv_blocks": 2048, "max_batch_tokens": 512})
    return one_by_one(EmulatedEngine(engine, VOCABULARY), requests)


def worker(role: Role, settings: Settings | None = None, name: str = "") -> Worker:
    return Worker(name or f"{role}-0", role, settings or settings_of(), engine_factory=emulated)


class Trio:
    """A prefill, a verify and a draft worker, each attached."""

    def __init__(self, workers: tuple[Worker, Worker, Worker], streams: list[Stream]) -> None:
        self.prefill, self.verify, self.draft = workers
        self.to_prefill, self.to_verify, self.to_draft = streams

    async def hand_over(self, request: Request, drafter: Peer | None = None) -> Outcome:
        return await hand_over(self.to_prefill, self.to_verify, request, drafter)

    async def released(self) -> None:
        """All of them come to hold nothing, and say so."""
        deadline = time.monotonic() + 5

        def clean(loop: EngineLoop) -> bool:
            loop.engine.check()  # type: ignore[attr-defined]
            return loop.holds_nothing

        for each in (self.prefill, self.verify, self.draft):
            while not await asyncio.wrap_future(each.on_engine_thread(clean)):
                assert time.monotonic() < deadline, each.describe()
                await asyncio.sleep(0.005)
        for stream in (self.to_prefill, self.to_verify, self.to_draft):
            await stream.released()


@pytest.fixture
async def trio(settings: Settings) -> AsyncIterator[Trio]:
    workers = (worker(Role.PREFILL, settings), worker(Role.VERIFY, settings), worker(Role.DRAFT, settings))
    with running(*workers):
        async with attached(*(each.peer for each in workers)) as streams:
            yield Trio(workers, streams)


@pytest.fixture
def settings() -> Settings:
    return settings_of()


# --- same tokens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["submitted", "handed over"])
@pytest.mark.parametrize("drafts", [False, True], ids=["without drafts", "with drafts"])
async def test_every_way_gives_the_same_tokens(trio: Trio, way: str, drafts: bool) -> None:
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


async def test_times_of_a_handed_over_request(trio: Trio) -> None:
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


async def test_one_message_a_step(trio: Trio) -> None:
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


async def test_two_routers_hear_of_their_own_requests(trio: Trio) -> None:
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

    async def granted(self, trio: Trio, request: Request, ttl_s: float = 30.0) -> LeaseGranted:
        trio.to_verify.send(Reserve(request, ttl_s, trio.draft.peer))
        event = await trio.to_verify.event(request.id)
        assert isinstance(event, LeaseGranted)
        return event

    async def test_cancelled_with_a_lease(self, trio: Trio) -> None:
        await self.granted(trio, request_of(tokens=2000))
        assert trio.verify.describe().load.kv_blocks_leased > 0
        trio.to_verify.send(Cancel("r"))
        await trio.released()
        assert trio.verify.metrics.value(metrics.LEASES, end="aborted") == 1

    async def test_cancelled_during_prefill_and_transfer(self, trio: Trio) -> None:
        granted = await self.granted(trio, request_of(tokens=4000))
        trio.to_prefill.send(Prefill(request_of(tokens=4000), granted.lease))
        await trio.to_prefill.report(lambda report: report.load.kv_blocks_used > 20)
        for stream in (trio.to_prefill, trio.to_verify):
            stream.send(Cancel("r"))
        await trio.released()
        assert trio.to_prefill.heard["r"].empty(), "a cancel is not answered"
        # The link is still good.
        assert (await trio.hand_over(request_of("next", 70))).tokens == plain(request_of("next", 70))["next"]

    async def test_cancelled_while_it_decodes_with_drafts(self, trio: Trio) -> None:
        trio.to_verify.send(Submit(request_of(max_tokens=5000), trio.draft.peer))
        for _ in range(3):
            await trio.to_verify.event("r")
        trio.to_verify.send(Cancel("r"))
        await trio.released()

    async def test_a_lease_that_nobody_fills_expires(self, trio: Trio) -> None:
        await self.granted(trio, request_of(tokens=2000), ttl_s=0.2)
        event = await trio.to_verify.event("r", timeout_s=2.0)
        assert isinstance(event, Failed)
        assert event.failure is Failure.LEASE_EXPIRED
        await trio.released()

    async def test_a_router_that_goes_away_leaves_nothing_behind(self, trio: Trio) -> None:
        async with attached(trio.prefill.peer, trio.verify.peer) as (prefill, verify):
            verify.send(Submit(request_of("a", max_tokens=5000), trio.draft.peer))
            verify.send(Reserve(request_of("b", 4000), 30.0, trio.draft.peer))
            granted = await verify.event("b")
            assert isinstance(granted, LeaseGranted)
            prefill.send(Prefill(request_of("b", 4000), granted.lease))
            await verify.event("a")
        started = time.monotonic()
        await trio.released()
        assert time.monotonic() - started < 2

    async def test_a_router_that_does_not_read_is_cut_off(
        self, trio: Trio, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
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
            call.cancel()


# --- failures ---------------------------------------------------------------------------------------------------


async def test_a_step_that_raises_costs_its_requests_only(trio: Trio, monkeypatch: pytest.MonkeyPatch) -> None:
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


async def test_a_lease_of_a_worker_that_is_gone(trio: Trio) -> None:
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


# --- roles and the control service ------------------------------------------------------------------------------


async def set_role(peer: Peer, role: str, drain_s: float = 2.0) -> pb.Description:
    async with grpc.aio.insecure_channel(peer.address) as channel:
        return await WorkerStub(channel).SetRole(pb.SetRoleRequest(role=role, drain_s=drain_s))  # type: ignore[misc]


async def test_roles_change_and_tokens_do_not(trio: Trio) -> None:
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


async def test_a_change_of_role_gives_up_what_does_not_end_in_time(trio: Trio) -> None:
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


async def test_roles_that_do_not_exist(trio: Trio) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="no role 'decode'"):
        await set_role(trio.verify.peer, "decode")


async def test_describe(trio: Trio) -> None:
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
    deadline = time.monotonic() + 5
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
