"""One flattened step: the rows of all sequences, one after another.

What is called a sequence here is a run of rows at consecutive positions that read their keys through one block table:
a part of a request's tokens, or a path of its token tree.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor


def _none() -> Tensor:
    return torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True, slots=True)
class StepBatch:
    """T rows of B sequences. A row is a token whose KV is computed and kept in this step."""

    token_ids: Tensor  # int64 [T]
    positions: Tensor  # int64 [T]
    slots: Tensor  # int64 [T]: block * block_size + offset of the row's KV
    query_starts: Tensor  # int32 [B + 1]: rows of sequence b are query_starts[b]:query_starts[b + 1]
    context_lengths: Tensor  # int32 [B]: tokens in the pool before this step
    block_tables: Tensor  # int32 [B, widest]
    logit_rows: Tensor  # int64 [R]: rows whose logits are wanted
    # KV of row copy_rows[i] goes to slot copy_slots[i] too: a node of a token tree lies on several paths.
    copy_rows: Tensor = field(default_factory=_none)  # int64 [C]
    copy_slots: Tensor = field(default_factory=_none)  # int64 [C]
    layers: int | None = None  # only the first few, then the head; None: all
