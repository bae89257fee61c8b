"""What needs Ray: a controller that goes while it, or an operator, changes something, and a pool that loses its last
worker. Each ends, done or as it was; every worker is accounted for, no request fails, none gets other tokens.

The tests use one cluster in their order: each leaves what the next begins with, but for a switch or two.
"""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from cluster.pools import CONTROLLER, find, ray, worker_names
from tests.support.fault_matrix import Fault, Stage
from tests.support.fault_ray import ON_RAY, ONE_VERIFY, TWO_VERIFY, RayStand, struck
from tests.support.fault_streams import Streams, Watch, leaked_by
from tidemill.core.model import Role

pytestmark = [pytest.mark.timeout(300), pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stand() -> AsyncIterator[RayStand]:
    async with RayStand().running() as stand:
        yield stand


async def decoding(stand: RayStand) -> Streams:
    """Streams, the first of which have tokens."""
    watch = Watch(await stand.members())
    await watch.begin()
    streams = Streams(stand.client)
    await watch.until(Stage.DECODING, streams.answers)
    return streams


async def unharmed(stand: RayStand, streams: Streams) -> None:
    await streams.ended()
    found = streams.found(stand.plain, time.monotonic(), await leaked_by(await stand.members()))
    assert (found.failed, found.changed, found.leaked) == (0, 0, 0), found


@pytest.mark.parametrize("fault", [Fault.STOP, Fault.KILL])
async def test_the_controller_goes_while_a_worker_changes_its_role(stand: RayStand, fault: Fault) -> None:
    """The switch is the worker's own affair; its requests move on."""
    await stand.staffed(TWO_VERIFY)
    controller = await stand.controller_answers()
    streams = await decoding(stand)
    verify = {name: each.residual for name, each in (await stand.reports()).items() if each.role is Role.VERIFY}
    worker = find(max(verify, key=verify.__getitem__))  # it takes a while: its requests have to move
    switch = asyncio.ensure_future(worker.set_role.remote("prefill"))
    while not switch.done() and (await worker.describe.remote()).becoming is not Role.PREFILL:  # nobody tells
        await asyncio.wait({switch}, timeout=0.001)
    async with struck(fault, controller):
        assert (await switch).role is Role.PREFILL
        await unharmed(stand, streams)
    await stand.controller_answers(other_than=controller if fault is Fault.KILL else None)
    await stand.router_has(ONE_VERIFY)


async def test_a_controller_killed_while_it_scales_is_asked_again_and_does_the_rest(stand: RayStand) -> None:
    """A worker that it had started and that does not speak yet is not started twice. One that Ray had no more than
    registered goes with the controller, and is started after all."""
    await stand.staffed(TWO_VERIFY)
    wanted = {"prefill": 2, "verify": 1}
    controller, before = await stand.controller_answers(), worker_names()
    streams = await decoding(stand)
    scaling = find(CONTROLLER).scale.remote(wanted)
    while worker_names() == before:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    os.kill(controller, signal.SIGKILL)
    with contextlib.suppress(ray.exceptions.RayActorError):  # it may have been done, too
        await scaling
    while True:
        with contextlib.suppress(ray.exceptions.RayActorError):  # none but that it is being restarted
            await find(CONTROLLER).scale.remote(wanted)
            break
        await asyncio.sleep(0.05)
    await stand.router_has(ONE_VERIFY)  # who leaves has left, and is not asked for leaks
    await unharmed(stand, streams)
    assert len(worker_names()) == sum(ONE_VERIFY.values())


async def test_who_drains_while_the_controller_stands_still_goes_when_it_runs_again(stand: RayStand) -> None:
    """`tidemill status` shows the cluster meanwhile, and names who does not answer."""
    await stand.staffed(TWO_VERIFY)
    controller = await stand.controller_answers()
    streams = await decoding(stand)
    (leaving,) = (await find(CONTROLLER).scale.remote({"verify": 1})).choice.leave
    async with struck(Fault.STOP, controller):
        command = [Path(sys.executable).parent / "tidemill", "status", "--name", ON_RAY.name, "--json"]
        done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=60, check=False)
        await unharmed(stand, streams)
        assert leaving in worker_names()
    assert done.returncode == 0, done.stderr
    status = json.loads(done.stdout)
    assert status["controller"] is None
    assert list(status["silent"]) == [CONTROLLER]
    assert all(each["pid"] for each in status["workers"])
    await stand.router_has({Role.PREFILL: 1, Role.DRAFT: 1, Role.VERIFY: 1})
    assert leaving not in worker_names()


async def test_the_last_verify_worker_dies_and_the_controller_as_it_heals(stand: RayStand) -> None:
    """Of two workers that are left one becomes a verify worker, and only one."""
    await stand.staffed({Role.PREFILL: 1, Role.DRAFT: 1, Role.VERIFY: 1})
    reports = await stand.reports()
    (victim,) = [each.pid for each in reports.values() if each.role is Role.VERIFY]
    controller = await stand.controller_answers()
    streams = await decoding(stand)
    os.kill(victim, signal.SIGKILL)
    while not (await find(CONTROLLER).describe.remote())["switching"]:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    os.kill(controller, signal.SIGKILL)
    await unharmed(stand, streams)
    await stand.controller_answers(other_than=controller)
    roles = Counter(each.role for each in (await stand.reports()).values())
    assert (roles[Role.VERIFY], roles.total()) == (1, 2)
