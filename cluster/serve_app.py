"""Tidemill as an application of Ray Serve, so that KubeRay's RayService can bring it up, watch it and replace it.

Requests do not pass through Serve: clients call the router, as everywhere. The application is one replica on the
head's node that brings the cluster up when it begins and takes it down when it is deleted. If the replica dies nothing
else does: the one that Serve puts in its place finds the cluster up and leaves it so.
"""

import asyncio
import contextlib
import logging
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError

from cluster.pools import router_name
from tidemill.core.model import Role
from tidemill.core.settings_file import load_settings

if TYPE_CHECKING:
    from ray.serve import Application

log = logging.getLogger(__name__)

ANSWER_S = 5.0
ON_THE_HEAD = {"num_cpus": 0, "resources": {"node:__internal_head__": 0.001}}


class Keeper:
    """The application's replica."""

    _name = ""  # until the settings have been read

    def __init__(self, config: str) -> None:
        """Serve takes the application for deployed when this returns. Raises RuntimeError with what `up` said."""
        settings = load_settings(Path(config))
        self._name = settings.name
        self._routers = [router_name(index) for index in range(settings.router.replicas)]
        _tidemill("up", "--if-down", "--config", config)

    async def check_health(self) -> None:
        """Raises RuntimeError if nobody can be served. After some failures Serve makes a new replica, and that a new
        cluster if this one is not whole.
        """
        described = await asyncio.gather(*(self._describe(name) for name in self._routers))
        check([each for each in described if each is not None])

    async def _describe(self, router: str) -> dict[str, Any] | None:
        """None if it does not answer. A Serve application lives in Serve's namespace, the actors in the cluster's."""
        try:
            actor = ray.get_actor(router, namespace=self._name)
            return await asyncio.wait_for(actor.describe.remote(), ANSWER_S)
        except (RayError, ValueError, TimeoutError):
            return None

    def __del__(self) -> None:
        """Serve calls this when the application is deleted, and waits for `graceful_shutdown_timeout_s`."""
        if self._name:
            with contextlib.suppress(RuntimeError):  # as when it never was up
                _tidemill("down", "--name", self._name)


def check(routers: list[dict[str, Any]]) -> None:
    """Raises RuntimeError unless a router knows a verify worker that serves; all others can be away for a time."""
    if not routers:
        raise RuntimeError("no router answers")
    workers = [worker for router in routers for worker in router["workers"]]
    if not any(worker["role"] == Role.VERIFY and worker["state"] == "serving" for worker in workers):
        raise RuntimeError("no verify worker serves")


def _tidemill(*arguments: str) -> None:
    """In a process of its own, since this one has joined Ray already. Raises RuntimeError with what it said."""
    command = [sys.executable, "-m", "cluster.cli", *arguments]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    log.info("%s%s", done.stdout, done.stderr)
    if done.returncode != 0:
        raise RuntimeError(f"`tidemill {' '.join(arguments)}`: {done.stderr.strip()}")


def application(arguments: dict[str, str]) -> "Application":
    """For `import_path` of a Serve config, with `args: {config: PATH}`: a settings file on the head's node."""
    from ray import serve  # noqa: PLC0415 - there where Serve runs it; installed with tidemill[serve]

    return serve.deployment(Keeper, ray_actor_options=ON_THE_HEAD).bind(arguments["config"])
