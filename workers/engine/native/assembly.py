"""From a plan to tensors: the flattened batch of a step, and what its rows are sampled with."""

from collections.abc import Sequence

import numpy as np
import torch

from workers.engine.native.batch import StepBatch
from workers.engine.native.scheduler import Slice
from workers.engine.sampling import SampleRow


def assemble(slices: Sequence[Slice], block_size: int) -> StepBatch:
    """Rows in the order of the slices; logits for the last token and the drafts of those that decode."""
    tokens: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    starts = [0]
    logit_rows: list[int] = []
    tables = np.zeros((len(slices), max(len(piece.sequence.kv.blocks) for piece in slices)), np.int32)
    for index, piece in enumerate(slices):
        sequence, start, end = piece.sequence, piece.start, piece.end
        blocks = sequence.kv.blocks
        tables[index, : len(blocks)] = blocks
        if end - start == 1:
            tokens.append(sequence.tokens[start])
            positions.append(start)
            slots.append(blocks[start // block_size] * block_size + start % block_size)
        else:
            tokens += sequence.tokens[start : start + piece.rows]
            tokens += piece.draft
            at = np.arange(start, end)
            positions += range(start, end)
            slots += (tables[index, at // block_size].astype(np.int64) * block_size + at % block_size).tolist()
        starts.append(len(tokens))
        if piece.yields:
            logit_rows += range(len(tokens) - 1 - len(piece.draft), len(tokens))
    return StepBatch(
        token_ids=_tensor(tokens, np.int64),
        positions=_tensor(positions, np.int64),
        slots=_tensor(slots, np.int64),
        query_starts=_tensor(starts, np.int32),
        context_lengths=_tensor([piece.start for piece in slices], np.int32),
        block_tables=torch.from_numpy(tables),
        logit_rows=_tensor(logit_rows, np.int64),
    )


def _tensor(values: list[int], dtype: type[np.signedinteger]) -> torch.Tensor:
    return torch.from_numpy(np.array(values, dtype))  # half the cost of torch.tensor


def sample_rows(slices: Sequence[Slice]) -> list[SampleRow]:
    """One for each row of logits of `assemble` whose token is not simply the likeliest."""
    rows: list[SampleRow] = []
    index = 0
    for piece in slices:
        if not piece.yields:
            continue
        sampler, count = piece.sequence.sampler, 1 + len(piece.draft)
        if not sampler.greedy:
            first = len(piece.sequence.tokens)
            rows += [SampleRow(index + n, sampler, first + n, piece.draft[:n]) for n in range(count)]
        index += count
    return rows
