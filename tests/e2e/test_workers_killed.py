"""A worker process is killed or stopped at every stage; its peers lose a request at most, and say which."""

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Callable

import pytest

from tests.support.engines import one_by_one
from tests.support.local import ProcessWorker, settings_for
from tests.support.workers import Outcome, Stream, attached, decode, hand_over, running, submit
from tidemill.core import metrics
from tidemill.core.messages import Failed, Failure, LeaseGranted, Prefill, Proceed, Reserve, Submit, Tokens
from tidemill.core.model import Peer, Request, Role
from tidemill.core.settings import Settings
from tidemill.types import SamplingParams
from workers.engines import make_engine
from workers.worker import Worker

LINK_S = 1.5
CONTEXT = 512  # of the bundled model
HOW = pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])


def request_of(name: str = "r", tokens: int = 40, max_tokens: int = 16) -> Request:
    prompt = tuple(2 + i * 13 % 4000 for i in range(tokens))
    return Request(name, prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=1))


def plain(settings: Settings, request: Request) -> tuple[int, ...]:
    return one_by_one(make_engine(settings, Role.VERIFY), [request])[request.id]  # type: ignore[arg-type]


@pytest.fixture
def settings() -> Settings:
    """Chunks of a block, so that a prompt takes many messages."""
    return settings_for(
        "emulated", deadlines={"link_s": LINK_S, "stall_s": LINK_S}, max_batch_tokens=16, prefix_cache=False
    )


@pytest.fixture
async def victim(settings: Settings, request: pytest.FixtureRequest) -> AsyncIterator[ProcessWorker]:
    role = request.param
    process = ProcessWorker(f"{role}-9", role, settings)
    try:
        await asyncio.to_thread(process.wait)
        yield process
    finally:
        process.end()


