"""Processes forked from one that has imported what workers and routers need: they begin within a tenth of a second."""

import multiprocessing
import os
from collections.abc import Callable
from functools import cache
from multiprocessing.connection import Connection
from typing import Any

PRELOADED = ["workers.engine.vllm.engine", "workers.worker", "router.server"]  # the first, where vLLM is installed


@cache
def forkserver() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return context


class Forked:
    """A process that can be killed. It runs `serve`, whose last argument is its end of the connection to this one."""

    def __init__(self, serve: Callable[..., None], *arguments: object) -> None:
        self.connection, theirs = forkserver().Pipe()
        self._process = forkserver().Process(target=serve, args=(*arguments, theirs), daemon=True)
        self._process.start()
        theirs.close()

    def said(self) -> Any:
        """What it says next."""
        connection: Connection = self.connection
        try:
            return connection.recv()
        except EOFError:
            raise AssertionError("the process ended") from None

    def signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def end(self) -> None:
        """Of a killed or stopped one as well."""
        self._process.kill()
        self._process.join()
        self.connection.close()
