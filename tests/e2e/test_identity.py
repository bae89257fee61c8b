"""Same tokens whatever happens: every way through the cluster gives what one plain engine in one process gives.

Workers are processes of their own, on the bundled models. A sample of the prompts by default; `make identity` takes all
of them.
"""

import asyncio
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from router.server import RouterServer
from tests.support.engines import bundled_engine, one_by_one
from tests.support.local import ProcessWorker, process_cluster, settings_for
from tidemill import AsyncClient, Completion, SamplingParams
from tidemill.core.model import Member, Request
from tidemill.core.settings import EngineSettings
from tidemill.core.text import load_tokenizer

DTYPES = ["float32", "bfloat16"]
Answers = list[tuple[int, ...]]


@dataclass(frozen=True)
class Work:
    """Prompts, each greedy and at temperature 0.8, and what plain decoding makes of them."""

    prompts: list[tuple[int, ...]]
    params: list[SamplingParams]
    plain: Answers


@pytest.fixture(scope="module", params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def work(dtype: str, models: Path, prompts: list[str], request: pytest.FixtureRequest) -> Work:
    everything = request.config.getoption("--all-prompts")
    tokenizer = load_tokenizer(models / "target")
    chosen = prompts if everything else prompts[::7]
    ids = [tuple(tokenizer.encode(prompt).ids) for prompt in chosen for _ in range(2)]
    length = 64 if everything else 32
    params = [
        SamplingParams(max_tokens=length, temperature=0.8 * (index % 2), seed=index, ignore_eos=True)
        for index in range(len(ids))
    ]
    engine = bundled_engine(models, EngineSettings(dtype=dtype, prefix_cache=False))  # type: ignore[arg-type]
    requests = [Request(str(i), prompt, params[i]) for i, prompt in enumerate(ids)]
    plain = one_by_one(engine, requests)
    return Work(ids, params, [plain[str(i)] for i in range(len(ids))])


async def send(client: AsyncClient, work: Work, at_once: int) -> list[Completion]:
    gate = asyncio.Semaphore(at_once)

    async def one(index: int) -> Completion:
        async with gate:
            return await client.generate(work.prompts[index], work.params[index])

    return list(await asyncio.gather(*(one(index) for index in range(len(work.prompts)))))


def compare(answers: list[Completion], work: Work) -> None:
    different = [i for i, answer in enumerate(answers) if answer.tokens != work.plain[i]]
    assert not different, f"{len(different)} of {len(answers)} requests got other tokens: {different}"


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
