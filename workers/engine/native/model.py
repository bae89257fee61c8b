"""A decoder ready to run: folder in, logits out."""

import logging
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from workers.engine.base import KvLayout
from workers.engine.native import memory
from workers.engine.native.batch import StepBatch
from workers.engine.native.build import NoCompiler
from workers.engine.native.config import ModelConfig, read_config
from workers.engine.native.runner_cpu import CpuRunner, unsupported
from workers.engine.native.runner_torch import TorchRunner
from workers.engine.native.weights import ModelWeights, read_weights

log = logging.getLogger(__name__)


class Runner(Protocol):
    """Computes a step. A row's result is the same to the bit whatever shares the step with it."""

    packing: str

    def forward(self, batch: StepBatch, kv: Tensor) -> Tensor: ...


class NativeModel:
    """Dense Llama, Mistral, Qwen2 or Qwen3."""

    def __init__(self, config: ModelConfig, runner: Runner, dtype: torch.dtype, device: torch.device) -> None:
        self.config = config
        self.dtype = dtype
        self.packing = runner.packing
        self._runner = runner
        self._device = device

    @classmethod
    def load(
        cls, folder: Path, *, dtype: torch.dtype, device: torch.device, kernels: str = "auto", block_size: int = 16
    ) -> "NativeModel":
        """Read a Hugging Face folder. Raises ModelFolderError, or NoCompiler with kernels="cpu"."""
        config = read_config(folder)
        weights = read_weights(folder, config, dtype, device)
        return cls(config, _runner(config, weights, dtype, device, kernels, block_size), dtype, device)

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def context_length(self) -> int:
        return self.config.context_length

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return self.config.eos_token_ids

    def layout(self, block_size: int) -> KvLayout:
        """Shape, type and inner order of a KV block."""
        config, dtype = self.config, str(self.dtype).removeprefix("torch.")
        return KvLayout(config.num_layers, config.num_kv_heads, config.head_dim, block_size, dtype, self.packing)

    def new_kv(self, num_blocks: int, block_size: int) -> Tensor:
        """An empty pool [layers, blocks, 2, kv_heads, block_size, head_dim]."""
        config = self.config
        shape = (config.num_layers, num_blocks, 2, config.num_kv_heads, block_size, config.head_dim)
        if self._device.type == "cpu":
            return memory.zeros(shape, self.dtype)
        return torch.zeros(shape, dtype=self.dtype, device=self._device)

    @torch.inference_mode()
    def forward(self, batch: StepBatch, kv: Tensor) -> Tensor:
        """Float32 logits [R, vocabulary] of the rows asked for; every row's KV is written to `kv`."""
        return self._runner.forward(batch, kv)


def _runner(
    config: ModelConfig,
    weights: ModelWeights,
    dtype: torch.dtype,
    device: torch.device,
    kernels: str,
    block_size: int,
) -> Runner:
    if kernels == "torch" or device.type != "cpu":
        return TorchRunner(config, weights, device)
    reason = unsupported(config, block_size)
    if reason is None:
        try:
            return CpuRunner(config, weights, dtype)
        except NoCompiler as error:
            reason = str(error)
    if kernels == "cpu":
        raise NoCompiler(f"kernels: cpu was asked for, but {reason}")
    log.warning("using stock torch operators, several times slower than the compiled kernels: %s", reason)
    return TorchRunner(config, weights, device)
