"""A router as a process of its own: settings and members as arguments, its address on the first line."""

import asyncio
import json
import sys

from router.server import RouterServer
from tidemill.core.model import Member, Peer, Role, WorkerId
from tidemill.core.settings import Settings


async def run(settings: Settings, members: list[Member]) -> None:
    router = RouterServer(settings)
    address = await router.start()
    await router.set_members(members)
    while len(router._pools.snapshot().workers) < len(members):  # noqa: ASYNC110 - tests poll
        await asyncio.sleep(0.01)
    print(address, flush=True)
    await asyncio.Event().wait()


def member(name: str, address: str, role: str) -> Member:
    return Member(Peer(WorkerId(name, 1), address), Role(role))


if __name__ == "__main__":
    asyncio.run(run(Settings.model_validate_json(sys.argv[1]), [member(*each) for each in json.loads(sys.argv[2])]))
