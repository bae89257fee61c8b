"""Makes the engine a role needs: target weights for prefill and verify, the draft model for draft."""

import torch

from tidemill.core.model import Role
from tidemill.core.settings import Settings
from tidemill.core.text import load_tokenizer
from workers.engine.base import Engine
from workers.engine.emulated import EmulatedEngine
from workers.engine.native.config import read_config
from workers.engine.native.engine import NativeEngine


def make_engine(settings: Settings, role: Role) -> Engine:
    """Raises ModelFolderError, TokenizerError or NoCompiler, each with what to do."""
    model = settings.draft if role is Role.DRAFT else settings.target
    if model is None:
        raise ValueError("a draft worker needs the setting draft.path")
    torch.set_num_threads(settings.engine.threads)
    if settings.engine.kind == "emulated":
        tokenizer = load_tokenizer(model.path)
        config = read_config(model.path)
        return EmulatedEngine(settings.engine, config.vocab_size, config.context_length, tokenizer)
    return NativeEngine.from_folder(model.path, settings.engine)
