"""Mends vLLM's rejection sampler on CPUs; tests/vllm/test_cpu_fix.py fails when that is no longer needed.

`expand_batch_to_tokens` repeats each request's temperature, top-k and top-p for its draft tokens. Its CPU kernel (vLLM
0.32) writes into an int64 copy of a float32 or int32 output, so sampled requests with drafts read memory nobody wrote.
"""

import torch
from torch import Tensor
from vllm.v1.sample import rejection_sampler


def expand(values: Tensor, ends: Tensor, count: int, replace_from: int = 0, replace_to: int = 0) -> Tensor:
    """[count]: `values[i]` for the tokens before `ends[i]`, `replace_from` turned into `replace_to`."""
    repeats = torch.diff(ends.long(), prepend=ends.new_zeros(1).long())
    expanded = torch.repeat_interleave(values, repeats, output_size=count)
    if replace_from != replace_to:
        expanded[expanded == replace_from] = replace_to
    return expanded


def apply() -> None:
    """Once per process is enough; more does no harm."""
    rejection_sampler.expand_batch_to_tokens = expand
