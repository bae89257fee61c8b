"""One flattened step: the rows of all sequences, one after another."""

from dataclasses import dataclass

from torch import Tensor


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
