"""The routers as the controller speaks with them: one that is gone, or stopped, holds nobody up for long."""

from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from cluster.pools import find, router_names

ROUTER_TIMEOUT_S = 2.0


class Routers:
    """Belongs to the controller's thread. A router that owes an answer is asked nothing more until that has come."""

    def __init__(self) -> None:
        self._handles: dict[str, ActorHandle] = {}
        self._owed: dict[str, Any] = {}

    @property
    def names(self) -> list[str]:
        return sorted(self._handles)

    def look(self) -> None:
        """Find those that are there now, by name: Ray restarts them under the same."""
        self._handles = {}
        for name in router_names():
            try:
                self._handles[name] = find(name)
            except ValueError:
                continue  # it went meanwhile
        self._owed = {name: owed for name, owed in self._owed.items() if name in self._handles}

    def ask(self, method: str, *arguments: object) -> dict[str, Any]:
        """The answers that came in time, by router."""
        late, _ = self._wait(self._owed, 0.0)
        for name in late:
            del self._owed[name]
        asked = {
            name: getattr(handle, method).remote(*arguments)
            for name, handle in self._handles.items()
            if name not in self._owed
        }
        done, owed = self._wait(asked, ROUTER_TIMEOUT_S)
        self._owed |= owed
        answers = {}
        for name, reference in done.items():
            try:
                answers[name] = ray.get(reference)
            except RayError:
                continue  # it died, and is being restarted
        return answers

    def tell(self, name: str, method: str, *arguments: object) -> None:
        """Without waiting for what becomes of it."""
        if name in self._handles and name not in self._owed:
            getattr(self._handles[name], method).remote(*arguments)

    @staticmethod
    def _wait(asked: dict[str, Any], timeout_s: float) -> tuple[dict[str, Any], dict[str, Any]]:
        """(ended, not yet)"""
        references = list(asked.values())
        done, _ = ray.wait(references, num_returns=len(references), timeout=timeout_s) if references else ([], [])
        ended = {name: reference for name, reference in asked.items() if reference in done}
        return ended, {name: reference for name, reference in asked.items() if name not in ended}
