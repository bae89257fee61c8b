"""An engine without a model: the native engine's own machinery over a keyed hash instead of a decoder.

The token after a prefix is a hash of the whole prefix, read back through the KV blocks: a wrong block table, a lost
block or a stale import gives other tokens, so identity can be checked. Steps take no time but the bookkeeping's.
"""

from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor

from tidemill.core.settings import EngineSettings
from workers.engine.base import KvLayout
from workers.engine.native.batch import StepBatch
from workers.engine.native.engine import NativeEngine
from workers.engine.noise import Bits, mix, mix_all

CERTAIN = 20.0  # logit of the hashed token over all others: sampling at moderate temperatures takes it too
WORDS = 4  # a 64-bit hash as four 16-bit numbers, which float32 holds exactly
SHIFTS = np.arange(WORDS, dtype=np.uint64) * np.uint64(16)
LOW_WORD = np.uint64(0xFFFF)


class HashModel:
    """KV of a token is the hash of all tokens up to it; its keys carry it, its values nothing."""

    def __init__(self, vocab_size: int, context_length: int) -> None:
        self.vocab_size = vocab_size
        self.context_length = context_length
        self.eos_token_ids: frozenset[int] = frozenset()
        self._logits = np.zeros((0, vocab_size), np.float32)
        self._hot = (np.zeros(0, np.int64), np.zeros(0, np.int64))  # rows and tokens that are not 0 in `_logits`

    def layout(self, block_size: int) -> KvLayout:
        return KvLayout(1, 1, WORDS, block_size, "float32")

    def new_kv(self, num_blocks: int, block_size: int) -> Tensor:
        return torch.zeros(1, num_blocks, 2, 1, block_size, WORDS)

    def forward(self, batch: StepBatch, kv: Tensor) -> Tensor:
        """Logits [R, vocabulary] with one token of each row far above the rest. Overwritten by the next call."""
        keys: npt.NDArray[np.float32] = kv[0, :, 0, 0].numpy()  # [blocks, block_size, WORDS]
        if batch.copy_rows.numel():
            return torch.from_numpy(self.logits_of(_chain_trees(keys, batch)[batch.logit_rows.numpy()]))
        size = keys.shape[1]
        contexts, tables, slots = batch.context_lengths.numpy(), batch.block_tables.numpy(), batch.slots.numpy()
        last = np.maximum(contexts - 1, 0)
        before = _join(keys[tables[np.arange(len(last)), last // size], last % size])
        before[contexts == 0] = 0
        hashes = _chain(before, batch.token_ids.numpy(), batch.query_starts.numpy())
        keys[slots // size, slots % size] = _split(hashes)
        return torch.from_numpy(self.logits_of(hashes[batch.logit_rows.numpy()]))

    def logits_of(self, hashes: Bits) -> npt.NDArray[np.float32]:
        """[hashes, vocabulary]: what follows prefixes with these hashes."""
        tokens = (hashes % np.uint64(self.vocab_size)).astype(np.int64)
        if len(tokens) > len(self._logits):
            self._logits = np.zeros((len(tokens), self.vocab_size), np.float32)
        else:
            self._logits[self._hot] = 0.0
        self._hot = (np.arange(len(tokens)), tokens)
        self._logits[self._hot] = CERTAIN
        return self._logits[: len(tokens)]


def _chain(before: Bits, tokens: npt.NDArray[np.int64], starts: npt.NDArray[np.int32]) -> Bits:
    """Hash of each row's prefix, from that before each sequence's first row."""
    if len(tokens) == len(before):  # one row each
        return mix_all(before ^ tokens.astype(np.uint64))
    hashes: list[int] = []
    rows, bounds = tokens.tolist(), starts.tolist()
    for index, state in enumerate(before.tolist()):
        for token in rows[bounds[index] : bounds[index + 1]]:
            state = mix(state ^ token)  # noqa: PLW2901 - it runs along the sequence
            hashes.append(state)
    return np.array(hashes, np.uint64)


def _chain_trees(keys: npt.NDArray[np.float32], batch: StepBatch) -> Bits:
    """As `forward` and `_chain`, one run of rows after another, since one may begin where another has just been."""
    size = keys.shape[1]
    slots = batch.slots.tolist()
    others: dict[int, list[int]] = {}
    for row, slot in zip(batch.copy_rows.tolist(), batch.copy_slots.tolist(), strict=True):
        others.setdefault(row, []).append(slot)
    hashes = np.empty(len(slots), np.uint64)
    for index, (first, end) in enumerate(pairwise(batch.query_starts.tolist())):
        before = int(batch.context_lengths[index]) - 1
        block = int(batch.block_tables[index, max(before, 0) // size])
        state = int(_join(keys[block, before % size])) if before >= 0 else 0
        for row in range(first, end):
            state = mix(state ^ int(batch.token_ids[row]))
            hashes[row] = state
            for slot in (slots[row], *others.get(row, ())):
                keys[slot // size, slot % size] = _split(hashes[row : row + 1])[0]
    return hashes


def _split(hashes: Bits) -> npt.NDArray[np.float32]:
    return (hashes[:, None] >> SHIFTS & LOW_WORD).astype(np.float32)


def _join(words: npt.NDArray[np.float32]) -> Bits:
    joined: Bits = (words.astype(np.uint64) << SHIFTS).sum(-1, dtype=np.uint64)
    return joined


class EmulatedEngine(NativeEngine):
    """For tests and load tests of everything around the engine."""

    kind = "emulated"

    def __init__(
        self,
        settings: EngineSettings,
        vocab_size: int = 4096,
        context_length: int = 8192,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        super().__init__(HashModel(vocab_size, context_length), settings, tokenizer)
