"""What can be done to a process of this machine that is not our child. Linux."""

import asyncio
import contextlib
import ctypes
import os
import signal
import socket
from collections.abc import AsyncIterator

import psutil

PIDFD_GETFD = 438  # the system call's number, on every architecture


def cut_connections(pid: int) -> int:
    """End every TCP connection that it has, for both ends; new ones may be made. How many they were."""
    libc = ctypes.CDLL(None, use_errno=True)
    process, found = os.pidfd_open(pid), 0
    try:
        for connection in psutil.Process(pid).net_connections("tcp"):
            if connection.status != psutil.CONN_ESTABLISHED:
                continue
            descriptor = libc.syscall(PIDFD_GETFD, process, connection.fd, 0)
            if descriptor < 0:
                raise OSError(ctypes.get_errno(), f"a connection of process {pid} cannot be had")
            with socket.socket(fileno=descriptor) as theirs, contextlib.suppress(OSError):  # it may have just ended
                theirs.shutdown(socket.SHUT_RDWR)
                found += 1
    finally:
        os.close(process)
    return found


@contextlib.asynccontextmanager
async def standing_still(pid: int) -> AsyncIterator[None]:
    """Inside, the process is stopped."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextlib.asynccontextmanager
async def stuttering(pid: int, still_s: float, runs_s: float) -> AsyncIterator[None]:
    """Inside, it stands still and runs by turns."""

    async def stutter() -> None:
        while True:
            async with standing_still(pid):
                await asyncio.sleep(still_s)
            await asyncio.sleep(runs_s)

    task = asyncio.create_task(stutter())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
