"""An engine without a model: the native engine's own machinery over a keyed hash instead of a decoder.

The token after a prefix is a hash of the whole prefix, read back through the KV blocks: a wrong block table, a lost
block or a stale import gives other tokens, so identity can be checked. Steps take no time but the bookkeeping's.
"""

import torch
from tokenizers import Tokenizer
from torch import Tensor

from tidemill.core.settings import EngineSettings
from workers.engine.base import KvLayout
from workers.engine.native.batch import StepBatch
from workers.engine.native.engine import NativeEngine
from workers.engine.noise import mix

CERTAIN = 20.0  # logit of the hashed token over all others: sampling at moderate temperatures takes it too
WORDS = 4  # a 64-bit hash as four 16-bit numbers, which float32 holds exactly


class HashModel:
    """KV of a token is the hash of all tokens up to it; its keys carry it, its values nothing."""

    def __init__(self, vocab_size: int, context_length: int) -> None:
        self.vocab_size = vocab_size
        self.context_length = context_length
        self.eos_token_ids: frozenset[int] = frozenset()

    def layout(self, block_size: int) -> KvLayout:
        return KvLayout(1, 1, WORDS, block_size, "float32")

    def new_kv(self, num_blocks: int, block_size: int) -> Tensor:
        return torch.zeros(1, num_blocks, 2, 1, block_size, WORDS)

    def forward(self, batch: StepBatch, kv: Tensor) -> Tensor:
        """Logits [R, vocabulary] with one token of each row far above the rest."""
        keys = kv[0, :, 0, 0]
        block_size = keys.shape[1]
        tokens, slots, tables = batch.token_ids.tolist(), batch.slots.tolist(), batch.block_tables.tolist()
        starts, contexts = batch.query_starts.tolist(), batch.context_lengths.tolist()
        last = [(c - 1) if c else 0 for c in contexts]
        before = keys[[tables[b][at // block_size] for b, at in enumerate(last)], [at % block_size for at in last]]
        hashes: list[int] = []
        for index, words in enumerate(before.tolist()):
            state = _join(words) if contexts[index] else 0
            for row in range(starts[index], starts[index + 1]):
                state = mix(state ^ tokens[row])
                hashes.append(state)
        block = torch.tensor([slot // block_size for slot in slots])
        offset = torch.tensor([slot % block_size for slot in slots])
        keys[block, offset] = torch.tensor([_split(state) for state in hashes], dtype=torch.float32)
        wanted = [hashes[row] % self.vocab_size for row in batch.logit_rows.tolist()]
        logits = torch.zeros(len(wanted), self.vocab_size)
        logits[range(len(wanted)), wanted] = CERTAIN
        return logits


def _split(state: int) -> list[int]:
    return [state >> 16 * word & 0xFFFF for word in range(WORDS)]


def _join(words: list[float]) -> int:
    return sum(int(value) << 16 * word for word, value in enumerate(words))


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
