"""Grows the token trees of sequences that draft: a step computes the nodes asked for, and adds what may follow them."""

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Nodes
from dataclasses import dataclass

from torch import Tensor

from tidemill.core.tree import ROOT, TokenTree
from workers.engine.native.assembly import Rows
from workers.engine.native.batch import StepBatch
from workers.engine.native.growth import Copies, Growth
from workers.engine.native.sequence import Sequence
from workers.engine.sampling import Chooser, SampleRow

Forward = Callable[[StepBatch, Copies], Tensor]  # copies KV blocks, then gives logits


@dataclass(slots=True)
class Sprout:
    """A node that is computed in this step."""

    sequence: Sequence
    growth: Growth
    node: int
    width: int


class Drafting:
    """See the module. The engine owns the sequences, and says which are ready: held, with their KV here."""

    def __init__(
        self, forward: Forward, chooser: Chooser, ready: Callable[[Sequence], bool], block_size: int, max_rows: int
    ) -> None:
        self._forward = forward
        self._chooser = chooser
        self._ready = ready
        self._block_size = block_size
        self._max_rows = max_rows
        self._asked: dict[Sequence, tuple[tuple[int, ...], int]] = {}

    def __len__(self) -> int:
        return len(self._asked)

    def ask(self, sequence: Sequence, nodes: Nodes[int], width: int) -> None:
        """In the next step, or one soon after it. A second ask takes the place of one that waits."""
        self._asked[sequence] = tuple(nodes), width

    def forget(self, sequence: Sequence) -> None:
        self._asked.pop(sequence, None)

    def step(self, context_length: int) -> tuple[list[Sequence], int]:
        """Compute what was asked for, up to the limit of rows. Returns whose trees were attended to, and the rows."""
        rows, copies = Rows(self._block_size), []
        attended: list[Sequence] = []
        sprouts: list[Sprout] = []
        for sequence in list(self._asked):
            if rows.tokens and len(rows.tokens) >= self._max_rows:
                break
            nodes, width = self._asked.pop(sequence)
            attended.append(sequence)
            if self._ready(sequence):
                placed, more = place(sequence, nodes, rows)
                copies += more
                sprouts += [Sprout(sequence, growth_of(sequence), node, width) for node in placed]
        if sprouts:
            self._run(rows, copies, sprouts, context_length, None)
        return attended, len(rows.tokens)

    def foresee(
        self, sequences: Iterable[Sequence], depth: int, width: int, layers: int, context_length: int
    ) -> dict[str, TokenTree]:
        """Trees of decoding sequences from the model's first `layers` alone; nothing of them stays.

        A chain of each node's likeliest child, the other children beside it. This is self-speculation with an early
        exit (LayerSkip, arXiv 2404.16710; DEL, arXiv 2504.05598), whose KV the verifying pass writes again.
        """
        tips: dict[Sequence, int] = dict.fromkeys(sequences, ROOT)
        try:
            for _ in range(depth):
                rows, copies = Rows(self._block_size), []
                sprouts: list[Sprout] = []
                for sequence, node in tips.items():
                    placed, more = place(sequence, (node,), rows)
                    copies += more
                    sprouts += [Sprout(sequence, growth_of(sequence), each, width) for each in placed]
                if not sprouts:
                    break
                first = {each.sequence: len(each.growth.tokens) for each in sprouts}
                self._run(rows, copies, sprouts, context_length, layers)
                tips = {s: node for s, node in first.items() if node < len(growth_of(s).tokens)}
            return {s.request.id: s.growth.tree for s in sequences if s.growth is not None}
        finally:
            for sequence in sequences:
                sequence.drop_growth()
                sequence.kv.trim()

    def _run(self, rows: Rows, copies: Copies, sprouts: list[Sprout], context_length: int, layers: int | None) -> None:
        """If the model or the ranking raises, the trees are gone, and nothing else is changed."""
        try:
            logits = self._forward(rows.batch(layers), copies).cpu().numpy()
            ranked = self._chooser.rank(
                logits,
                [
                    SampleRow(
                        index,
                        each.sequence.sampler,
                        each.growth.start + each.growth.depth(each.node),
                        each.growth.path_tokens(each.node),
                    )
                    for index, each in enumerate(sprouts)
                ],
                max(each.width for each in sprouts),
            )
        except BaseException:
            for each in sprouts:
                each.sequence.drop_growth()
            raise
        for each, (tokens, chances) in zip(sprouts, ranked, strict=True):
            if each.growth.start + each.growth.depth(each.node) < context_length:
                each.growth.add(each.node, tokens[: each.width], chances[: each.width])


def growth_of(sequence: Sequence) -> Growth:
    """The sequence's tree, begun if need be."""
    if sequence.growth is None:
        sequence.growth = Growth(sequence.kv, len(sequence.tokens))
    return sequence.growth


def place(sequence: Sequence, nodes: Nodes[int], rows: Rows) -> tuple[list[int], Copies]:
    """Add rows for those of the nodes that can be computed and find a place. Returns them, and blocks to be copied."""
    growth, placed, copies = growth_of(sequence), [], []
    for node in nodes:
        if growth.computed(node) or not ROOT <= node < len(growth.tokens):
            continue
        if node == ROOT:
            start = sequence.kv.computed
            if not sequence.kv.grow(len(sequence.tokens)):
                growth.no_root()
                continue
            growth.place_root()
            rows.add(sequence.tokens[start:], start, sequence.kv.blocks)
            sequence.kv.advance(sequence.tokens, len(sequence.tokens) - 1)
        elif growth.computed(growth.parents[node]):
            found = growth.place(node)
            if found is None:
                continue
            copies += found
            rows.add([growth.tokens[node]], growth.start + growth.depth(node) - 1, growth.blocks(node))
        else:
            continue
        rows.logit_rows.append(len(rows.tokens) - 1)
        placed.append(node)
    return placed, copies
