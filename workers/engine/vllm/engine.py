"""The vLLM engine: one vLLM inside this process, driven step by step by the worker's engine thread.

    submit    -> vLLM's queue ------------------------------------------> its tokens, step by step
    prefill   -> vLLM's queue, for one token -> HELD: vLLM keeps the blocks until `release`
    reserve   -> a step aside: vLLM allocates -> RECEIVING -> import_kv ... -> activate -> as above
    pause     -> it runs, but in no step -> PAUSED -> `resume` or `release`

Copies between links and blocks are made between steps, on this thread, so no step sees half a block.
"""

import secrets
import time
from collections.abc import Sequence as Tokens
from pathlib import Path

from tokenizers import Tokenizer
from torch import Tensor
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.distributed.kv_transfer.kv_connector.utils import get_current_attn_backends
from vllm.exceptions import VLLMClientError
from vllm.outputs import RequestOutput
from vllm.v1.engine.llm_engine import LLMEngine

from tidemill.core.messages import Draft
from tidemill.core.model import Request, WorkerLoad
from tidemill.core.settings import EngineSettings
from tidemill.core.text import TextStream, load_tokenizer
from tidemill.core.tree import TokenTree
from workers.engine.base import (
    EngineInfo,
    GrowingTree,
    LayerSink,
    OutOfBlocks,
    RequestTooLong,
    Reservation,
    SequenceOutput,
    SequenceProgress,
    StepOutput,
)
from workers.engine.vllm.blocks import KvBlocks
from workers.engine.vllm.connector import Leaving, Load, TidemillConnector
from workers.engine.vllm.scheduler import TidemillScheduler
from workers.engine.vllm.sequence import Sequence, State
from workers.engine.vllm.start import eos_token_ids, start_vllm


