"""A router and workers on vLLM, in processes of their own, against one vLLM engine: the same greedy tokens whatever
way they take, and whoever is killed.
"""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest

from router.move import MoveOutcome
from router.server import RouterServer
from tests.support.engines import one_by_one, prompt_of, vllm_engines
from tests.support.local import ProcessWorker, process_cluster, settings_for
from tidemill import AsyncClient, Completion, Sameness, SamplingParams
from tidemill.core.model import Request, Role
from tidemill.core.settings import Settings
from tidemill.core.text import load_tokenizer

pytestmark = pytest.mark.vllm
AT_ONCE = 8
LONG = 1400  # tokens: many steps of MAX_BATCH_TOKENS, so that there is a middle to be struck in
MAX_BATCH_TOKENS = 128
ROLES = (Role.PREFILL, Role.DRAFT, Role.VERIFY, Role.VERIFY)


def settings_of(*, drafts: bool, prefix_cache: bool) -> Settings:
    return settings_for(
        "vllm",
        speculation=drafts,
        dtype="float32",
        block_size=32,
        max_batch_tokens=MAX_BATCH_TOKENS,
        prefix_cache=prefix_cache,
        deadlines={"prefill_s": 8.0, "transfer_s": 15.0, "token_s": 15.0, "link_s": 5.0},
    )


@dataclass(frozen=True)
class Work:
    prompts: list[tuple[int, ...]]
    params: SamplingParams
    plain: list[tuple[int, ...]]


@pytest.fixture(scope="module")
def work(models: Path, prompts: list[str], request: pytest.FixtureRequest) -> Work:
    """Held-out prompts and a few long ones, and what one vLLM engine makes of them, one at a time."""
    everything = request.config.getoption("--all-prompts")
    tokenizer = load_tokenizer(models / "target")
    ids = [tuple(tokenizer.encode(prompt).ids) for prompt in (prompts if everything else prompts[::7])]
    ids += [tuple(2 + token * 31 % 4000 for token in prompt_of(LONG, seed)) for seed in range(2)]
    params = SamplingParams(max_tokens=32, ignore_eos=True)
    engine = vllm_engines().make(models / "target", settings_of(drafts=False, prefix_cache=False).engine, 0)
    plain = one_by_one(engine, [Request(str(i), prompt, params) for i, prompt in enumerate(ids)])  # type: ignore[arg-type]
    vllm_engines().end()
    return Work(ids, params, [plain[str(i)] for i in range(len(ids))])


async def send(client: AsyncClient, work: Work) -> list[Completion]:
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(prompt: tuple[int, ...]) -> Completion:
        async with gate:
            return await client.generate(prompt, work.params)

    return list(await asyncio.gather(*(one(prompt) for prompt in work.prompts)))


def compare(answers: list[Completion], work: Work) -> None:
    different = [i for i, answer in enumerate(answers) if answer.tokens != work.plain[i]]
    assert not different, f"{len(different)} of {len(answers)} requests got other tokens: {different}"


