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
from tidemill.core.tree import EMPTY, ROOT, TokenTree
from tidemill.types import TokenLogprobs
from workers.engine.base import (
    EngineInfo,
    GrowingTree,
    KvLayout,
    LayerSink,
    OutOfBlocks,
    RequestTooLong,
    Reservation,
    SequenceOutput,
    SequenceProgress,
    StepOutput,
    Successors,
)
from workers.engine.native.assembly import assemble, block_copies, sample_rows
from workers.engine.native.batch import StepBatch
from workers.engine.native.drafting import Drafting
from workers.engine.native.growth import Copies
from workers.engine.native.model import NativeModel
from workers.engine.native.pool import BlockPool
from workers.engine.native.scheduler import Scheduler, Slice
from workers.engine.native.sequence import Sequence, SequenceState
from workers.engine.native.table import BlockTable
from workers.engine.sampling import Chooser, Floats, Sampler, likeliest_tokens, log_probabilities

CATCH_UP = 64  # tokens a held sequence may be behind, and still grow its tree in the step that computes them


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
        self._drafting = Drafting(
            self._forward,
            self._chooser,
            lambda sequence: sequence in self._scheduler.held,
            settings.block_size,
            settings.max_batch_tokens,
        )
        self._sequences: dict[str, Sequence] = {}
        self._prompt_limit: int | None = None  # of the next step
        self._successors = 0  # how many outputs tell of each token
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
        self._scheduler.wait(self._new_sequence(request, decodes=True))

    def prefill(self, request: Request, sink: LayerSink | None = None) -> None:
        """A step is one call of its kernels, so layers cannot be handed out within it."""
        self._scheduler.wait(self._new_sequence(request, decodes=False))

    def _new_sequence(self, request: Request, *, decodes: bool) -> Sequence:
        """Known from here on, but in no queue."""
        sampling, tokens = request.sampling, list(request.tokens)
        if request.id in self._sequences:
            raise ValueError(f"request {request.id} is here already")
        if not request.prompt:
            raise ValueError(f"request {request.id} has an empty prompt")
        if len(tokens) >= self.info.context_length:
            raise RequestTooLong(f"{len(tokens)} tokens leave no room in a context of {self.info.context_length}")
        sampler = Sampler(sampling, request.prompt, request.output)
        sequence = Sequence(request, tokens, decodes, BlockTable(self._pool), sampler)
        if decodes and sequence.room <= 0:
            raise ValueError(f"request {request.id} has its {sampling.max_tokens} tokens already")
        if decodes and sampling.stop:
            if self._tokenizer is None:
                raise ValueError("stop strings need a tokenizer")
            sequence.text = TextStream(self._tokenizer, sampling.stop)
            sequence.text.push(request.output)
        self._sequences[request.id] = sequence
        return sequence

    def follow(self, request_id: str, output: Tokens[int]) -> None:
        sequence = self._sequences[request_id]
        excess = len(sequence.request.prompt) + len(output) - self.info.context_length
        if excess > 0:
            raise ValueError(f"the output is {excess} tokens longer than the context of {self.info.context_length}")
        if sequence.decodes:
            raise ValueError(f"request {request_id} decodes")
        sequence.follow(list(output))
        if sequence.state is SequenceState.HELD and (sequence.todo > CATCH_UP or sequence not in self._scheduler.held):
            self._scheduler.resume(sequence)

    def grow(self, request_id: str, nodes: Tokens[int], width: int) -> bool:
        sequence = self._sequences[request_id]
        if sequence not in self._scheduler.held:
            return False
        self._drafting.ask(sequence, nodes, width)
        return True

    def growth(self, request_id: str) -> GrowingTree:
        growth = self._sequences[request_id].growth
        return GrowingTree(growth.tree, growth.done) if growth is not None else GrowingTree()

    def foresee(self, request_ids: Tokens[str], depth: int, width: int, layers: int) -> dict[str, TokenTree]:
        if not 0 < layers <= self.info.kv.layers:
            raise ValueError(f"{layers} layers of {self.info.kv.layers}")
        sequences = [self._sequences[each] for each in request_ids if each in self._sequences]
        decoding = [each for each in sequences if each.decoding]
        return self._drafting.foresee(decoding, depth, width, layers, self.info.context_length)

    def tell_successors(self, count: int) -> None:
        self._successors = min(count, self.info.vocab_size)

    def reserve(self, request: Request, headroom_tokens: int = 0) -> Reservation:
        sequence = self._new_sequence(request, decodes=True)
        self._scheduler.receive(sequence)
        sequence.kv.adopt(sequence.tokens)
        first = len(sequence.kv.blocks)
        room = min(sequence.room, self.info.context_length - len(sequence.tokens))  # of it the last one needs no KV
        wanted = request.kv_tokens + min(headroom_tokens, room - 1)
        if not self._scheduler.fits(sequence, wanted):
            missing, available = sequence.kv.missing(wanted), self._pool.available
            self.release(request.id)
            raise OutOfBlocks(f"{missing} KV blocks wanted, {available} available, some of them for growth")
        sequence.kv.grow(wanted)
        return Reservation(first, len(sequence.kv.blocks))

    def import_kv(self, request_id: str, first_block: int, kv: Tensor, first_layer: int = 0) -> None:
        table, count = self._receiving(request_id).kv, kv.shape[1]
        if first_block < table.published or first_block + count > len(table.blocks):
            raise ValueError(f"blocks {first_block}..{first_block + count} are not among those reserved")
        layers = self._kv[first_layer : first_layer + kv.shape[0]]
        if kv.shape[2:] != layers.shape[2:] or kv.shape[0] != layers.shape[0] or kv.dtype != layers.dtype:
            raise ValueError(f"KV is {tuple(kv.shape)} {kv.dtype}, expected blocks of {self.info.kv}")
        layers[:, list(table.blocks[first_block : first_block + count])] = kv.to(self._kv.device)

    def activate(self, request_id: str, end_block: int | None = None, output: Tokens[int] = ()) -> None:
        sequence = self._receiving(request_id)
        wanted = len(sequence.tokens) + len(output) - 1
        if sequence.kv.missing(wanted):
            raise ValueError(f"{len(output)} tokens came meanwhile, more than blocks were reserved for")
        for token in output:
            if sequence.append(token, self.info.eos_token_ids, self.info.context_length):
                raise ValueError(f"request {request_id} is over with the tokens it got elsewhere")
        came = wanted if end_block is None else min(end_block * self._block_size, wanted)
        sequence.kv.advance(sequence.tokens, max(came, sequence.kv.computed))
        if end_block is None:
            sequence.kv.trim()
        self._scheduler.run(sequence)

    def pause(self, request_id: str) -> bool:
        sequence = self._sequences.get(request_id)
        if sequence is None or not sequence.decoding:
            return False
        sequence.draft = EMPTY
        self._scheduler.pause(sequence)
        return True

    def resume(self, request_id: str) -> None:
        sequence = self._sequences.get(request_id)
        if sequence is not None and sequence in self._scheduler.paused:
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
        if sequence is None or not sequence.decoding or draft.base != len(sequence.tokens):
            return False
        tokens = draft.tree.tokens
        if min(tokens, default=0) < 0 or max(tokens, default=0) >= self.info.vocab_size:
            return False
        room = min(sequence.room, self.info.context_length - len(sequence.tokens)) - 1  # a step yields one token anyway
        sequence.draft = draft.tree.up_to(room)
        return bool(sequence.draft)

    def limit_prompts(self, tokens: int) -> None:
        self._prompt_limit = tokens

    def release(self, request_id: str) -> None:
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None:
            self._drafting.forget(sequence)
            self._scheduler.forget(sequence)

    # --- a step -------------------------------------------------------------------------------------------------

    def has_work(self) -> bool:
        return len(self._drafting) > 0 or self._scheduler.has_work()

    def step(self) -> StepOutput:
        started = time.perf_counter()
        plan = self._scheduler.plan(self._prompt_limit)
        self._prompt_limit = None
        preempted = tuple(each.request.id for each in plan.preempted)
        if not plan.slices and not plan.reached and not self._drafting:
            return StepOutput(preempted=preempted)
        try:
            outputs, progress = self._run(plan.slices) if plan.slices else ([], [])
        finally:
            for piece in plan.slices:
                piece.release()
        progress += [self._report_progress(sequence) for sequence in plan.reached]
        grown, rows = self._drafting.step(self.info.context_length)
        self._steps += 1
        self._step_s = time.perf_counter() - started
        return StepOutput(
            tuple(outputs),
            tuple(progress),
            preempted,
            tuple(each.request.id for each in grown),
            plan.batch_tokens + rows,
            self._step_s,
        )

    def _forward(self, batch: StepBatch, copies: Copies) -> Tensor:
        """Logits of a batch, after these KV blocks were copied."""
        if copies:
            sources, targets = zip(*copies, strict=True)
            self._kv[:, list(targets)] = self._kv[:, list(sources)]
        return self._model.forward(batch, self._kv)

    def _run(self, slices: list[Slice]) -> tuple[list[SequenceOutput], list[SequenceProgress]]:
        """If the model or the sampling raises, every sequence is as it was."""
        batch = assemble(slices, self._block_size)
        logits = self._forward(batch, block_copies(slices, self._block_size)).cpu().numpy()
        chosen: list[int] = np.argmax(logits, -1).tolist()
        to_sample = sample_rows(slices)
        if to_sample:
            self._chooser.choose(chosen, logits, to_sample)
        outputs, progress = [], []
        row = 0
        for piece in slices:
            if piece.yields:
                end = row + 1 + len(piece.nodes)
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
        sequence, places = piece.sequence, piece.places
        sequence.draft = EMPTY
        tokens: list[int] = []
        logprobs: list[TokenLogprobs] = []
        accepted, finish = 0, None
        wanted = sequence.request.sampling.logprobs
        node: int | None = ROOT
        while node in places:
            at, index = node, places[node]
            token = chosen[index]
            finish = sequence.append(token, self.info.eos_token_ids, self.info.context_length)
            tokens.append(token)
            if wanted is not None:
                logprobs.append(log_probabilities(logits[index], token, wanted))
            node = piece.draft.child(at, token)
            accepted += node in places
            if finish:
                break
        self._keep_path(piece, at, piece.end + len(tokens) - 1)
        successors = self._successors_in(piece, sequence.tokens[-len(tokens) - 1], logits) if self._successors else ()
        if finish:
            self.release(sequence.request.id)
        return SequenceOutput(
            sequence.request.id, tuple(tokens), tuple(logprobs), len(places) - 1, accepted, finish, successors
        )

    def _successors_in(self, piece: Slice, root: int, logits: Floats) -> tuple[Successors, ...]:
        """`logits` [1 + nodes, vocabulary] of the root's row and the nodes'."""
        likeliest = likeliest_tokens(logits, self._successors).tolist()
        tokens = [root, *(piece.draft.tokens[node] for node in piece.nodes)]
        return tuple((token, tuple(after)) for token, after in zip(tokens, likeliest, strict=True))

    def _keep_path(self, piece: Slice, node: int, computed: int) -> None:
        """The sequence goes on in the table of the path to `node`; KV of its first `computed` tokens is there."""
        table = piece.sequence.kv
        for path in piece.paths:
            if path.branch is not None and node in path.nodes:
                table.follow(path.branch)
        table.advance(piece.sequence.tokens, computed)
        if piece.paths:
            table.trim()

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
        holders.update(b for each in self._sequences.values() if each.growth for b in each.growth.held_blocks)
        assert holders == {block: n for block in range(self._pool.num_blocks) if (n := self._pool.references(block))}
        for each in self._sequences.values():
            each.kv.check(each.tokens)
            assert each.kv.computed < len(each.tokens)
