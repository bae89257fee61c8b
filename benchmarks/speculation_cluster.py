"""One verify and one draft worker as processes on a core each, a router and a client beside the draft worker.

The link between the two workers can be made to take longer. Each cluster serves held-out prompts and is taken down.
"""

import asyncio
import json
import os
import signal
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.delay import DelayedLink
from router.server import RouterServer
from tests.support.local import ProcessWorker, settings_for
from tidemill import AsyncClient, SamplingParams
from tidemill.core.model import Member, Peer, Role
from tidemill.core.settings import ModelSettings, Settings, SpeculationSettings

MODELS = Path(__file__).parents[1] / "models"
DRAFT_CORE, VERIFY_CORE = 0, 1
SETTLED_S = 0.5


@dataclass(frozen=True)
class Work:
    """What each cluster is given; every request gets the same tokens in each."""

    target: Path
    requests: int = 8
    tokens: int = 96  # in the mean, if there are several at once
    temperature: float = 0.0
    at_once: int = 1
    delay_s: float = 0.0
    strike: signal.Signals | None = None  # what the draft worker gets once it has drafted for the warm-up

    def length(self, number: int) -> int:
        """Tokens of an answer. Answers that are as long as each other, and begin together, end together without drafts:
        then prompts are computed in steps that nobody decodes in, which drafts would be blamed for ending."""
        return self.tokens if self.at_once == 1 else self.tokens * (3 + 2 * (number % 5)) // 7


@dataclass(frozen=True)
class Measured:
    """Of one cluster. `tokens` are the outputs themselves, for comparing."""

    tpot_s: float  # mean over the requests
    tokens_per_s: float
    accepted: float  # tokens a verification
    drafted: float
    tokens: tuple[tuple[int, ...], ...]


def settings_of(work: Work, speculation: SpeculationSettings) -> Settings:
    settings = settings_for("native", kv_blocks=1024, dtype="bfloat16")
    changes = {"target": ModelSettings(path=work.target, name="padded"), "speculation": speculation}
    return settings.model_copy(update=changes)


def prompts(count: int) -> list[str]:
    """Of the held-out ones, over again if there are fewer."""
    lines = (MODELS / "prompts.jsonl").read_text().splitlines()
    return [json.loads(lines[index % len(lines)])["prompt"] for index in range(count)]


async def measure(work: Work, speculation: SpeculationSettings) -> Measured:
    """Start, serve, stop."""
    settings = settings_of(work, speculation)
    os.sched_setaffinity(0, {DRAFT_CORE})
    verify = ProcessWorker("verify-0", Role.VERIFY, settings, core=VERIFY_CORE)
    draft = ProcessWorker("draft-0", Role.DRAFT, settings, core=DRAFT_CORE)
    router = RouterServer(settings)
    link: DelayedLink | None = None
    try:
        address = await router.start()
        members = [await asyncio.to_thread(worker.wait) for worker in (verify, draft)]
        if work.delay_s:
            peer = members[1].peer
            link = await DelayedLink(peer.address, work.delay_s).start()
            members[1] = Member(Peer(peer.id, link.address), Role.DRAFT)
        await router.set_members(members)
        await asyncio.sleep(SETTLED_S)
        async with AsyncClient(address) as client:
            await _serve(client, replace(work, requests=1))  # warm-up
            if work.strike is not None:
                draft.signal(work.strike)
            return await _serve(client, work)
    finally:
        if link is not None:
            await link.stop()
        await router.stop(0.1)
        verify.end()
        draft.end()


async def _serve(client: AsyncClient, work: Work) -> Measured:
    gate = asyncio.Semaphore(work.at_once)

    async def one(number: int, prompt: str) -> tuple[float, tuple[int, ...], int, int, int]:
        length, warmth = work.length(number), work.temperature
        params = SamplingParams(max_tokens=length, temperature=warmth, seed=number, ignore_eos=True)
        tokens: tuple[int, ...] = ()
        first_at, first, last_at = 0.0, 0, 0.0
        async with gate:
            async for chunk in client.stream(prompt, params):
                last_at = time.perf_counter()
                if not tokens:
                    first_at, first = last_at, len(chunk.tokens)
                tokens += chunk.tokens
                if chunk.summary is not None:
                    spent = chunk.summary.speculation
        tpot_s = (last_at - first_at) / (len(tokens) - first)
        return tpot_s, tokens, spent.accepted_tokens, spent.drafted_tokens, spent.verify_steps

    texts = prompts(work.requests)
    started = time.perf_counter()
    served = await asyncio.gather(*(one(number, text) for number, text in enumerate(texts)))
    wall_s = time.perf_counter() - started
    steps = sum(each[4] for each in served)
    return Measured(
        statistics.mean(each[0] for each in served),
        sum(len(each[1]) for each in served) / wall_s,
        sum(each[2] for each in served) / steps,
        sum(each[3] for each in served) / steps,
        tuple(each[1] for each in served),
    )
