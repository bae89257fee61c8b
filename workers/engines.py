"""Makes the engine a role needs: target weights for prefill and verify, the draft model for draft."""

import threading
from collections.abc import Callable
from pathlib import Path

import torch

from tidemill.core.model import Role
from tidemill.core.settings import Settings
from tidemill.core.text import load_tokenizer
from workers.engine.base import Engine
from workers.engine.emulated import EmulatedEngine
from workers.engine.latency import latency_model
from workers.engine.native.config import read_config
from workers.engine.native.engine import NativeEngine
from workers.openmp import unregister_openmp

EngineFactory = Callable[[Settings, Role], Engine]


def make_engine(settings: Settings, role: Role) -> Engine:
    """Raises ModelFolderError, TokenizerError, NoCompiler or BadMeasurements, each with what to do.

    For vLLM whatever that raises.
    """
    model = settings.draft if role is Role.DRAFT else settings.target
    if model is None:
        raise ValueError("a draft worker needs the setting draft.path")
    torch.set_num_threads(settings.threads_of(role))
    unregister_openmp()
    if settings.engine.kind == "vllm" and role is not Role.DRAFT:
        from workers.engine.vllm.engine import VllmEngine  # noqa: PLC0415 - seconds, and not in every environment

        longest_draft = settings.speculation.max_depth if settings.speculation.enabled else 0
        return VllmEngine.from_folder(model.path, settings.engine, longest_draft)
    if settings.engine.kind == "emulated":
        return _emulated(settings, role, model.path)
    return NativeEngine.from_folder(model.path, settings.engine)


def _emulated(settings: Settings, role: Role, folder: Path) -> EmulatedEngine:
    emulated, config, drafts = settings.emulated, read_config(folder), role is Role.DRAFT
    return EmulatedEngine(
        settings.engine,
        emulated.vocab_size or config.vocab_size,
        emulated.context_length or config.context_length,
        load_tokenizer(folder),
        agreement=emulated.agreement if drafts else 1.0,
        latency=latency_model(emulated.draft if drafts else emulated.target),
    )


class Engines:
    """A worker's engines. Prefill and verify share the target's; what was loaded once stays."""

    def __init__(self, settings: Settings, factory: EngineFactory = make_engine) -> None:
        self._settings = settings
        self._factory = factory
        self._lock = threading.Lock()
        self._loaded: dict[bool, Engine] = {}  # by whether it is the draft model's

    def has(self, role: Role) -> bool:
        """True if `of` would not have to load anything."""
        return (role is Role.DRAFT) in self._loaded

    def of(self, role: Role) -> Engine:
        """Loads it if need be, and then raises what the factory raises. Only the engine's thread may use it."""
        is_draft = role is Role.DRAFT
        with self._lock:
            if is_draft not in self._loaded:
                self._loaded[is_draft] = self._factory(self._settings, role)
            return self._loaded[is_draft]
