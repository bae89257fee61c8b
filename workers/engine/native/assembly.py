"""From a plan to tensors: the flattened batch of a step, and what each logits row is sampled with."""

from collections.abc import Sequence

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
    width = max(len(piece.sequence.blocks) for piece in slices)
    for piece in slices:
        sequence, end = piece.sequence, piece.start + piece.rows
        tokens += sequence.tokens[piece.start : end - len(piece.draft)]
        tokens += piece.draft
        positions += range(piece.start, end)
        blocks = sequence.blocks
        slots += [blocks[at // block_size] * block_size + at % block_size for at in range(piece.start, end)]
        starts.append(len(tokens))
        if piece.yields:
            logit_rows += range(len(tokens) - 1 - len(piece.draft), len(tokens))
    tables = [piece.sequence.blocks + [0] * (width - len(piece.sequence.blocks)) for piece in slices]
    return StepBatch(
        token_ids=torch.tensor(tokens),
        positions=torch.tensor(positions),
        slots=torch.tensor(slots),
        query_starts=torch.tensor(starts, dtype=torch.int32),
        context_lengths=torch.tensor([piece.start for piece in slices], dtype=torch.int32),
        block_tables=torch.tensor(tables, dtype=torch.int32),
        logit_rows=torch.tensor(logit_rows, dtype=torch.int64),
    )


def sample_rows(slices: Sequence[Slice]) -> list[SampleRow]:
    """One for each logits row of `assemble`, in its order. A draft's rows see the drafted tokens before them."""
    rows: list[SampleRow] = []
    for piece in slices:
        if not piece.yields:
            continue
        sequence = piece.sequence
        for drafted in range(1 + len(piece.draft)):
            before = [*sequence.tokens, *piece.draft[:drafted]] if drafted else sequence.tokens
            rows.append(
                SampleRow(sequence.request.sampling, len(sequence.tokens) + drafted, sequence.prompt_length, before)
            )
    return rows
