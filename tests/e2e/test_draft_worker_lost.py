"""A draft worker is lost under load, in one way or another: no request fails, no token changes.

Verify and draft worker are processes of their own; a link that can be delayed and cut lies between the two.
"""

import asyncio
import signal
from pathlib import Path

import pytest

from benchmarks.delay import DelayedLink
from tests.support.identity import Work, work_of
from tests.support.local import ProcessWorker, process_cluster, settings_for
from tests.support.workers import fixed_drafts
from tidemill import AsyncClient, Summary
from tidemill.core.model import Member, Peer, Role

WAIT_S = 0.05  # longest a step waits for drafts
FAR_S = 0.3  # a delay that makes all of them late
STRUCK_AFTER = 60  # tokens in all, when every request is under way


@pytest.fixture(scope="module")
def work(models: Path, prompts: list[str]) -> Work:
    return work_of(models, prompts[5::12], "bfloat16", 64, longest=60)


@pytest.mark.parametrize("how", ["killed", "stopped", "delayed", "cut off"])
async def test_requests_go_on_without_it(how: str, work: Work) -> None:
    settings = settings_for("native", kv_blocks=256)
    settings = settings.model_copy(update={"speculation": fixed_drafts(wait_s=WAIT_S)})
    links: list[DelayedLink] = []

    async def by_link(member: Member) -> Member:
        if member.role is not Role.DRAFT:
            return member
        links.append(await DelayedLink(member.peer.address, 0.0).start())
        return Member(Peer(member.peer.id, links[0].address), Role.DRAFT)

    try:
        async with process_cluster(settings, (Role.VERIFY, Role.DRAFT), reached=by_link) as (client, _, workers):
            await asyncio.wait_for(drafts_come(client, work), 60)
            load = Load(client, work)
            running = asyncio.gather(*(load.stream(index) for index in range(len(work.prompts))))
            await load.progress(STRUCK_AFTER)
            assert load.unfinished, "it is struck while requests run"
            await strike(how, workers[1], links[0])
            summaries = await asyncio.wait_for(running, 60)
            assert load.tokens == work.plain
            assert sum(each.speculation.accepted_tokens for each in summaries) > 0, "drafts were used before"
            assert all(each.route.retries == 0 for each in summaries)
            again = Load(client, work)
            await asyncio.wait_for(asyncio.gather(*(again.stream(index) for index in range(4))), 60)
            assert again.tokens[:4] == work.plain[:4], "new requests may be told to use it"
    finally:
        for link in links:
            await link.stop()


async def drafts_come(client: AsyncClient, work: Work) -> None:
    """On a busy machine a draft worker's first ones may be too late for many steps."""
    while not (await client.generate(work.prompts[0], work.params[0])).summary.speculation.accepted_tokens:
        pass


async def strike(how: str, worker: ProcessWorker, link: DelayedLink) -> None:
    if how == "killed":
        worker.signal(signal.SIGKILL)
    elif how == "stopped":
        worker.signal(signal.SIGSTOP)
    elif how == "delayed":
        link.delay_s = FAR_S
    else:
        await link.stop()


class Load:
    """All requests of the work, streaming at once. What fails raises."""

    def __init__(self, client: AsyncClient, work: Work) -> None:
        self._client = client
        self._work = work
        self._more = asyncio.Event()
        self.tokens: list[tuple[int, ...]] = [()] * len(work.prompts)

    @property
    def unfinished(self) -> bool:
        return self.tokens != self._work.plain

    async def stream(self, index: int) -> Summary:
        summary = None
        async for chunk in self._client.stream(self._work.prompts[index], self._work.params[index]):
            self.tokens[index] += chunk.tokens
            summary = chunk.summary or summary
            self._more.set()
        assert summary is not None
        return summary

    async def progress(self, tokens: int) -> None:
        """Until every request has some, and all of them so many."""
        while not all(self.tokens) or sum(map(len, self.tokens)) < tokens:
            await asyncio.wait_for(self._more.wait(), 60)
            self._more.clear()
