"""An engine without a model: the native engine's own machinery over a keyed hash instead of a decoder.

The token after a prefix is a hash of the whole prefix, read back through the KV blocks: a wrong block table, a lost
block or a stale import gives other tokens, so identity can be checked. A step takes as long as a latency model says:
once its bookkeeping is done the thread sleeps, so that many workers share a small machine.
"""

import math
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Names
from dataclasses import replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor

from tidemill.core.clock import Clock, SystemClock
from tidemill.core.settings import EngineSettings
from tidemill.core.tree import TokenTree
from workers.engine.base import KvLayout, SequenceOutput, SequenceProgress, StepOutput
from workers.engine.latency import LatencyModel, LinearLatency, StepWork
from workers.engine.native.batch import StepBatch
from workers.engine.native.engine import NativeEngine
from workers.engine.native.scheduler import Slice
from workers.engine.noise import Bits, mix, mix_all

CERTAIN = 20.0  # logit of the hashed token over all others: sampling at moderate temperatures takes it too
SPREAD = 0.01  # between the logits of all other tokens
RANKS = 8  # choices of a draft that may be right
DRAFT_KEY = np.uint64(0x5DEECE66D1CE4E5B)
WORDS = 4  # a 64-bit hash as four 16-bit numbers, which float32 holds exactly
SHIFTS = np.arange(WORDS, dtype=np.uint64) * np.uint64(16)
LOW_WORD = np.uint64(0xFFFF)


class HashModel:
    """KV of a token is the hash of all tokens up to it; its keys carry it, its values nothing.

    With an `agreement` below 1 it is a draft of the model that has 1: after a keyed share of all prefixes its first
    choice is that model's token, in the same share of the others its second, and so on. Its probabilities say just
    that, as those of a well-trained draft do; with sampling noise it agrees less often.
    """

    def __init__(self, vocab_size: int, context_length: int, agreement: float = 1.0) -> None:
        self.vocab_size = vocab_size
        self.context_length = context_length
        self.eos_token_ids: frozenset[int] = frozenset()
        self._agreement = agreement
        self._scores = _rank_logits(agreement, vocab_size)
        # All but the choices have logits just below 0, no two of them the same: ranking is slow among ties.
        self._others = np.linspace(0.0, -SPREAD, vocab_size, dtype=np.float32)
        self._logits = np.zeros((0, vocab_size), np.float32)
        # Rows [n, 1] and tokens [n, ranks] that are not as in `_others`.
        self._hot = (np.zeros((0, 1), np.int64), np.zeros((0, len(self._scores)), np.int64))

    def layout(self, block_size: int) -> KvLayout:
        return KvLayout(1, 1, WORDS, block_size, "float32")

    def new_kv(self, num_blocks: int, block_size: int) -> Tensor:
        return torch.zeros(1, num_blocks, 2, 1, block_size, WORDS)

    def forward(self, batch: StepBatch, kv: Tensor) -> Tensor:
        """Logits [R, vocabulary] with a token, or a few, of each row above the rest. Overwritten by the next call."""
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
        if len(hashes) > len(self._logits):
            self._logits = np.tile(self._others, (len(hashes), 1))
        else:
            self._logits[self._hot] = self._others[self._hot[1]]
        self._hot = (np.arange(len(hashes))[:, None], self._choices(hashes))
        self._logits[self._hot] = self._scores
        return self._logits[: len(hashes)]

    def _choices(self, hashes: Bits) -> npt.NDArray[np.int64]:
        """[hashes, ranks]: different tokens, best first."""
        right = (hashes % np.uint64(self.vocab_size)).astype(np.int64)
        if self._agreement == 1.0:
            return right[:, None]
        bits = mix_all(hashes ^ DRAFT_KEY)
        others = (bits % np.uint64(self.vocab_size - 1)).astype(np.int64)
        steps = 1 + (others[:, None] + np.arange(RANKS)) % (self.vocab_size - 1)
        choices = (right[:, None] + steps) % self.vocab_size
        uniform = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
        rank = np.floor(np.log1p(-uniform) / math.log1p(-self._agreement)).astype(np.int64)  # geometric
        found = np.flatnonzero(rank < RANKS)
        choices[found, rank[found]] = right[found]
        return choices


