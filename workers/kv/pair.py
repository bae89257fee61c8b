"""A two-member torch.distributed group without a world: gloo, or NCCL between two GPUs.

Both members meet at a store under the group's name. A member that dies fails what the other waits for within
milliseconds; one that is stopped, or cut off, costs the timeout.
"""

import contextlib
import os
import re
import threading
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, Store  # type: ignore[attr-defined]

from workers.kv.link import LinkError

ABORT_TAG = 7  # nothing is ever sent under it
ABORT_AFTER = timedelta(milliseconds=1)


class Pair:
    """One member's end. One thread sends or receives; any other may close it, which fails what is under way."""

    def __init__(self, store: Store, name: str, rank: int, device: torch.device, host: str, timeout_s: float) -> None:
        """Waits for the other member. Raises LinkError if it does not come within `timeout_s`.

        `host` is this member's own address, where the other one connects.
        """
        self._peer = 1 - rank
        self._lock = threading.Lock()
        self._waiting = False
        try:
            store = PrefixStore(f"{name}/", store)
            self.device = _meeting_device(store, rank, device)
            make = _nccl if self.is_nccl else _gloo
            self._group: Any = make(store, rank, host, timedelta(seconds=timeout_s))
        except Exception as error:  # the store and the group raise types of their own
            raise LinkError(f"group {name} could not be formed: {reason(error)}") from error

    @property
    def is_nccl(self) -> bool:
        return self.device.type == "cuda"

    def send(self, tensor: Tensor, tag: int, timeout_s: float) -> None:
        """`tensor` lies on `device`. Raises LinkError."""
        self._wait("send", tensor, tag, timeout_s)

    def receive(self, tensor: Tensor, tag: int, timeout_s: float) -> None:
        """Fills `tensor`, which lies on `device`. Raises LinkError."""
        self._wait("recv", tensor, tag, timeout_s)

    def _wait(self, operation: str, tensor: Tensor, tag: int, timeout_s: float) -> None:
        with self._lock:
            group = self._group
            if group is None:
                raise LinkError("the link is closed")
            self._waiting = True
        try:
            getattr(group, operation)([tensor], self._peer, tag).wait(timedelta(seconds=timeout_s))
        except Exception as error:
            raise LinkError(reason(error)) from error
        finally:
            with self._lock:
                self._waiting = False

    def close(self) -> None:
        """Dropping the group closes its sockets and ends its threads; the other member notices."""
        with self._lock:
            group, self._group = self._group, None
            waiting = self._waiting
        if group is None or not waiting:
            return
        if self.is_nccl:
            group.abort()
            return
        # Gloo has no abort. But an operation that times out closes the pair under all others.
        with contextlib.suppress(RuntimeError):
            group.recv([torch.empty(1)], self._peer, ABORT_TAG).wait(ABORT_AFTER)


def reason(error: Exception) -> str:
    """The first sentence of what torch says, without its source file, short enough for a log and an event."""
    first = (str(error).splitlines() or [repr(error)])[0]
    return re.sub(r"^\[[^\]]*\] ", "", first).partition(". ")[0][:200]


def _meeting_device(store: Store, rank: int, device: torch.device) -> torch.device:
    """Where tensors must lie: NCCL moves them between two GPUs, but refuses two members on the same one."""
    store.set(f"device/{rank}", _identity(device))
    mine, other = _identity(device), store.get(f"device/{1 - rank}").decode()
    return device if "cpu" not in (mine, other) and mine != other else torch.device("cpu")


def _identity(device: torch.device) -> str:
    return "cpu" if device.type == "cpu" else str(torch.cuda.get_device_properties(device).uuid)


def _gloo(store: Store, rank: int, host: str, timeout: timedelta) -> Any:
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = timeout
    options._threads = 1
    options._devices = [ProcessGroupGloo.create_device(hostname=host)]
    return ProcessGroupGloo(store, rank, 2, options)


def _nccl(store: Store, rank: int, _host: str, timeout: timedelta) -> Any:
    from torch.distributed import ProcessGroupNCCL  # noqa: PLC0415 - only CUDA builds have it

    # By default waiting returns at once and a watchdog ends the process when a peer dies; here that costs a link.
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    options = ProcessGroupNCCL.Options()
    options._timeout = timeout
    return ProcessGroupNCCL(store, rank, 2, options)
