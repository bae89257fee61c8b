"""Streams to workers break; see test_route.py for what becomes of requests."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

from router.pools_view import PoolsView
from router.telemetry import Telemetry
from tests.support.virtual_time import LoopClock, run_virtual
from tidemill.core import control_pb2 as pb
from tidemill.core.model import Member, Peer, Role, WorkerId


def test_whoever_waits_for_the_commands_of_a_broken_stream_is_told_that_there_are_no_more() -> None:
    run_virtual(_a_stream_breaks())


async def _a_stream_breaks() -> None:
    """gRPC takes them in a task of its own, which does not end with the stream."""
    takers: list[asyncio.Task[None]] = []

    async def take(commands: AsyncIterator[pb.Command]) -> None:
        async for _ in commands:
            raise AssertionError("nobody sent one")

    async def attach(_: str, commands: AsyncIterator[pb.Command]) -> AsyncGenerator[pb.StepReport, None]:
        takers.append(asyncio.create_task(take(commands)))
        await asyncio.sleep(0)
        for report in ():
            yield report

    pools = PoolsView(LoopClock(), attach, Telemetry((5.0,), 0.0))
    await pools.set_members([Member(Peer(WorkerId("verify-0", 1), "somewhere"), Role.VERIFY)])
    await asyncio.sleep(0.05)
    await asyncio.wait_for(takers[0], 1.0)
    await pools.close()
