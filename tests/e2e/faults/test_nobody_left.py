"""Where nobody can take the place of the last worker: requests end with a typed error, and soon."""

import asyncio
import signal
import time
from typing import Any

import pytest

from tests.support.local import process_cluster, settings_for
from tidemill import AsyncClient, Unavailable
from tidemill.core.model import Role
from tidemill.core.settings import EmulatedSettings, LatencySettings

SETTINGS = settings_for(
    speculation=False,
    deadlines={"stall_s": 1.0, "reserve_s": 1.0},
    emulated=EmulatedSettings(target=LatencySettings(step_s=0.01)),
)
PATIENCE_S = 5.0  # both of these, and what a busy machine adds


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_requests_end_when_the_last_verify_worker_is_gone(how: signal.Signals) -> None:
    """Those that decode, and those that come after."""

    async def rest_of(stream: Any) -> None:
        async for _ in stream:
            pass

    async with process_cluster(SETTINGS, (Role.PREFILL, Role.VERIFY)) as (_, router, workers):
        async with AsyncClient(router.address, retries=0) as client:
            streams = [aiter(client.stream([7 + each] * 100, max_tokens=900, ignore_eos=True)) for each in range(3)]
            for stream in streams:
                await anext(stream)
            workers[1].signal(how)
            struck_at = time.monotonic()
            calls = [*map(rest_of, streams), client.generate([5] * 50)]
            ended = await asyncio.gather(*calls, return_exceptions=True)
            assert [type(each) for each in ended] == [Unavailable] * len(calls), ended
            assert time.monotonic() - struck_at < PATIENCE_S
            assert router.describe()["active"] == router.describe()["queued"] == 0
