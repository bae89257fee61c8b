"""The native engine against transformers on the same folders: same greedy tokens in float32."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.engines import bundled_engine, one_by_one
from tidemill.core.model import Request
from tidemill.core.settings import EngineSettings
from tidemill.types import SamplingParams
from workers.engine.native.engine import NativeEngine

transformers = pytest.importorskip("transformers", reason="the development extra has it")

SIZES: dict[str, Any] = {
    "vocab_size": 211, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"config": "LlamaConfig", "head_dim": 32},
    "llama-tied": {"config": "LlamaConfig", "head_dim": 32, "tie_word_embeddings": True},
    "llama3-rope": {"config": "LlamaConfig", "head_dim": 32, "rope_parameters": LLAMA3_ROPE},
    "llama-biases": {"config": "LlamaConfig", "head_dim": 32, "attention_bias": True},
    "llama-small-heads": {"config": "LlamaConfig", "head_dim": 16},
    "mistral": {"config": "MistralConfig", "head_dim": 32, "sliding_window": None},
    "qwen2": {"config": "Qwen2Config"},
    "qwen2-wide": {"config": "Qwen2Config", "num_attention_heads": 2, "num_key_value_heads": 1},
    "qwen3": {"config": "Qwen3Config", "head_dim": 32},
}


def make_folder(folder: Path, name: str) -> Any:
    """A random model of the family, saved the ordinary way; returns transformers' own."""
    options = dict(FAMILIES[name])
    config = getattr(transformers, options.pop("config"))(**(SIZES | options))
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Random norms and biases too, so that a forgotten one shows.
            parameter.copy_(
                torch.randn_like(parameter) * (0.15 if parameter.dim() > 1 else 0.3) + (parameter.dim() == 1)
            )
    model.save_pretrained(folder)
    # The engine needs a tokenizer's file, not its contents: prompts here are token ids.
    document = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(document))
    return model


def reference(model: Any, prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
    with torch.no_grad():
        ids = torch.tensor([prompt])
        # The mask is given because the prompt may begin with the padding token, which would be masked otherwise.
        options = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return tuple(out[0, len(prompt) :].tolist())


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("name", FAMILIES)
def test_miniatures(name: str, kernels: str, tmp_path: Path) -> None:
    model = make_folder(tmp_path, name)
    engine = NativeEngine.from_folder(tmp_path, EngineSettings(dtype="float32", kernels=kernels, kv_blocks=64))  # type: ignore[arg-type]
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        prompt = tuple(torch.randint(3, 211, (5 + 40 * seed,), generator=generator).tolist())
        request = Request("r", prompt, SamplingParams(max_tokens=40, ignore_eos=True))
        assert one_by_one(engine, [request])["r"] == reference(model, prompt, 40)


def test_bundled_target(models: Path, prompts: list[str]) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(models / "target", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(models / "target")
    engine = bundled_engine(models, EngineSettings(dtype="float32"))
    for prompt in prompts[::3]:
        ids = tuple(tokenizer(prompt)["input_ids"])
        request = Request("r", ids, SamplingParams(max_tokens=32, ignore_eos=True))
        assert one_by_one(engine, [request])["r"] == reference(model, ids, 32)
