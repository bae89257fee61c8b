"""The streams that faults are put to, how far they are, and what they showed. Workers are looked at from outside."""

import asyncio
import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import grpc

from tests.support.fault_matrix import Found, Stage
from tidemill import AsyncClient, SamplingParams
from tidemill.core import control_pb2 as pb
from tidemill.core.control_pb2_grpc import WorkerStub
from tidemill.core.model import Member, Peer, Role, WorkerLoad

STREAMS, ACTIVE = 6, 4  # the rest is queued
TOKENS = 100
DEADLINE_S = 40.0


@dataclass
class Answer:
    """One stream, as its client saw it. Times are monotonic seconds."""

    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    error: str = ""

    def longest_gap_s(self, since: float) -> float:
        times = [since, *(at for at in self.times if at > since)]
        return max((b - a for a, b in itertools.pairwise(times)), default=0.0)


class Streams:
    """The same ones each time, begun at once. Answers grow until they have ended."""

    def __init__(self, client: AsyncClient) -> None:
        self.began = time.monotonic()
        self.answers = [Answer() for _ in range(STREAMS)]
        self._tasks = [asyncio.create_task(_stream(client, *each)) for each in enumerate(self.answers)]

    async def ended(self) -> None:
        await asyncio.gather(*self._tasks)

    @classmethod
    async def undisturbed(cls, client: AsyncClient) -> "Streams":
        """How they go without a fault."""
        streams = cls(client)
        await streams.ended()
        assert all(not each.error and len(each.tokens) == TOKENS for each in streams.answers), streams.answers
        return streams

    def found(self, plain: "Streams", struck_at: float, leaked: int) -> Found:
        """Beside the undisturbed ones."""
        pairs = list(zip(self.answers, plain.answers, strict=True))
        costs = [
            answer.longest_gap_s(struck_at) - other.longest_gap_s(plain.began + struck_at - self.began)
            for answer, other in pairs
        ]
        return Found(
            sum(bool(each.error) for each in self.answers),
            sum(not answer.error and answer.tokens != other.tokens for answer, other in pairs),
            max(0.0, *costs),
            leaked,
            tuple(each.error for each in self.answers if each.error),
        )


async def _stream(client: AsyncClient, index: int, answer: Answer) -> None:
    try:
        async for chunk in client.stream(_prompt(index), _params(index), timeout=DEADLINE_S):
            answer.tokens += chunk.tokens
            answer.times.append(time.monotonic())
    except Exception as error:
        answer.error = f"{type(error).__name__}: {error}"


def _prompt(index: int) -> tuple[int, ...]:
    return tuple(2 + (i * 13 + index * 101) % 4000 for i in range(280 + 20 * index))


def _params(index: int) -> SamplingParams:
    return SamplingParams(max_tokens=TOKENS, ignore_eos=True, seed=index, temperature=(0.0, 0.8)[index % 2])


# --- seen from outside ------------------------------------------------------------------------------------------


class Watch:
    """How far requests are, without a look into their router: by answers, and the steps of the prefill workers."""

    def __init__(self, workers: Iterable[Member]) -> None:
        self._workers = list(workers)

    async def begin(self) -> None:
        """Before the requests are made."""
        self._steps = await self._prefill_steps()

    async def until(self, stage: Stage, answers: list[Answer], timeout_s: float = 60.0) -> None:
        """Until the first of them is there."""
        deadline = time.monotonic() + timeout_s
        while not await self._has_reached(stage, answers):
            assert time.monotonic() < deadline, f"no request is {stage}"
            await asyncio.sleep(0.005)

    async def _has_reached(self, stage: Stage, answers: list[Answer]) -> bool:
        match stage:
            case Stage.QUEUED:  # some are served, and the others wait
                return bool(await held_by(self._workers))
            case Stage.PREFILLING:
                return await self._prefill_steps() > self._steps
            case Stage.TRANSFERRING:  # finished blocks travel while the next are computed
                return await self._prefill_steps() > self._steps + 4
            case Stage.DECODING:
                return any(each.tokens for each in answers)
            case Stage.VERIFYING:
                return any(len(each.tokens) > 10 for each in answers)

    async def _prefill_steps(self) -> int:
        return sum([(await load_of(each.peer)).steps for each in self._workers if each.role is Role.PREFILL])


async def load_of(peer: Peer) -> WorkerLoad:
    async with grpc.aio.insecure_channel(peer.address) as channel:
        load: WorkerLoad = (await WorkerStub(channel).Describe(pb.DescribeRequest())).load
        return load


async def held_by(workers: Iterable[Member]) -> int:
    """Blocks, leases and requests of all of them."""
    loads = [await load_of(each.peer) for each in workers]
    return sum(
        each.kv_blocks_used + each.kv_blocks_leased + each.running_requests + each.queued_requests for each in loads
    )


async def leaked_by(workers: Iterable[Member], patience_s: float = 5.0) -> int:
    """What is still held after a while."""
    known, ends = list(workers), time.monotonic() + patience_s
    while True:
        held = await held_by(known)
        if not held or time.monotonic() > ends:
            return held
        await asyncio.sleep(0.05)


async def until(true: Callable[[], bool], timeout_s: float, period_s: float = 0.001) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "it did not come to that"
        await asyncio.sleep(period_s)