class VllmEngine:
    """See workers/engine/base.py for what each method promises, and docs/engines.md for what vLLM cannot."""

    kind = "vllm"

    def __init__(
        self, folder: Path, settings: EngineSettings, longest_draft: int, tokenizer: Tokenizer | None = None
    ) -> None:
        """One in a process. `longest_draft`: tokens of a draft that a step verifies; 0: drafts are refused, and min_p
        is not. `tokenizer` is needed for stop strings only. Raises what vLLM raises for the folder."""
        self._vllm: LLMEngine = start_vllm(folder, settings, longest_draft)
        self._tokenizer = tokenizer
        self._longest_draft = longest_draft
        self._seeded = settings.device != "cpu"  # vLLM 0.32 cannot wind a CPU generator back after a prompt's chunk
        core = self._vllm.engine_core.engine_core
        self._scheduler: TidemillScheduler = core.scheduler
        self._connector: TidemillConnector = core.scheduler.get_kv_connector()  # beside the scheduler
        beside_model = get_kv_transfer_group()
        assert isinstance(beside_model, TidemillConnector)
        beside_model.on_layer = self._layer_computed
        if len(core.scheduler.kv_cache_config.kv_cache_groups) != 1:
            raise ValueError(f"{folder}: layers keep KV of several kinds, which cannot be handed over")
        self._pool = self._scheduler.kv_cache_manager.block_pool
        kernel = "+".join(each.get_name() for each in get_current_attn_backends(self._vllm.vllm_config))
        self._blocks = KvBlocks(beside_model.layers, self._pool.num_gpu_blocks, settings.block_size, kernel)
        self._sequences: dict[str, Sequence] = {}
        self._by_inner_id: dict[str, Sequence] = {}
        self._held_at_once: list[Sequence] = []  # nothing to compute; told by the next step
        self._steps = 0
        self._step_s = 0.0
        model = self._vllm.model_config
        self.info = EngineInfo(
            self.kind, model.get_vocab_size(), model.max_model_len, eos_token_ids(model), self._blocks.layout
        )

    @classmethod
    def from_folder(cls, folder: Path, settings: EngineSettings, longest_draft: int) -> "VllmEngine":
        """Serve a Hugging Face folder. Raises TokenizerError, and what vLLM raises."""
        return cls(folder, settings, longest_draft, load_tokenizer(folder))

    # --- work in ------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        self._add(self._new_sequence(request, decodes=True), {})

    def prefill(self, request: Request, sink: LayerSink | None = None) -> None:
        sequence = self._new_sequence(request, decodes=False)
        sequence.sink = sink
        if request.kv_tokens == 0:
            sequence.state = State.HELD
            self._held_at_once.append(sequence)
            return
        self._add(sequence, {"hold": True})
        if sink is not None:
            self._connector.send_layers(sequence.inner_id, sink.first_block, request.kv_tokens)

    def _new_sequence(self, request: Request, *, decodes: bool) -> Sequence:
        sampling, tokens = request.sampling, list(request.tokens)
        if request.id in self._sequences:
            raise ValueError(f"request {request.id} is here already")
        if not request.prompt:
            raise ValueError(f"request {request.id} has an empty prompt")
        if len(tokens) >= self.info.context_length:
            raise RequestTooLong(f"{len(tokens)} tokens leave no room in a context of {self.info.context_length}")
        sequence = Sequence(request, decodes, tokens)
        if decodes and sequence.room <= 0:
            raise ValueError(f"request {request.id} has its {sampling.max_tokens} tokens already")
        if decodes and sampling.stop:
            if self._tokenizer is None:
                raise ValueError("stop strings need a tokenizer")
            sequence.text = TextStream(self._tokenizer, sampling.stop)
            sequence.text.push(request.output)
        self._sequences[request.id] = sequence
        return sequence

    def _add(self, sequence: Sequence, transfer: dict[str, object], unknown: int = 0) -> None:
        """Hand it to vLLM. Raises ValueError for parameters vLLM does not take; then it is forgotten.

        `unknown`: so many tokens more, which are not known yet. All its blocks are its own then, since no block of it
        may be found in the prefix cache by what stands for them.
        """
        prompt: dict[str, object] = {"prompt_token_ids": sequence.tokens if sequence.decodes else sequence.tokens[:-1]}
        if unknown:
            prompt = {"prompt_token_ids": [*sequence.tokens, *[0] * unknown], "cache_salt": secrets.token_hex(8)}
        try:
            asked = sequence.asked(self.info.eos_token_ids, transfer, seeded=self._seeded)
            sequence.inner_id = self._vllm.add_request(sequence.request.id, prompt, asked)
        except (ValueError, VLLMClientError) as error:
            del self._sequences[sequence.request.id]
            raise ValueError(str(error)) from error
        self._by_inner_id[sequence.inner_id] = sequence

    # --- KV from and to elsewhere -------------------------------------------------------------------------------

    def reserve(self, request: Request, headroom_tokens: int = 0) -> Reservation:
        sequence = self._new_sequence(request, decodes=True)
        room = min(sequence.room, self.info.context_length - len(sequence.tokens))  # of it the last one needs no KV
        more = min(headroom_tokens, room - 1)
        sequence.reserved_tokens = request.kv_tokens + more
        sequence.state = State.RECEIVING
        if not sequence.reserved_tokens:
            return Reservation(0, 0)
        load = self._allocate(sequence, more)
        if load.cached:
            end = -(-request.kv_tokens // self._blocks.layout.block_size)
            return Reservation(end, end)
        if not load.blocks:
            self.release(request.id)
            free = self._pool.get_num_free_blocks()
            raise OutOfBlocks(f"{sequence.reserved_tokens} tokens of KV wanted, {free} blocks free, some for growth")
        return Reservation(load.first_block, len(load.blocks))

    def _allocate(self, sequence: Sequence, unknown: int = 0) -> Load:
        """Have vLLM find what it has of the KV and allocate blocks for the rest; it has none if they are too few."""
        self._add(sequence, {"receive": sequence.reserved_tokens}, unknown)
        self._step_aside(sequence.inner_id)
        load = self._connector.load(sequence.inner_id)
        assert load is not None
        return load

    def import_kv(self, request_id: str, first_block: int, kv: Tensor, first_layer: int = 0) -> None:
        load = self._connector.load(self._receiving(request_id).inner_id)
        end_block = first_block + kv.shape[1]
        if load is None or first_block < load.first_block or end_block > len(load.blocks):
            raise ValueError(f"blocks {first_block}..{end_block} are not among those reserved")
        self._blocks.put(load.blocks[first_block:end_block], kv, first_layer)

    def activate(self, request_id: str, end_block: int | None = None, output: Tokens[int] = ()) -> None:
        sequence = self._receiving(request_id)
        for token in output:
            if sequence.append(token, self.info.eos_token_ids, self.info.context_length):
                raise ValueError(f"request {request_id} is over with the tokens it got elsewhere")
        if output or sequence.moving:
            self._replace(sequence, len(output))
        sequence.state = State.COMPUTING
        load = self._connector.load(sequence.inner_id)
        if load is None:
            self._add(sequence, {})
            return
        self._connector.end_load(sequence.inner_id, len(load.blocks) if end_block is None else end_block)
        if load.blocks:
            self._step_aside()

    def _replace(self, sequence: Sequence, new_tokens: int) -> None:
        """Put the request with all its tokens in the place of the one that had blocks for them. vLLM has no way to
        tell a request tokens: the one goes, the other gets blocks, of which there are enough then, and a copy."""
        before = self._connector.load(sequence.inner_id)
        kv_tokens, size = len(sequence.tokens) - 1, self._blocks.layout.block_size
        if before is None or kv_tokens > len(before.blocks) * size:
            raise ValueError(f"{new_tokens} tokens came meanwhile, more than blocks were reserved for")
        self._drop(sequence)
        self._step_aside()
        sequence.reserved_tokens = kv_tokens
        load = self._allocate(sequence)
        assert load.blocks or load.cached, "there are as many blocks as it had"
        missing = slice(load.first_block, len(load.blocks))
        self._blocks.copy(before.blocks[missing], load.blocks[missing])

    def _drop(self, sequence: Sequence) -> None:
        """vLLM knows it no more."""
        self._vllm.abort_request([sequence.inner_id], internal=True)
        del self._by_inner_id[sequence.inner_id]

    def pause(self, request_id: str) -> bool:
        sequence = self._sequences.get(request_id)
        if sequence is None or sequence.state is not State.COMPUTING or not self._scheduler.pause(sequence.inner_id):
            return False
        sequence.state = State.PAUSED
        sequence.chain.clear()
        return True

    def resume(self, request_id: str) -> None:
        sequence = self._sequences.get(request_id)
        if sequence is not None and sequence.state is State.PAUSED:
            self._scheduler.resume(sequence.inner_id)
            sequence.state = State.COMPUTING

    def _receiving(self, request_id: str) -> Sequence:
        sequence = self._sequences[request_id]
        if sequence.state is not State.RECEIVING:
            raise ValueError(f"request {request_id} is {sequence.state}, not receiving")
        return sequence

    def export_kv(self, request_id: str, first_block: int, end_block: int) -> Tensor:
        sequence = self._sequences[request_id]
        blocks, computed = self._computed_blocks(sequence)
        if not 0 <= first_block <= end_block <= len(blocks):
            raise ValueError(f"blocks {first_block}..{end_block} are not all computed: {computed} tokens are")
        return self._blocks.take(blocks[first_block:end_block])

    def _computed_blocks(self, sequence: Sequence) -> tuple[list[int], int]:
        """Blocks with KV in them, and how many tokens' that is."""
        if sequence.state is State.HELD:
            return (self._connector.held(sequence.inner_id) if sequence.inner_id else []), sequence.request.kv_tokens
        inner = self._scheduler.requests.get(sequence.inner_id)
        if inner is None or sequence.state is State.RECEIVING:
            return [], 0
        blocks = self._scheduler.kv_cache_manager.get_block_ids(sequence.inner_id)[0]
        return blocks[: -(-inner.num_computed_tokens // self._blocks.layout.block_size)], inner.num_computed_tokens

    def _layer_computed(self, leaving: Leaving, layer: str, kv: Tensor) -> None:
        """Within a step: a layer's KV of blocks that this step completes."""
        sequence = self._by_inner_id.get(leaving.request_id)
        if sequence is not None and sequence.sink is not None:
            number = self._blocks.names.index(layer)
            sequence.sink.take(number, leaving.first_block, self._blocks.take_layer(number, leaving.blocks))

    # --- drafts -------------------------------------------------------------------------------------------------

    def propose(self, draft: Draft) -> bool:
        sequence = self._sequences.get(draft.request_id)
        if sequence is None or sequence.state is not State.COMPUTING or draft.base != len(sequence.tokens):
            return False
        if not all(0 <= token < self.info.vocab_size for token in draft.tree.tokens):
            return False
        room = min(sequence.room, self.info.context_length - len(sequence.tokens)) - 1  # a step yields one token anyway
        chain = draft.tree.best_chain(min(room, self._longest_draft))
        if not chain or not self._scheduler.propose(sequence.inner_id, chain):
            return False
        sequence.chain = chain
        return True

    def limit_prompts(self, tokens: int) -> None:
        """Disregarded: vLLM's scheduler decides what a step computes."""

    def follow(self, request_id: str, output: Tokens[int]) -> None:
        raise ValueError(f"request {request_id}: vLLM drafts for nobody; the draft pool runs the native engine")

    def grow(self, request_id: str, nodes: Tokens[int], width: int) -> bool:
        """Never: see `follow`."""
        return False

    def growth(self, request_id: str) -> GrowingTree:
        return GrowingTree()

    def foresee(self, request_ids: Tokens[str], depth: int, width: int, layers: int) -> dict[str, TokenTree]:
        """Nothing: vLLM runs all layers or none."""
        return {}

    def tell_successors(self, count: int) -> None:
        """Nothing: vLLM keeps its logits to itself. A source that lives on them drafts nothing."""

    # --- ends ---------------------------------------------------------------------------------------------------

    def release(self, request_id: str) -> None:
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return
        if sequence.state is State.HELD and sequence.inner_id:
            self._connector.end_hold(sequence.inner_id)
        elif sequence.inner_id:
            self._scheduler.resume(sequence.inner_id)
            self._vllm.abort_request([sequence.inner_id], internal=True)
        self._forget(sequence)
        if sequence.state is not State.COMPUTING:
            self._step_aside()  # vLLM frees what a transfer held at the end of a step

    def _forget(self, sequence: Sequence) -> None:
        del self._sequences[sequence.request.id]
        self._by_inner_id.pop(sequence.inner_id, None)
        if sequence in self._held_at_once:
            self._held_at_once.remove(sequence)

    # --- a step -------------------------------------------------------------------------------------------------

    def has_work(self) -> bool:
        return bool(self._held_at_once) or any(each.state is State.COMPUTING for each in self._sequences.values())

    def step(self) -> StepOutput:
        if not self.has_work():
            return StepOutput()
        started = time.perf_counter()
        answers = self._vllm.step()
        planned = self._scheduler.planned
        assert planned is not None
        outputs = [self._take(answer) for answer in answers]
        told = {each.request_id for each in outputs if each is not None}
        progress = [SequenceProgress(each.request.id, 0, True) for each in self._held_at_once]
        self._held_at_once.clear()
        for inner_id in planned.num_scheduled_tokens:
            sequence = self._by_inner_id.get(inner_id)
            if sequence is not None and sequence.request.id not in told:
                progress.append(self._progress(sequence))
        preempted = [self._by_inner_id[each].request.id for each in planned.preempted_req_ids or ()]
        self._steps += 1
        self._step_s = time.perf_counter() - started
        return StepOutput(
            tuple(each for each in outputs if each is not None),
            tuple(progress),
            tuple(preempted),
            batch_tokens=planned.total_num_scheduled_tokens,
            seconds=self._step_s,
        )

    def _take(self, answer: RequestOutput) -> SequenceOutput | None:
        """New tokens; None for a prompt that was computed to be held."""
        sequence, completion = self._sequences[answer.request_id], answer.outputs[0]
        if completion.finish_reason == "error":
            raise RuntimeError(f"vLLM gave request {answer.request_id} up: {completion.stop_reason}")
        if not sequence.decodes:
            sequence.state = State.HELD
            return None
        output = sequence.accept(completion, self.info.eos_token_ids, self.info.context_length)
        if output.finish is not None:
            if not answer.finished:  # at a stop string, which vLLM was not told of
                self._vllm.abort_request([sequence.inner_id], internal=True)
            self._forget(sequence)
        return output

    def _progress(self, sequence: Sequence) -> SequenceProgress:
        held = sequence.state is State.HELD
        sequence.chain.clear()
        return SequenceProgress(sequence.request.id, self._computed_blocks(sequence)[1], held)

    def _step_aside(self, admit: str | None = None) -> None:
        """Computes nothing; see TidemillScheduler."""
        with self._scheduler.aside(admit):
            self._vllm.step()

    # --- numbers ------------------------------------------------------------------------------------------------

    def load(self) -> WorkerLoad:
        running, waiting = self._scheduler.get_request_counts()
        receiving = [each for each in self._sequences.values() if each.state is State.RECEIVING]
        loads = [self._connector.load(each.inner_id) for each in receiving if each.inner_id]
        inner = self._scheduler.requests
        computing = [each for each in self._sequences.values() if each.state is State.COMPUTING]
        todo = [each.num_prompt_tokens - each.num_computed_tokens for s in computing if (each := inner.get(s.inner_id))]
        total = self._pool.num_gpu_blocks - 1  # one is vLLM's own
        return WorkerLoad(
            queued_requests=max(waiting - len(loads), 0),
            queued_tokens=sum(max(each, 0) for each in todo),
            running_requests=running,
            kv_blocks_total=total,
            kv_blocks_used=total - self._pool.get_num_free_blocks(),
            kv_blocks_leased=sum(len(each.blocks) for each in loads if each is not None),
            block_size=self._blocks.layout.block_size,
            steps=self._steps,
            step_s=self._step_s,
        )

    def check(self) -> None:
        """Raises AssertionError if blocks and sequences do not agree; for tests."""
        inner = [each.inner_id for each in self._sequences.values() if each.inner_id]
        assert set(inner) == set(self._scheduler.requests), (inner, list(self._scheduler.requests))
        blocks = {b for each in inner for b in self._scheduler.kv_cache_manager.get_block_ids(each)[0]}
        assert len(blocks) == self.load().kv_blocks_used, (blocks, self.load())

    def close(self) -> None:
        """Frees what vLLM holds in this process."""
        self._vllm.engine_core.shutdown()
