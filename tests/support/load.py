"""Streaming load whose answers are compared with those of an undisturbed run, and a hand on the workers meanwhile."""

import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from tests.support.local import MODELS, ProcessWorker
from tidemill import AsyncClient, Completion, SamplingParams
from tidemill.core import control_pb2 as pb
from tidemill.core.control_pb2_grpc import WorkerStub
from tidemill.core.model import Role
from tidemill.core.text import load_tokenizer


@dataclass(frozen=True)
class Item:
    """A request; `params` has a seed, so its answer is known once it has been given."""

    prompt: tuple[int, ...]
    params: SamplingParams


def mixed_items(count: int, max_tokens: int = 120) -> list[Item]:
    """Greedy and sampled, short and long, with penalties, stop strings and log-probabilities."""
    tokenizer = load_tokenizer(MODELS / "target")
    text = "\n".join(path.read_text() for path in sorted(Path(asyncio.__file__).parent.glob("[a-f]*.py")))
    ids = tokenizer.encode(text[:200_000], add_special_tokens=False).ids
    rng = random.Random(0)
    items = []
    for index in range(count):
        start, length = rng.randrange(len(ids) - 800), rng.choice((20, 90, 300, 700))
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=(0.0, 0.8)[index % 2],
            top_p=(1.0, 0.95)[index // 2 % 2],
            repetition_penalty=(1.0, 1.15)[index // 3 % 2],
            frequency_penalty=(0.0, 0.2)[index // 4 % 2],
            stop=() if index % 3 else ("\n\n\n", "return None"),
            logprobs=(None, 2)[index // 2 % 2],
            ignore_eos=True,
            seed=index,
        )
        items.append(Item(tuple(ids[start : start + length]), params))
    return items


def same(answer: Completion, plain: Completion) -> bool:
    """All that does not depend on time."""
    return (answer.text, answer.tokens, answer.logprobs, answer.summary.finish_reason) == (
        plain.text,
        plain.tokens,
        plain.logprobs,
        plain.summary.finish_reason,
    )


@dataclass
class Load:
    """So many streams at a time, for as long as it is open."""

    client: AsyncClient
    items: list[Item]
    plain: list[Completion]
    answered: int = 0
    different: list[int] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)
    stopping: bool = False
    _turn: "itertools.count[int]" = field(default_factory=itertools.count)

    @classmethod
    async def of(cls, client: AsyncClient, items: list[Item]) -> "Load":
        """Asks for each once, undisturbed."""
        return cls(client, items, [await client.generate(each.prompt, each.params) for each in items])

    @asynccontextmanager
    async def running(self, streams: int) -> AsyncIterator[None]:
        """Ends once every stream has come to the end of its request."""
        tasks = [asyncio.create_task(self._stream()) for _ in range(streams)]
        try:
            yield
        finally:
            self.stopping = True
            await asyncio.gather(*tasks)

    async def _stream(self) -> None:
        while not self.stopping:
            index = next(self._turn) % len(self.items)
            item, parts = self.items[index], []
            try:
                async for chunk in self.client.stream(item.prompt, item.params):
                    parts.append(chunk)
            except Exception as error:
                self.errors.append(error)
                continue
            assert parts[-1].summary is not None
            answer = Completion(
                "".join(each.text for each in parts),
                tuple(token for each in parts for token in each.tokens),
                tuple(entry for each in parts for entry in each.logprobs),
                parts[-1].summary,
            )
            self.answered += 1
            if not same(answer, self.plain[index]):
                self.different.append(index)


class Hand:
    """Changes the roles of worker processes, in turn."""

    # Each pair of roles once; every second worker ends where it began, and one verify worker is always left.
    PAIRS = (
        (Role.VERIFY, Role.PREFILL),
        (Role.PREFILL, Role.VERIFY),
        (Role.VERIFY, Role.DRAFT),
        (Role.DRAFT, Role.VERIFY),
        (Role.PREFILL, Role.DRAFT),
        (Role.DRAFT, Role.PREFILL),
    )

    def __init__(self, workers: list[ProcessWorker]) -> None:
        """Of a prefill, a draft and two verify workers."""
        self.roles = {each.name: each.role for each in workers}
        self._address = {each.name: each.peer.address for each in workers if each.peer is not None}

    async def switch(self, number: int) -> tuple[Role, Role, float]:
        """The change of role with this number: (from, to, seconds it took). Whoever changed last comes last again."""
        before, to = self.PAIRS[number % len(self.PAIRS)]
        name = next(each for each, role in self.roles.items() if role is before)
        started = time.perf_counter()
        async with grpc.aio.insecure_channel(self._address[name]) as channel:
            await WorkerStub(channel).SetRole(pb.SetRoleRequest(role=to, drain_s=10.0))
        del self.roles[name]
        self.roles[name] = to
        return before, to, time.perf_counter() - started

    async def nothing_held(self, timeout_s: float = 20.0) -> None:
        """No block and no lease on any worker."""
        deadline = time.monotonic() + timeout_s
        for address in self._address.values():
            async with grpc.aio.insecure_channel(address) as channel:
                while True:
                    load = (await WorkerStub(channel).Describe(pb.DescribeRequest())).load
                    held = load.kv_blocks_used + load.kv_blocks_leased + load.running_requests + load.queued_requests
                    if not held:
                        break
                    assert time.monotonic() < deadline, f"{address} holds {load}"
                    await asyncio.sleep(0.05)
