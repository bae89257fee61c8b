"""The native engine: continuous batching over one flattened forward pass a step."""

import time
from collections import Counter
from collections.abc import Sequence as Tokens
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from tidemill.core.messages import Draft
from tidemill.core.model import Request, WorkerLoad
from tidemill.core.settings import EngineSettings
from tidemill.core.text import TextStream, load_tokenizer
from tidemill.types import TokenLogprobs
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
from workers.engine.native.pool import BlockPool
from workers.engine.native.scheduler import Scheduler, Slice
from workers.engine.native.sequence import Sequence, SequenceState
from workers.engine.native.table import BlockTable
from workers.engine.sampling import Chooser, Floats, Sampler, log_probabilities


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
        self._pool = BlockPool(settings.kv_blocks, settings.block_size, caching=settings.prefix_cache)
        self._scheduler = Scheduler(self._pool, settings.max_batch_tokens, settings.max_running)
        self._chooser = Chooser(model.vocab_size)
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
        self._scheduler.wait(self._new_sequence(request, quota=None))

    def prefill(self, request: Request) -> None:
        self._scheduler.wait(self._new_sequence(request, quota=0))

    def _new_sequence(self, request: Request, quota: int | None) -> Sequence:
        """Known from here on, but in no queue."""
        sampling, tokens = request.sampling, list(request.tokens)
        if request.id in self._sequences:
            raise ValueError(f"request {request.id} is here already")
        if not request.prompt:
            raise ValueError(f"request {request.id} has an empty prompt")
        if len(tokens) >= self.info.context_length:
            raise RequestTooLong(f"{len(tokens)} tokens leave no room in a context of {self.info.context_length}")
        sampler = Sampler(sampling, request.prompt, request.output)
        sequence = Sequence(request, tokens, quota, BlockTable(self._pool), sampler)
        if quota is None and sequence.room <= 0:
            raise ValueError(f"request {request.id} has its {sampling.max_tokens} tokens already")
        if quota is None and sampling.stop:
            if self._tokenizer is None:
                raise ValueError("stop strings need a tokenizer")
            sequence.text = TextStream(self._tokenizer, sampling.stop)
            sequence.text.push(request.output)
        self._sequences[request.id] = sequence
        return sequence

    def rewrite(self, request_id: str, output: Tokens[int], quota: int) -> None:
        sequence = self._sequences[request_id]
        room = self.info.context_length - len(sequence.request.prompt) - len(output)
        if room < 0:
            raise ValueError(f"the output is {-room} tokens longer than the context of {self.info.context_length}")
        if sequence.state is SequenceState.RECEIVING:
            raise ValueError(f"request {request_id} waits for its KV")
        sequence.replace_output(list(output), max(min(quota, room), 0))
        if sequence.state is SequenceState.HELD:
            self._scheduler.resume(sequence)

    def reserve(self, request: Request) -> Reservation:
        sequence = self._new_sequence(request, quota=None)
        self._scheduler.receive(sequence)
        sequence.kv.adopt(sequence.tokens)
        first = len(sequence.kv.blocks)
        if not self._scheduler.fits(sequence, request.kv_tokens):
            missing, available = sequence.kv.missing(request.kv_tokens), self._pool.available
            self.release(request.id)
            raise OutOfBlocks(f"{missing} KV blocks wanted, {available} available, some of them for growth")
        sequence.kv.grow(request.kv_tokens)
        return Reservation(first, len(sequence.kv.blocks))

    def import_kv(self, request_id: str, first_block: int, kv: Tensor) -> None:
        table, count = self._receiving(request_id).kv, kv.shape[1]
        if first_block < table.published or first_block + count > len(table.blocks):
            raise ValueError(f"blocks {first_block}..{first_block + count} are not among those reserved")
        if kv.shape[2:] != self._kv.shape[2:] or kv.shape[0] != self._kv.shape[0] or kv.dtype != self._kv.dtype:
            raise ValueError(f"KV is {tuple(kv.shape)} {kv.dtype}, expected blocks of {self.info.kv}")
        self._kv[:, list(table.blocks[first_block : first_block + count])] = kv.to(self._kv.device)

    def activate(self, request_id: str) -> None:
        sequence = self._receiving(request_id)
        sequence.kv.advance(sequence.tokens, sequence.request.kv_tokens)
        self._scheduler.run(sequence)

    def _receiving(self, request_id: str) -> Sequence:
        sequence = self._sequences[request_id]
        if sequence.state is not SequenceState.RECEIVING:
            raise ValueError(f"request {request_id} is {sequence.state}, not receiving")
        return sequence

    def export_kv(self, request_id: str, first_block: int, end_block: int) -> Tensor:
        table = self._sequences[request_id].kv
        if not 0 <= first_block <= end_block <= -(-table.computed // self._block_size):
            raise ValueError(f"blocks {first_block}..{end_block} are not all computed: {table.computed} tokens are")
        blocks = torch.tensor(table.blocks[first_block:end_block].tolist(), dtype=torch.int64, device=self._kv.device)
        return self._kv.index_select(1, blocks).cpu()

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
        return self._scheduler.has_work()

    def step(self) -> StepOutput:
        started = time.perf_counter()
        plan = self._scheduler.plan()
        preempted = tuple(each.request.id for each in plan.preempted)
        if not plan.slices and not plan.reached:
            return StepOutput(preempted=preempted)
        outputs, progress = self._run(plan.slices) if plan.slices else ([], [])
        progress += [self._report_progress(sequence) for sequence in plan.reached]
        rows = sum(piece.end - piece.start for piece in plan.slices)
        self._steps += 1
        self._step_s = time.perf_counter() - started
        return StepOutput(tuple(outputs), tuple(progress), preempted, rows, self._step_s)

    def _run(self, slices: list[Slice]) -> tuple[list[SequenceOutput], list[SequenceProgress]]:
        """If the model or the sampling raises, every sequence is as it was."""
        batch = assemble(slices, self._block_size)
        logits = self._model.forward(batch, self._kv).cpu().numpy()
        chosen: list[int] = np.argmax(logits, -1).tolist()
        to_sample = sample_rows(slices)
        if to_sample:
            self._chooser.choose(chosen, logits, to_sample)
        outputs, progress = [], []
        row = 0
        for piece in slices:
            if piece.yields:
                end = row + 1 + len(piece.draft)
                outputs.append(self._accept(piece, chosen[row:end], logits[row:end]))
                row = end
            else:
                piece.sequence.kv.advance(piece.sequence.tokens, piece.end)
                progress.append(self._report_progress(piece.sequence))
        return outputs, progress

    def _accept(self, piece: Slice, chosen: list[int], logits: Floats) -> SequenceOutput:
        """Sample-match: the target's own choices count as long as the draft foresaw them, and the first it did not.

        A stop condition cuts the output as if each token had come in a step of its own.
        """
        sequence, draft = piece.sequence, piece.draft
        sequence.draft = ()
        tokens: list[int] = []
        logprobs: list[TokenLogprobs] = []
        accepted, finish = 0, None
        wanted = sequence.request.sampling.logprobs if sequence.quota is None else None
        for index, token in enumerate(chosen):
            finish = sequence.append(token, self.info.eos_token_ids, self.info.context_length)
            tokens.append(token)
            if wanted is not None:
                logprobs.append(log_probabilities(logits[index], token, wanted))
            foreseen = index < len(draft) and draft[index] == token
            accepted += foreseen
            if finish or sequence.quota == 0 or not foreseen:
                break
        sequence.kv.advance(sequence.tokens, piece.start + piece.rows + len(tokens) - 1)
        if finish:
            self.release(sequence.request.id)
        else:
            if draft:
                sequence.kv.trim()
            if sequence.quota == 0:
                self._scheduler.hold(sequence)
        return SequenceOutput(sequence.request.id, tuple(tokens), tuple(logprobs), len(draft), accepted, finish)

    def _report_progress(self, sequence: Sequence) -> SequenceProgress:
        """A sequence with nothing left to compute is held from here on."""
        held = sequence.todo == 0
        if held:
            self._scheduler.hold(sequence)
        return SequenceProgress(sequence.request.id, sequence.kv.computed, held)

    # --- numbers ------------------------------------------------------------------------------------------------

    def load(self) -> WorkerLoad:
        scheduler = self._scheduler
        return WorkerLoad(
            queued_requests=len(scheduler.waiting),
            queued_tokens=sum(each.goal for each in scheduler.waiting)
            + sum(each.todo for each in scheduler.running if not each.decoding),
            running_requests=len(scheduler.running),
            kv_blocks_total=self._pool.num_blocks,
            kv_blocks_used=self._pool.used,
            kv_blocks_leased=sum(len(each.kv.blocks) for each in scheduler.receiving),
            block_size=self._block_size,
            steps=self._steps,
            step_s=self._step_s,
        )

    def check(self) -> None:
        """Raises AssertionError if blocks, sequences and queues do not agree; for tests."""
        self._pool.check()
        self._scheduler.check()
        holders = Counter(block for each in self._sequences.values() for block in each.kv.blocks)
        assert holders == {block: n for block in range(self._pool.num_blocks) if (n := self._pool.references(block))}
        for each in self._sequences.values():
            each.kv.check(each.tokens)
            assert each.kv.computed < len(each.tokens)
