"""What the requests of a killed router held is free again on every worker."""

import signal
import time

import pytest

from tests.support.local import RouterProcess, local_cluster, settings_for
from tidemill import AsyncClient, Unavailable
from tidemill.core.model import Role
from tidemill.core.settings import EmulatedSettings, LatencySettings


async def test_workers_release_what_a_killed_routers_requests_held() -> None:
    slow = EmulatedSettings(target=LatencySettings(step_s=0.02, prefill_token_s=0.001))
    settings = settings_for(speculation=False, emulated=slow)
    async with local_cluster(settings, (Role.PREFILL, Role.VERIFY)) as cluster:
        other = RouterProcess(settings, cluster.members)
        try:
            async with AsyncClient(await other.address(), retries=0) as client:
                decoding = aiter(client.stream([7] * 100, max_tokens=1000, ignore_eos=True))
                await anext(decoding)
                verify = cluster.workers[1]
                assert not verify.on_engine_thread(lambda loop: loop.holds_nothing).result()
                other.signal(signal.SIGKILL)
                killed_at = time.monotonic()
                with pytest.raises(Unavailable):
                    async for _ in decoding:
                        pass
            await cluster.nothing_held()
            assert time.monotonic() - killed_at < 2.0
        finally:
            other.end()
