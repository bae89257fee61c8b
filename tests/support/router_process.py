"""A router in a process of its own."""

import asyncio
from collections.abc import Sequence
from multiprocessing.connection import Connection

from router.server import RouterServer
from tidemill.core.model import Member
from tidemill.core.settings import Settings


def serve(settings: Settings, members: Sequence[Member], connection: Connection) -> None:
    """Until it is killed. The other end of the connection hears its address, once it has all members."""
    asyncio.run(_serve(settings, members, connection))


async def _serve(settings: Settings, members: Sequence[Member], connection: Connection) -> None:
    router = RouterServer(settings)
    address = await router.start()
    await router.set_members(members)
    while len(router._pools.snapshot().workers) < len(members):  # noqa: ASYNC110 - tests poll
        await asyncio.sleep(0.01)
    connection.send(address)
    await asyncio.Event().wait()
