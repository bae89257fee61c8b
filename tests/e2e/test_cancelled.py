"""Clients that leave while their long prompts are computed, on the native engine: blocks are free again at once."""

import asyncio
import contextlib
import statistics
import time

from tests.support.local import LocalCluster, local_cluster, settings_for
from tidemill import AsyncClient
from tidemill.core import metrics
from tidemill.core.model import Role
from workers.loop import EngineLoop

CANCELS = 10
CHUNK = 32  # prompt tokens a step: a step is well under the 100 ms
PROMPT = 1800


def blocks_held(loop: EngineLoop) -> int:
    load = loop.engine.load()
    return load.kv_blocks_used + load.kv_blocks_leased


async def held(cluster: LocalCluster) -> list[int]:
    return [await asyncio.wrap_future(each.on_engine_thread(blocks_held)) for each in cluster.workers]


async def all_free(cluster: LocalCluster) -> float:
    """When that was; monotonic seconds."""
    async with asyncio.timeout(10.0):
        while True:
            if not any(await held(cluster)):
                return time.monotonic()
            await asyncio.sleep(0.001)


def chunks(cluster: LocalCluster) -> int:
    """Steps of the prefill worker so far."""
    return cluster.workers[0].describe().load.steps


async def test_a_cancelled_prefill_stops_within_a_chunk_and_frees_its_blocks() -> None:
    settings = settings_for("native", speculation=False, max_batch_tokens=CHUNK)
    free_after, extra_chunks = [], []
    async with local_cluster(settings, (Role.PREFILL, Role.VERIFY)) as cluster:
        async with AsyncClient(cluster.address, retries=0) as client:
            for number in range(CANCELS):
                before = chunks(cluster)
                prompt = [5 + (number + at) % 500 for at in range(PROMPT)]
                leaving = asyncio.ensure_future(client.generate(prompt, max_tokens=8))
                await cluster.settled(lambda before=before: chunks(cluster) >= before + 3)  # type: ignore[misc]
                assert all(await held(cluster)), "both hold blocks: one computes, the other waits for it"
                left_at = time.monotonic()
                leaving.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await leaving
                free_after.append(await all_free(cluster) - left_at)
                stopped_at = chunks(cluster)
                await asyncio.sleep(0.1)
                extra_chunks.append(chunks(cluster) - stopped_at)
                assert stopped_at - before < PROMPT // CHUNK, "it was cancelled before its end"
        series = metrics.CANCEL_TO_RELEASE
        await cluster.settled(lambda: cluster.router.metrics.value(series) == 2 * CANCELS)  # both workers, each time
    within = cluster.router.metrics.registry.get_sample_value(f"{series.name}_bucket", {"le": "0.1"})
    assert within is not None
    assert within > CANCELS, "more than half of the measured times, too"
    assert statistics.median(free_after) < 0.1
    assert max(extra_chunks) == 0
