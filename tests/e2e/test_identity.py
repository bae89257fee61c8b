"""Same tokens whatever happens: every way through the cluster gives what one plain engine in one process gives.

Workers are processes of their own, on the bundled models. A sample of the prompts by default; `make identity` takes all
of them.
"""

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from router.server import RouterServer
from tests.support.identity import Work, compare, send, work_of
from tests.support.local import ProcessWorker, process_cluster, settings_for
from tidemill import AsyncClient
from tidemill.core.model import Member

DTYPES = ["float32", "bfloat16"]


@pytest.fixture(scope="module", params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def work(dtype: str, models: Path, prompts: list[str], request: pytest.FixtureRequest) -> Work:
    everything = request.config.getoption("--all-prompts")
    return work_of(models, prompts if everything else prompts[::7], dtype, 64 if everything else 32)


@pytest.mark.parametrize("at_once", [1, 16])
async def test_without_drafts(dtype: str, work: Work, at_once: int) -> None:
    async with process_cluster(settings_for("native", speculation=False, dtype=dtype)) as (client, _, _):
        answers = await send(client, work, at_once)
        compare(answers, work)
        assert all(not answer.summary.speculation.drafted_tokens for answer in answers)
        assert any(answer.summary.route.prefill_worker for answer in answers), "nothing was handed over"


@pytest.mark.parametrize("at_once", [1, 16])
async def test_with_drafts(dtype: str, work: Work, at_once: int) -> None:
    async with process_cluster(settings_for("native", dtype=dtype)) as (client, _, _):
        answers = await send(client, work, at_once)
        compare(answers, work)
        assert sum(answer.summary.speculation.accepted_tokens for answer in answers) > 0


class Cluster:
    """What a killing test needs."""

    def __init__(self, client: AsyncClient, router: RouterServer, workers: list[ProcessWorker]) -> None:
        self.client, self.router = client, router
        self.by_name = {worker.name: worker for worker in workers}
        self.workers = workers

    async def kill(self, worker_id: str, number: signal.Signals = signal.SIGKILL) -> None:
        self.by_name[worker_id.partition("@")[0]].signal(number)


@pytest.fixture
async def cluster(dtype: str) -> AsyncIterator[Cluster]:
    deadlines = {"token_s": 2.0, "transfer_s": 4.0, "prefill_s": 4.0}
    async with process_cluster(settings_for("native", dtype=dtype, deadlines=deadlines)) as (client, router, workers):
        yield Cluster(client, router, workers)


async def watched(cluster: Cluster, work: Work, number: signal.Signals, victim: str) -> None:
    """Send everything; strike once a request has had five tokens from the worker that is to be hit."""
    done = asyncio.Event()
    answers: dict[int, tuple[int, ...]] = {}
    retries = 0

    async def one(index: int) -> None:
        nonlocal retries
        found: tuple[int, ...] = ()
        async for chunk in cluster.client.stream(work.prompts[index], work.params[index]):
            found += chunk.tokens
            if len(found) >= 5 and not done.is_set():
                done.set()
                name = "verify-0" if victim == "verify" else f"{victim}-0"
                await cluster.kill(name, number)
            if chunk.summary:
                retries += chunk.summary.route.retries
        answers[index] = found

    await asyncio.gather(*(one(index) for index in range(len(work.prompts))))
    assert done.is_set()
    different = [i for i, expected in enumerate(work.plain) if answers[i] != expected]
    assert not different, f"requests got other tokens: {different}"
    if victim == "verify":
        assert retries > 0, "the kill hit nobody"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
@pytest.mark.parametrize("victim", ["verify", "draft", "prefill"])
async def test_a_worker_lost_mid_stream(cluster: Cluster, work: Work, victim: str, number: signal.Signals) -> None:
    await watched(cluster, work, number, victim)


async def test_a_restarted_worker_joins_under_a_new_epoch(cluster: Cluster, work: Work, dtype: str) -> None:
    old = cluster.by_name["prefill-0"]
    settings = settings_for("native", dtype=dtype)
    before = await send(cluster.client, work, 4)
    await cluster.kill("prefill-0")
    new = ProcessWorker("prefill-0", old.role, settings)
    try:
        member = await asyncio.to_thread(new.wait)
        others = [Member(w.peer, w.role) for w in cluster.workers if w.peer is not None and w is not old]
        await cluster.router.set_members([*others, member])
        await asyncio.sleep(1.0)
        # Other prompts, so that the verify workers' prefix caches do not make the prefill worker needless.
        shifted = Work([prompt[1:] for prompt in work.prompts], work.params, work.plain)
        after = await send(cluster.client, shifted, 4)
        compare(before, work)
        epochs = {answer.summary.route.prefill_worker for answer in after if answer.summary.route.prefill_worker}
        assert epochs == {str(member.peer.id)}
    finally:
        new.end()