async def settled(true: Callable[[], bool], timeout_s: float = 20.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not true():  # noqa: ASYNC110 - the router's picture has no event
            await asyncio.sleep(0.002)


def blocks(router: RouterServer, what: str, role: str = "") -> int:
    return sum(int(each[f"kv_blocks_{what}"]) for each in router.describe()["workers"] if role in each["role"])


@contextlib.asynccontextmanager
async def nothing_left(router: RouterServer) -> AsyncIterator[None]:
    yield
    try:
        await settled(lambda: blocks(router, "used") == blocks(router, "leased") == 0)
    except TimeoutError:
        raise AssertionError(f"KV blocks are still held: {router.describe()['workers']}") from None


async def test_handed_over(work: Work, request: pytest.FixtureRequest) -> None:
    """Without drafts and caches; of all prompts with one, the other and both as well."""
    everything = request.config.getoption("--all-prompts")
    for drafts, prefix_cache in product((False, True), repeat=2) if everything else [(False, False)]:
        roles = (Role.PREFILL, Role.VERIFY, *([Role.DRAFT] if drafts else []))
        settings = settings_of(drafts=drafts, prefix_cache=prefix_cache)
        async with process_cluster(settings, roles) as (client, router, _), nothing_left(router):
            answers = await send(client, work)
            compare(answers, work)
            handed_over = [each for each in answers if each.summary.route.prefill_worker]
            assert len(handed_over) > len(answers) / 2
            assert {each.summary.sameness for each in answers} == {Sameness.ROUNDED}


@dataclass(frozen=True)
class Cluster:
    client: AsyncClient
    router: RouterServer
    by_name: dict[str, ProcessWorker]


async def with_drafts(cluster: Cluster, work: Work) -> None:
    for _ in range(2):  # the second time from the prefix caches
        answers = await send(cluster.client, work)
        compare(answers, work)
        assert sum(each.summary.speculation.accepted_tokens for each in answers) > 0


async def moved_while_they_decode(cluster: Cluster, work: Work) -> None:
    """From one verify worker to the other and back, as long as there is something to move."""
    verify = [each.peer.id for each in cluster.by_name.values() if each.role is Role.VERIFY and each.peer is not None]
    outcomes: list[MoveOutcome] = []
    async with nothing_left(cluster.router):
        sending = asyncio.create_task(send(cluster.client, work))
        while not sending.done():
            for request_id, at in cluster.router.decoding().items():
                to = next(each for each in verify if each != at)
                outcomes.append(await cluster.router.move(request_id, to))
            await asyncio.sleep(0.01)
        answers = await sending
    compare(answers, work)
    assert set(outcomes) <= {MoveOutcome.MOVED, MoveOutcome.OVER}, outcomes
    assert MoveOutcome.MOVED in outcomes


async def cancelled_while_kv_comes(cluster: Cluster, work: Work) -> None:
    async with nothing_left(cluster.router):
        task = asyncio.create_task(cluster.client.generate(tuple(range(2, 2 + LONG)), work.params))
        await settled(lambda: blocks(cluster.router, "leased") > 0)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def prefill_lost(cluster: Cluster, work: Work, number: signal.Signals) -> None:
    """In the middle of a transfer: the verify worker computes what did not come."""
    fresh = tuple(2 + token * 37 % 4000 for token in prompt_of(LONG, int(number)))
    async with nothing_left(cluster.router):
        task = asyncio.create_task(cluster.client.generate(fresh, work.params))
        await settled(lambda: blocks(cluster.router, "leased") > 0)
        await asyncio.sleep(0.1)
        cluster.by_name["prefill-0"].signal(number)
        answer = await task
        assert answer.summary.route.prefill_worker.startswith("prefill-0")
        assert answer.summary.route.retries == 0, "it went on where its lease was"
        if number == signal.SIGSTOP:
            cluster.by_name["prefill-0"].signal(signal.SIGCONT)
        again = await cluster.client.generate(fresh, work.params)
        assert again.tokens == answer.tokens
    if number == signal.SIGSTOP:
        await settled(lambda: blocks(cluster.router, "total", "prefill") > 0)


async def verify_lost(cluster: Cluster, work: Work) -> None:
    answers: list[Completion] = []
    sending = asyncio.create_task(send(cluster.client, work))
    await settled(lambda: blocks(cluster.router, "used", "verify") > 0)
    await asyncio.sleep(0.3)
    cluster.by_name["verify-1"].signal(signal.SIGKILL)
    answers = await sending
    compare(answers, work)
    assert sum(each.summary.route.retries for each in answers) > 0, "the kill hit nobody"


async def test_with_drafts_and_caches_and_losses(work: Work) -> None:
    """One cluster for all of it, since it takes long to start; it has fewer workers after each loss."""
    settings = settings_of(drafts=True, prefix_cache=True)
    async with process_cluster(settings, ROLES) as (client, router, workers):
        cluster = Cluster(client, router, {worker.name: worker for worker in workers})
        async with nothing_left(router):
            await with_drafts(cluster, work)
        await moved_while_they_decode(cluster, work)
        await cancelled_while_kv_comes(cluster, work)
        await prefill_lost(cluster, work, signal.SIGSTOP)
        await prefill_lost(cluster, work, signal.SIGKILL)
        await verify_lost(cluster, work)
