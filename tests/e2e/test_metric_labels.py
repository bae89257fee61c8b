"""However many requests and tenants there are, the number of series stays."""

import asyncio

from prometheus_client.parser import text_string_to_metric_families

from tests.support.local import local_cluster, settings_for
from tidemill import AsyncClient, Slo
from tidemill.core.metrics import Metrics
from tidemill.core.model import Role

REQUESTS, AT_ONCE = 10_000, 100


def series(served: list[Metrics]) -> set[tuple[int, str, tuple[tuple[str, str], ...]]]:
    return {
        (number, sample.name, tuple(sorted(sample.labels.items())))
        for number, metrics in enumerate(served)
        for family in text_string_to_metric_families(metrics.text())
        for sample in family.samples
    }


async def test_ten_thousand_requests_of_ten_thousand_tenants() -> None:
    """Goals of requests' own count as one class, whatever they are."""
    settings = settings_for(speculation=False, router={"max_active": AT_ONCE})
    async with local_cluster(settings, (Role.VERIFY,)) as cluster, AsyncClient(cluster.address) as client:
        served = [cluster.router.metrics, *(worker.metrics for worker in cluster.workers)]

        async def send(number: int) -> None:
            slo = Slo(1.0 + number, 1.0) if number % 2 else ""
            name = f"name-{number}"
            await client.generate([1, 2, 3], max_tokens=1, request_id=name, tenant=name, slo=slo)

        async def send_all(first: int, end: int) -> None:
            numbers = iter(range(first, end))

            async def some() -> None:
                for number in numbers:
                    await send(number)

            await asyncio.gather(*(some() for _ in range(AT_ONCE)))

        await send_all(0, 2 * AT_ONCE)
        before = series(served)
        await send_all(2 * AT_ONCE, REQUESTS)
        after = series(served)
    assert len(after) < 500
    assert after == before
    assert not [each for each in after if "name-" in str(each)]
