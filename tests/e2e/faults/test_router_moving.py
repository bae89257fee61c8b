"""A router dies while it moves requests: their clients go on at another, and neither worker keeps what was moved."""

import asyncio
import signal
import time

import grpc

from tests.support.fault_stand import SETTINGS, STALL_S
from tests.support.fault_streams import Stage, Streams, Watch, leaked_by, load_of
from tests.support.local import ProcessWorker, RouterProcess, member_names
from tidemill import AsyncClient
from tidemill.core import control_pb2 as pb
from tidemill.core.control_pb2_grpc import WorkerStub
from tidemill.core.model import Role

WIDEN_S = 0.05  # so much later each part of what is moved arrives


async def test_clients_of_a_router_that_died_moving_go_on_at_the_other() -> None:
    workers = [ProcessWorker(name, role, SETTINGS) for name, role in member_names((Role.VERIFY, Role.VERIFY))]
    members = [await asyncio.to_thread(each.wait) for each in workers]
    routers = [RouterProcess(SETTINGS, members) for _ in range(2)]
    try:
        addresses = [await each.address() for each in routers]
        async with (
            AsyncClient(addresses, stall=STALL_S) as client,
            grpc.aio.insecure_channel(members[0].peer.address) as channel,
        ):
            plain = await Streams.undisturbed(client)
            workers[1].trouble_links(f"delay {WIDEN_S}")
            client._routers.failed(1)  # for half a second: all streams begin at the first
            streams = Streams(client)
            await Watch(members).until(Stage.VERIFYING, streams.answers)
            switch = WorkerStub(channel).SetRole(pb.SetRoleRequest(role=Role.PREFILL, drain_s=10.0))
            while not (await load_of(members[1].peer)).kv_blocks_leased:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.001)
            routers[0].signal(signal.SIGKILL)
            struck_at = time.monotonic()
            workers[1].trouble_links("heal")
            await streams.ended()
            assert (await switch).role == Role.PREFILL
            found = streams.found(plain, struck_at, await leaked_by(members))
            assert (found.failed, found.changed, found.leaked) == (0, 0, 0), found
    finally:
        for each in (*routers, *workers):
            each.end()
