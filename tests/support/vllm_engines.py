"""vLLM engines for tests, each in a process of its own, since one process holds one.

They are forked from a process that has vLLM imported, so one starts in about two seconds; what a test leaves behind is
cleared away and the engine serves the next test that wants the same settings.
"""

import atexit
import pickle
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.support.forked import forkserver
from tidemill.core.settings import EngineSettings

MOST = 6  # engines that wait for their next test
LONGEST_DRAFT = 8


def _serve(connection: Connection, folder: str, settings: EngineSettings, longest_draft: int) -> None:
    """The engine's process: calls come, results go."""
    from workers.engine.vllm.engine import VllmEngine

    engine = VllmEngine(Path(folder), settings, longest_draft)
    calls = {"reset": lambda: _reset(engine), "info": lambda: engine.info}
    _send(connection, (True, None))
    while (call := pickle.loads(connection.recv_bytes())) is not None:
        name, args, kwargs = call
        try:
            _send(connection, (True, (calls.get(name) or getattr(engine, name))(*args, **kwargs)))
        except Exception as error:
            _send(connection, (False, error))


def _reset(engine: Any) -> None:
    for request_id in list(engine._sequences):
        engine.release(request_id)
    engine.step()
    assert engine._vllm.reset_prefix_cache()


def _send(connection: Connection, message: object) -> None:
    connection.send_bytes(pickle.dumps(message))


@dataclass
class RemoteEngine:
    """Every attribute is a call in the engine's process, which raises here what it raises there."""

    process: Any
    connection: Connection

    def call(self, name: str, *args: object, **kwargs: object) -> Any:
        _send(self.connection, (name, args, kwargs))
        return self.answer()

    def answer(self) -> Any:
        fine, result = pickle.loads(self.connection.recv_bytes())
        if fine:
            return result
        raise result

    @property
    def info(self) -> Any:
        return self.call("info")

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: self.call(name, *args, **kwargs)

    def end(self) -> None:
        self.process.kill()
        self.process.join()


class VllmEngines:
    """Makes engines and takes them back."""

    def __init__(self) -> None:
        self._idle: list[tuple[object, RemoteEngine]] = []
        self._used: list[tuple[object, RemoteEngine]] = []
        atexit.register(self.end)

    def make(self, folder: Path, settings: EngineSettings, longest_draft: int = LONGEST_DRAFT) -> RemoteEngine:
        key = (folder, settings.model_dump_json(), longest_draft)
        found = next((entry for entry in self._idle if entry[0] == key), None)
        if found is None:
            ours, theirs = forkserver().Pipe()
            arguments = (theirs, str(folder), settings, longest_draft)
            process = forkserver().Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            found = (key, RemoteEngine(process, ours))
            found[1].answer()
        else:
            self._idle.remove(found)
        self._used.append(found)
        return found[1]

    def take_back(self) -> None:
        """A test is over."""
        for entry in self._used:
            try:
                entry[1].call("reset")
                self._idle.append(entry)
            except Exception:
                entry[1].end()
        self._used.clear()
        while len(self._idle) > MOST:
            self._idle.pop(0)[1].end()

    def end(self) -> None:
        for _, engine in [*self._idle, *self._used]:
            engine.end()
        self._idle.clear()
        self._used.clear()