async def until(true: Callable[[], object], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        await asyncio.sleep(0.001)


async def released(worker: Worker) -> None:
    deadline = time.monotonic() + 20
    while not await asyncio.wrap_future(worker.on_engine_thread(lambda loop: loop.holds_nothing)):
        assert time.monotonic() < deadline, worker.describe()
        await asyncio.sleep(0.01)


async def failed(stream: Stream, request_id: str) -> Failed:
    outcome = await decode(stream, request_id, Outcome())
    assert isinstance(outcome.last, Failed), outcome.last
    return outcome.last


async def granted(verify: Stream, request: Request) -> LeaseGranted:
    verify.send(Reserve(request, 30.0))
    event = await verify.event(request.id)
    assert isinstance(event, LeaseGranted)
    return event


def peer_of(process: ProcessWorker) -> Peer:
    assert process.peer is not None
    return process.peer


@HOW
@pytest.mark.parametrize("victim", [Role.PREFILL], indirect=True)
async def test_prefill_in_the_middle_of_a_transfer(
    victim: ProcessWorker, settings: Settings, how: signal.Signals
) -> None:
    """The verify worker notices a killed one by itself; of a stopped one the router tells it. It computes the rest."""
    verify, healthy = Worker("verify-0", Role.VERIFY, settings), Worker("prefill-0", Role.PREFILL, settings)
    request = request_of(tokens=CONTEXT - 40)
    with running(verify, healthy):
        async with attached(peer_of(victim), verify.peer, healthy.peer) as (to_victim, to_verify, to_healthy):
            lease = (await granted(to_verify, request)).lease
            to_victim.send(Prefill(request, lease))
            await until(lambda: verify.metrics.value(metrics.TRANSFER_BYTES, direction="received"))
            victim.signal(how)
            assert verify.describe().load.kv_blocks_leased == 30, "it was struck in the middle"
            if how is signal.SIGSTOP:
                to_verify.send(Proceed("r"))
            assert (await decode(to_verify, "r", Outcome())).tokens == plain(settings, request)
            await released(verify)
            again = await hand_over(to_healthy, to_verify, request_of("again", CONTEXT - 40))
            assert again.tokens == plain(settings, request)
            await released(healthy)


@HOW
@pytest.mark.parametrize("victim", [Role.VERIFY], indirect=True)
async def test_verify_in_the_middle_of_a_transfer(
    victim: ProcessWorker, settings: Settings, how: signal.Signals
) -> None:
    prefill, healthy = Worker("prefill-0", Role.PREFILL, settings), Worker("verify-0", Role.VERIFY, settings)
    request = request_of(tokens=CONTEXT - 40)
    with running(prefill, healthy):
        async with attached(peer_of(victim), prefill.peer, healthy.peer) as (to_victim, to_prefill, to_healthy):
            lease = (await granted(to_victim, request)).lease
            to_prefill.send(Prefill(request, lease))
            await until(lambda: prefill.metrics.value(metrics.TRANSFER_BYTES, direction="sent"))
            victim.signal(how)
            started = time.monotonic()
            other = asyncio.create_task(hand_over(to_prefill, to_healthy, request_of("other", 100)))
            assert (await failed(to_prefill, "r")).failure is Failure.KV_LINK
            assert time.monotonic() - started < LINK_S + 10
            assert (await other).tokens == plain(settings, request_of("other", 100)), "others go on meanwhile"
            again = await hand_over(to_prefill, to_healthy, request_of("again", CONTEXT - 40))
            assert again.tokens == plain(settings, request)
            await released(prefill)
            await released(healthy)


@pytest.mark.parametrize("victim", [Role.VERIFY], indirect=True)
async def test_a_receiver_that_cannot_be_reached_fails_the_request_in_time(
    victim: ProcessWorker, settings: Settings
) -> None:
    """It was stopped before the link was opened."""
    prefill = Worker("prefill-0", Role.PREFILL, settings)
    with running(prefill):
        async with attached(peer_of(victim), prefill.peer) as (to_victim, to_prefill):
            lease = (await granted(to_victim, request_of(tokens=100))).lease
            victim.signal(signal.SIGSTOP)
            to_prefill.send(Prefill(request_of(tokens=100), lease))
            started = time.monotonic()
            assert (await failed(to_prefill, "r")).failure is Failure.KV_LINK
            assert time.monotonic() - started < 2 * LINK_S + 10
            await released(prefill)


@HOW
@pytest.mark.parametrize("victim", [Role.DRAFT], indirect=True)
async def test_draft_while_it_drafts(victim: ProcessWorker, settings: Settings, how: signal.Signals) -> None:
    """Nobody notices but by speed, and that only as long as a few answers are waited for."""
    verify = Worker("verify-0", Role.VERIFY, settings)
    request = request_of(max_tokens=200)
    with running(verify):
        async with attached(verify.peer) as (to_verify,):
            to_verify.send(Submit(request, peer_of(victim)))
            outcome = Outcome()
            while outcome.accepted < 8:
                event = await to_verify.event("r")
                assert isinstance(event, Tokens)
                outcome.events.append(event)
                outcome.tokens += event.tokens
            victim.signal(how)
            started = time.monotonic()
            outcome = await decode(to_verify, "r", outcome)
            assert outcome.tokens == plain(settings, request)
            assert time.monotonic() - started < settings.speculation.wait_s + 10
            # The next request names it again, and does not wait for it longer than for one answer.
            again = await submit(to_verify, request_of("again"), peer_of(victim))
            assert again.tokens == plain(settings, request_of())
            if how is signal.SIGKILL:
                await until(lambda: verify.metrics.value(metrics.DRAFT_ROUNDS, result="lost"))
            await released(verify)


@pytest.mark.parametrize("victim", [Role.DRAFT], indirect=True)
async def test_a_draft_worker_that_comes_round_again_is_used_again(victim: ProcessWorker, settings: Settings) -> None:
    verify = Worker("verify-0", Role.VERIFY, settings)
    with running(verify):
        async with attached(verify.peer) as (to_verify,):
            first = await submit(to_verify, request_of("a"), peer_of(victim))
            victim.signal(signal.SIGSTOP)
            stopped = await submit(to_verify, request_of("b"), peer_of(victim))
            victim.signal(signal.SIGCONT)
            await until(lambda: verify.metrics.value(metrics.DRAFT_ROUNDS, result="late"))
            again = await submit(to_verify, request_of("c"), peer_of(victim))
            assert first.tokens == stopped.tokens == again.tokens == plain(settings, request_of())
            assert first.accepted > 0
            assert stopped.accepted == 0
            assert again.accepted > 0
            await released(verify)


@pytest.mark.parametrize("victim", [Role.VERIFY], indirect=True)
async def test_a_killed_verify_workers_drafts_are_released(victim: ProcessWorker, settings: Settings) -> None:
    draft = Worker("draft-0", Role.DRAFT, settings)
    with running(draft):
        async with attached(peer_of(victim)) as (to_victim,):
            to_victim.send(Submit(request_of(max_tokens=400), draft.peer))
            for _ in range(3):
                await to_victim.event("r")
            await until(lambda: draft.describe().load.kv_blocks_used)
            victim.signal(signal.SIGKILL)
            await released(draft)
