"""Settings to a vLLM engine inside this process."""

import os
import secrets
from pathlib import Path

# vLLM reads these when it is imported. One process: no engine core and no executor of its own beside it. Several
# workers share a small machine, so none binds its threads to the first core.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

from vllm.config import KVTransferConfig, ModelConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.engine.llm_engine import LLMEngine

from tidemill.core.settings import EngineSettings
from workers.engine.vllm import cpu_fix

HERE = "workers.engine.vllm"


def start_vllm(folder: Path, settings: EngineSettings, longest_draft: int) -> LLMEngine:
    """`longest_draft`: most tokens of a draft; 0: none are verified. Raises what vLLM raises for the folder."""
    on_cpu = settings.device == "cpu"
    if on_cpu:
        cpu_fix.apply()
    running = min(settings.max_running, settings.max_batch_tokens)
    arguments = EngineArgs(
        model=str(folder),
        dtype=settings.dtype,
        seed=secrets.randbits(31),  # requests on different workers must not meet the same noise
        skip_tokenizer_init=True,
        generation_config="vllm",
        block_size=settings.block_size,
        num_gpu_blocks_override=settings.kv_blocks + 1,  # vLLM keeps one for itself
        kv_cache_memory_bytes=1 << 20 if on_cpu else None,  # overridden by the number of blocks; otherwise it measures
        enable_prefix_caching=settings.prefix_cache,
        max_num_batched_tokens=settings.max_batch_tokens,
        max_num_seqs=running,
        enforce_eager=on_cpu,
        async_scheduling=False,
        distributed_executor_backend="uni",
        scheduler_cls=f"{HERE}.scheduler.TidemillScheduler",
        kv_transfer_config=KVTransferConfig(
            kv_connector="TidemillConnector",
            kv_connector_module_path=f"{HERE}.connector",
            kv_role="kv_both",
            kv_load_failure_policy="recompute",
        ),
        speculative_config=_speculation(longest_draft, running) if longest_draft else None,
    )
    config = arguments.create_engine_config()
    pool_tokens = settings.kv_blocks * settings.block_size
    if config.model_config.max_model_len > pool_tokens:  # a sequence that fills the pool can be decoded no further
        arguments.max_model_len = pool_tokens
        config = arguments.create_engine_config()
    return LLMEngine.from_vllm_config(config)


def eos_token_ids(model: ModelConfig) -> frozenset[int]:
    """Of the model's config and its generation_config.json."""
    generation = model.try_get_generation_config()
    found: set[int] = set()
    for named in (getattr(model.hf_text_config, "eos_token_id", None), generation.get("eos_token_id")):
        found.update(named if isinstance(named, list) else [] if named is None else [named])
    return frozenset(found)


def _speculation(longest_draft: int, running: int) -> dict[str, object]:
    """Drafts of any length up to the longest, from outside. A length for each batch size keeps vLLM from padding the
    first step of a request that was loaded with tokens nobody drafted."""
    return {
        "method": "custom_class",
        "model": f"{HERE}.drafts.NoProposer",
        "num_speculative_tokens": longest_draft,
        "num_speculative_tokens_per_batch_size": [(1, running, longest_draft)],
    }
