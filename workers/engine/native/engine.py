"""The native engine: continuous batching over one flattened forward pass a step."""

import time
from collections.abc import Sequence as Tokens
from pathlib import Path
from typing import Protocol

import torch
from tokenizers import Tokenizer
from torch import Tensor

from tidemill.core.messages import Draft
from tidemill.core.model import Request, WorkerLoad
from tidemill.core.settings import EngineSettings
from tidemill.core.text import TextStream, load_tokenizer
from tidemill.types import FinishReason, TokenLogprobs
from workers.engine.base import (
    EngineInfo,
    KvLayout,
    OutOfBlocks,
    RequestTooLong,
    Reservation,
    SequenceOutput,
    SequenceProgress,
    StepOutput,
)
from workers.engine.native.assembly import assemble, sample_rows
from workers.engine.native.batch import StepBatch
from workers.engine.native.model import NativeModel
from workers.engine.native.pool import ROOT, BlockPool, chain_hash
from workers.engine.native.scheduler import Scheduler, Slice
from workers.engine.native.sequence import Sequence, SequenceState
from workers.engine.sampling import Floats, choose, log_probabilities


class Model(Protocol):
    """What the engine asks of a model; `forward` is batch-invariant."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def context_length(self) -> int: ...
    @property
    def eos_token_ids(self) -> frozenset[int]: ...
    def layout(self, block_size: int) -> KvLayout: ...
    def new_kv(self, num_blocks: int, block_size: int) -> Tensor: ...
    def forward(self, batch: StepBatch, kv: Tensor) -> Tensor: ...


class NativeEngine:
    """See workers/engine/base.py for what each method promises."""

    kind = "native"

    def __init__(self, model: Model, settings: EngineSettings, tokenizer: Tokenizer | None = None) -> None:
        """`tokenizer` is needed for stop strings only."""
        self._model = model
        self._tokenizer = tokenizer
        self._block_size = settings.block_size
        self._kv = model.new_kv(settings.kv_blocks, settings.block_size)
        self._pool = BlockPool(settings.kv_blocks, caching=settings.prefix_cache)
        self._scheduler = Scheduler(self._pool, settings.block_size, settings.max_batch_tokens, settings.max_running)
        self._sequences: dict[str, Sequence] = {}
        self._steps = 0
        self._step_s = 0.0
        self.info = EngineInfo(
            kind=self.kind,
            vocab_size=model.vocab_size,
            # A sequence that fills the pool can be decoded no further, so the pool bounds the context too.
            context_length=min(model.context_length, settings.kv_blocks * settings.block_size),
            eos_token_ids=model.eos_token_ids,
            kv=model.layout(settings.block_size),
        )

    @classmethod
    def from_folder(cls, folder: Path, settings: EngineSettings) -> "NativeEngine":
        """Serve a Hugging Face folder. Raises ModelFolderError, TokenizerError, NoCompiler."""
        model = NativeModel.load(
            folder,
            dtype=getattr(torch, settings.dtype),
            device=torch.device(settings.device),
            kernels=settings.kernels,
            block_size=settings.block_size,
        )
        return cls(model, settings, load_tokenizer(folder))

    # --- work in ------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        self._wait(self._new_sequence(request, quota=None))

    def prefill(self, request: Request) -> None:
        self._wait(self._new_sequence(request, quota=0))

    def _wait(self, sequence: Sequence) -> None:
        self._sequences[sequence.request.id] = sequence
        self._scheduler.waiting.append(sequence)

    def _new_sequence(self, request: Request, quota: int | None) -> Sequence:
        if request.id in self._sequences:
            raise ValueError(f"request {request.id} is here already")
        tokens = list(request.tokens)
        if len(tokens) >= self.info.context_length:
            raise RequestTooLong(f"{len(tokens)} tokens leave no room in a context of {self.info.context_length}")
        sequence = Sequence(request, tokens, quota)
        if quota is None and request.sampling.stop:
            if self._tokenizer is None:
                raise ValueError("stop strings need a tokenizer")
            sequence.text = TextStream(self._tokenizer, request.sampling.stop)
            sequence.text.push(request.output)
        return sequence

    def rewrite(self, request_id: str, output: Tokens[int], quota: int) -> None:
        sequence = self._sequences[request_id]
        tokens = [*sequence.request.prompt, *output]
        kept = _common_prefix(sequence.tokens, tokens, sequence.computed)
        sequence.tokens = tokens
        sequence.quota = min(quota, self.info.context_length - len(tokens))
        self._roll_back(sequence, min(kept, len(tokens) - 1))
        if sequence.state is SequenceState.HELD:
            if sequence in self._scheduler.held:
                self._scheduler.held.remove(sequence)
                sequence.state = SequenceState.RUNNING
                self._scheduler.running.append(sequence)
            else:  # it was evicted meanwhile
                sequence.state = SequenceState.WAITING
                self._scheduler.waiting.append(sequence)

    def reserve(self, request: Request) -> Reservation:
        sequence = self._new_sequence(request, quota=None)
        self._scheduler.find_prefix(sequence)
        needed = -(-request.kv_tokens // self._block_size)
        first = len(sequence.blocks)
        try:
            sequence.blocks += self._pool.allocate(needed - first)
        except OutOfBlocks:
            self._pool.release(sequence.blocks)
            raise
        sequence.state = SequenceState.RECEIVING
        self._sequences[request.id] = sequence
        return Reservation(first, needed)

    def import_kv(self, request_id: str, first_block: int, kv: Tensor) -> None:
        sequence = self._sequences[request_id]
        count = kv.shape[1]
        if sequence.state is not SequenceState.RECEIVING:
            raise ValueError(f"request {request_id} is {sequence.state}, not receiving")
        if first_block < len(sequence.hashes) or first_block + count > len(sequence.blocks):
            raise ValueError(f"blocks {first_block}..{first_block + count} are not among those reserved")
        if kv.shape[2:] != self._kv.shape[2:] or kv.shape[0] != self._kv.shape[0] or kv.dtype != self._kv.dtype:
            raise ValueError(f"KV is {tuple(kv.shape)} {kv.dtype}, expected blocks of {self.info.kv}")
        self._kv[:, sequence.blocks[first_block : first_block + count]] = kv.to(self._kv.device)

    def activate(self, request_id: str) -> None:
        sequence = self._sequences[request_id]
        sequence.computed = sequence.request.kv_tokens
        self._publish(sequence)
        sequence.state = SequenceState.RUNNING
        self._scheduler.running.append(sequence)

    def export_kv(self, request_id: str, first_block: int, end_block: int) -> Tensor:
        blocks = self._sequences[request_id].blocks[first_block:end_block]
        return self._kv[:, blocks].cpu()

    def propose(self, draft: Draft) -> bool:
        sequence = self._sequences.get(draft.request_id)
        if sequence is None or not sequence.decoding or draft.base != len(sequence.tokens) or not draft.is_chain:
            return False
        room = min(sequence.room, self.info.context_length - len(sequence.tokens)) - 1  # a step yields one token anyway
        tokens = draft.tokens[: max(room, 0)]
        if not all(0 <= token < self.info.vocab_size for token in tokens):
            return False
        sequence.draft = tokens
        return bool(tokens)

    def release(self, request_id: str) -> None:
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None:
            self._scheduler.forget(sequence)

    # --- a step -------------------------------------------------------------------------------------------------

    def has_work(self) -> bool:
        return bool(self._scheduler.running or self._scheduler.waiting)

    def step(self) -> StepOutput:
        started = time.perf_counter()
        plan = self._scheduler.plan()
        if not plan.slices and not plan.reached:
            return StepOutput(preempted=tuple(each.request.id for each in plan.preempted))
        outputs, progress = self._run(plan.slices) if plan.slices else ([], [])
        progress += [self._report_progress(sequence) for sequence in plan.reached]
        self._steps += 1
        self._step_s = time.perf_counter() - started
        return StepOutput(
            tuple(outputs),
            tuple(progress),
            tuple(each.request.id for each in plan.preempted),
            sum(each.rows for each in plan.slices),
            self._step_s,
        )

    def _run(self, slices: list[Slice]) -> tuple[list[SequenceOutput], list[SequenceProgress]]:
        logits = self._model.forward(assemble(slices, self._block_size), self._kv).cpu().numpy()
        chosen = choose(logits, sample_rows(slices))
        outputs, progress = [], []
        row = 0
        for each in slices:
            if each.yields:
                end = row + 1 + len(each.draft)
                outputs.append(self._accept(each, chosen[row:end], logits[row:end]))
                row = end
            else:
                each.sequence.computed = each.start + each.rows
                self._publish(each.sequence)
                progress.append(self._report_progress(each.sequence))
        return outputs, progress

    def _accept(self, piece: Slice, chosen: list[int], logits: Floats) -> SequenceOutput:
        """Sample-match: the target's own choices count as long as the draft foresaw them, and the first it did not.

        A stop condition cuts the output as if each token had come in a step of its own.
        """
        sequence, draft = piece.sequence, piece.draft
        sequence.draft = ()
        tokens: list[int] = []
        logprobs: list[TokenLogprobs] = []
        finish: FinishReason | None = None
        wanted = sequence.request.sampling.logprobs
        for index, token in enumerate(chosen):
            finish = sequence.append(token, self.info.eos_token_ids, self.info.context_length)
            tokens.append(token)
            if wanted is not None and sequence.quota is None:
                logprobs.append(log_probabilities(logits[index], token, wanted))
            if finish or sequence.quota == 0 or index >= len(draft) or draft[index] != token:
                break
        sequence.computed = piece.start + piece.rows - len(draft) + len(tokens) - 1
        self._roll_back(sequence, sequence.computed)
        self._publish(sequence)
        if finish:
            self.release(sequence.request.id)
        elif sequence.quota == 0:
            self._hold(sequence)
        return SequenceOutput(sequence.request.id, tuple(tokens), tuple(logprobs), len(draft), len(tokens) - 1, finish)

    def _report_progress(self, sequence: Sequence) -> SequenceProgress:
        """A sequence with nothing left to compute is held from here on."""
        held = sequence.todo == 0
        if held:
            self._hold(sequence)
        return SequenceProgress(sequence.request.id, sequence.computed, held)

    def _hold(self, sequence: Sequence) -> None:
        self._scheduler.running.remove(sequence)
        self._scheduler.held.append(sequence)
        sequence.state = SequenceState.HELD

    def _roll_back(self, sequence: Sequence, computed: int) -> None:
        """Keep the KV of the first `computed` tokens; blocks past them are freed."""
        sequence.computed = min(sequence.computed, computed)
        keep = -(-sequence.computed // self._block_size)
        sequence.blocks, surplus = sequence.blocks[:keep], sequence.blocks[keep:]
        self._pool.release(surplus)
        self._unshare(sequence)

    def _unshare(self, sequence: Sequence) -> None:
        """A block that becomes partial again will be written to, so it may be neither cached nor shared."""
        full = sequence.computed // self._block_size
        if len(sequence.hashes) > full:
            del sequence.hashes[full:]
            if len(sequence.blocks) > full:
                self._pool.release(sequence.blocks[full:])
                del sequence.blocks[full:]
                sequence.computed = full * self._block_size

    def _publish(self, sequence: Sequence) -> None:
        """Enter blocks that have become full of committed tokens into the prefix cache."""
        for index in range(len(sequence.hashes), sequence.computed // self._block_size):
            start = index * self._block_size
            parent = sequence.hashes[-1] if sequence.hashes else ROOT
            contents = chain_hash(parent, sequence.tokens[start : start + self._block_size])
            self._pool.publish(sequence.blocks[index], contents)
            sequence.hashes.append(contents)

    # --- numbers ------------------------------------------------------------------------------------------------

    def load(self) -> WorkerLoad:
        receiving = [each for each in self._sequences.values() if each.state is SequenceState.RECEIVING]
        computing = [*self._scheduler.waiting, *self._scheduler.running]
        return WorkerLoad(
            queued_requests=len(self._scheduler.waiting),
            queued_tokens=sum(each.todo for each in computing if not each.decoding),
            running_requests=len(self._scheduler.running),
            kv_blocks_total=self._pool.num_blocks,
            kv_blocks_used=self._pool.used,
            kv_blocks_leased=sum(len(each.blocks) for each in receiving),
            block_size=self._block_size,
            steps=self._steps,
            step_s=self._step_s,
        )

    def check(self) -> None:
        """Raises AssertionError if blocks and sequences do not agree; for tests."""
        self._pool.check()
        held = [block for each in self._sequences.values() for block in each.blocks]
        assert len(set(held)) == self._pool.used, "a block is held by nobody"


def _common_prefix(left: Tokens[int], right: Tokens[int], limit: int) -> int:
    """Length of the common prefix, at most `limit`."""
    for index in range(min(limit, len(left), len(right))):
        if left[index] != right[index]:
            return index
    return min(limit, len(left), len(right))