def _rank_logits(agreement: float, vocab_size: int) -> npt.NDArray[np.float32]:
    """Logits of a draft's choices, best first, over the 0 or so of all others: with chances as their ranks have."""
    if agreement == 1.0:
        return np.array([CERTAIN], np.float32)
    missed = 1.0 - agreement
    of_each_other = missed**RANKS / (vocab_size - RANKS)
    return np.log(agreement * missed ** np.arange(RANKS) / of_each_other).astype(np.float32)


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
        *,
        agreement: float = 1.0,
        latency: LatencyModel = LinearLatency(),  # noqa: B008 - frozen
        clock: Clock | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`agreement`: see HashModel. `sleep` is called on the engine's thread, with `clock`'s seconds."""
        super().__init__(HashModel(vocab_size, context_length, agreement), settings, tokenizer)
        self._latency = latency
        self._clock = clock or SystemClock()
        self._sleep = sleep
        self._work = StepWork()  # of the main pass of the step under way
        self._late_s = 0.0  # by which the last step ended later than it should have

    def step(self) -> StepOutput:
        """Its `seconds` are the model's, or more if the bookkeeping alone took longer."""
        started = self._clock.monotonic()
        self._work = StepWork()
        output = super().step()
        if not output.batch_tokens:
            return output
        grown = self._one_row_each(output.grown, output.batch_tokens - self._work.rows)
        self._step_s = self._pace(started, sum(self._latency(work) for work in (self._work, grown) if work.rows))
        return replace(output, seconds=self._step_s)

    def foresee(self, request_ids: Names[str], depth: int, width: int, layers: int) -> dict[str, TokenTree]:
        """Each level costs a pass of the model's `layers`."""
        started = self._clock.monotonic()
        trees = super().foresee(request_ids, depth, width, layers)
        if trees:
            passes = max(max(tree.depths(), default=0) for tree in trees.values()) * layers / self.info.kv.layers
            self._pace(started, passes * self._latency(self._one_row_each(trees, len(trees))))
        return trees

    def _run(self, slices: list[Slice]) -> tuple[list[SequenceOutput], list[SequenceProgress]]:
        self._work = work_of(slices)
        return super()._run(slices)

    def _one_row_each(self, request_ids: Iterable[str], rows: int) -> StepWork:
        """A pass that drafts for these requests."""
        return StepWork(decode_rows=rows, context_tokens=sum(len(self._sequences[each].tokens) for each in request_ids))

    def _pace(self, started: float, seconds: float) -> float:
        """Sleep until so much time has passed; returns how much did, were it not for what is made up for.

        A thread wakes late, the more so the busier the machine. What one step was late the next is shorter, so that
        the pace is the model's.
        """
        due = started + seconds - self._late_s
        now = self._clock.monotonic()
        elapsed = now - started
        if now < due:
            self._sleep(due - now)
            now = self._clock.monotonic()
        self._late_s = min(max(now - due, 0.0), seconds)
        return max(elapsed, seconds)


def work_of(slices: Iterable[Slice]) -> StepWork:
    """What a step's main pass computes. One row that yields a token counts as decoding, if it ends a prompt too."""
    prefill_tokens = prefill_squares = decode_rows = context_tokens = drafted_rows = 0
    for piece in slices:
        if piece.yields and piece.rows == 1:
            decode_rows += 1
            context_tokens += piece.end
            drafted_rows += len(piece.nodes)
        else:
            prefill_tokens += piece.rows
            prefill_squares += piece.end**2 - piece.start**2
    return StepWork(prefill_tokens, prefill_squares, decode_rows, context_tokens, drafted_rows)
