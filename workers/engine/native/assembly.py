"""From a plan to tensors: the flattened batch of a step, and what its rows are sampled with."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from workers.engine.native.batch import StepBatch
from workers.engine.native.growth import Copies
from workers.engine.native.scheduler import Slice
from workers.engine.sampling import SampleRow


@dataclass(slots=True)
class Rows:
    """The rows of a step as they are put together: runs of tokens at consecutive positions, each in one block table."""

    block_size: int
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=lambda: [0])
    contexts: list[int] = field(default_factory=list)
    tables: list["array[int]"] = field(default_factory=list)
    logit_rows: list[int] = field(default_factory=list)
    copy_rows: list[int] = field(default_factory=list)
    copy_slots: list[int] = field(default_factory=list)

    def slot(self, table: "array[int]", position: int) -> int:
        """Where a position's KV lies."""
        return table[position // self.block_size] * self.block_size + position % self.block_size

    def add(self, tokens: Sequence[int], start: int, table: "array[int]") -> None:
        """A run of tokens from position `start` on."""
        end = start + len(tokens)
        self.tokens += tokens
        self.positions += range(start, end)
        if end - start < self.block_size:
            self.slots += [self.slot(table, position) for position in range(start, end)]
        else:
            at = np.arange(start, end)
            blocks = np.array(table, np.int64)[at // self.block_size]
            self.slots += (blocks * self.block_size + at % self.block_size).tolist()
        self.starts.append(len(self.tokens))
        self.contexts.append(start)
        self.tables.append(table)

    def copy(self, row: int, position: int, table: "array[int]") -> None:
        """Keep a row's KV in another table too."""
        self.copy_rows.append(row)
        self.copy_slots.append(self.slot(table, position))

    def batch(self, layers: int | None = None) -> StepBatch:
        """The step, through the first `layers` or all."""
        tables = np.zeros((len(self.tables), max(len(table) for table in self.tables)), np.int32)
        for index, table in enumerate(self.tables):
            tables[index, : len(table)] = table
        return StepBatch(
            token_ids=_tensor(self.tokens, np.int64),
            positions=_tensor(self.positions, np.int64),
            slots=_tensor(self.slots, np.int64),
            query_starts=_tensor(self.starts, np.int32),
            context_lengths=_tensor(self.contexts, np.int32),
            block_tables=torch.from_numpy(tables),
            logit_rows=_tensor(self.logit_rows, np.int64),
            copy_rows=_tensor(self.copy_rows, np.int64),
            copy_slots=_tensor(self.copy_slots, np.int64),
            layers=layers,
        )


def assemble(slices: Sequence[Slice], block_size: int) -> StepBatch:
    """Rows in the order of the slices; logits for the last token and the draft nodes of those that decode."""
    rows = Rows(block_size)
    for piece in slices:
        if piece.paths:
            _add_tree(rows, piece)
        else:
            rows.add(piece.sequence.tokens[piece.start : piece.end], piece.start, piece.sequence.kv.blocks)
        if piece.yields:
            rows.logit_rows += range(len(rows.tokens) - 1 - len(piece.nodes), len(rows.tokens))
    return rows.batch()


def _add_tree(rows: Rows, piece: Slice) -> None:
    """The last committed token and the first path in the sequence's table, the other paths in their branches."""
    sequence, draft, start = piece.sequence, piece.draft, piece.start
    root, place = len(rows.tokens), piece.places
    for path in piece.paths:
        tokens = [draft.tokens[node] for node in path.nodes]
        if path.branch is None:
            rows.add([sequence.tokens[start], *tokens], start, sequence.kv.blocks)
            continue
        table = path.branch.blocks
        for depth, row in enumerate([0, *(place[node] for node in path.above)]):
            rows.copy(root + row, start + depth, table)
        rows.add(tokens, start + 1 + len(path.above), table)


def block_copies(slices: Sequence[Slice], block_size: int) -> Copies:
    """Blocks to be copied before the step, and where to: the last committed tokens' begin each branch."""
    return [
        (piece.sequence.kv.blocks[path.branch.first], path.branch.blocks[path.branch.first])
        for piece in slices
        if piece.start % block_size
        for path in piece.paths
        if path.branch is not None
    ]


def _tensor(values: list[int], dtype: type[np.signedinteger]) -> torch.Tensor:
    return torch.from_numpy(np.array(values, dtype))  # half the cost of torch.tensor


def sample_rows(slices: Sequence[Slice]) -> list[SampleRow]:
    """One for each row of logits of `assemble` whose token is not simply the likeliest."""
    rows: list[SampleRow] = []
    index = 0
    for piece in slices:
        if not piece.yields:
            continue
        sampler, nodes = piece.sequence.sampler, piece.nodes
        if not sampler.greedy:
            first, tokens = len(piece.sequence.tokens), piece.draft.tokens
            rows.append(SampleRow(index, sampler, first))
            for number, node in enumerate(nodes):
                path = piece.draft.path(node)
                drafted = tuple(tokens[each] for each in path)
                rows.append(SampleRow(index + 1 + number, sampler, first + len(path), drafted))
        index += 1 + len(nodes)
    return rows
