"""What the rest of Tidemill asks of an engine.

An engine is driven by one thread. Between steps the thread hands work in and takes KV out; `step` advances every
sequence that can advance. A sequence is in one of these states:

    WAITING    admitted, no blocks yet (or preempted: its KV will be computed again)
    RUNNING    computing its prompt in chunks, then decoding
    HELD       KV of all tokens but the last is here; a token tree may grow from them, until `release`
    RECEIVING  blocks are reserved for KV that comes from another worker; computed by nobody here
    PAUSED     decoding stopped between two steps; the blocks stay, until `resume` or `release`

The engine owns all KV blocks. `release` frees a sequence's blocks at once, in any state.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from tidemill.core.messages import Draft
from tidemill.core.model import Request, WorkerLoad
from tidemill.core.tree import EMPTY, TokenTree
from tidemill.types import FinishReason, TokenLogprobs


class OutOfBlocks(Exception):
    """The pool cannot hold the sequence now; nothing was allocated."""


class RequestTooLong(Exception):
    """The sequence cannot fit the pool, or the context, even when empty; nothing was allocated."""


@dataclass(frozen=True, slots=True)
class KvLayout:
    """Shape of one block of KV: tensor [layers, blocks, 2, kv_heads, block_size, head_dim] of `dtype`."""

    layers: int
    kv_heads: int
    head_dim: int
    block_size: int
    dtype: str  # "float32" or "bfloat16"
    packing: str = "rows"  # order inside a block; peers must agree on it, since blocks are moved whole

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers."""
        width = 4 if self.dtype == "float32" else 2
        return self.layers * 2 * self.kv_heads * self.block_size * self.head_dim * width

    def __str__(self) -> str:
        return f"{self.layers}x2x{self.kv_heads}x{self.block_size}x{self.head_dim}:{self.dtype}:{self.packing}"


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What an engine serves."""

    kind: str  # "native", "vllm", "emulated"
    vocab_size: int
    context_length: int
    eos_token_ids: frozenset[int]
    kv: KvLayout


@dataclass(frozen=True, slots=True)
class Reservation:
    """Blocks of a RECEIVING sequence: [first_block, end_block) must come, earlier ones were cached here."""

    first_block: int
    end_block: int


Successors = tuple[int, tuple[int, ...]]  # a token, and what the model finds likeliest after it, best first


@dataclass(frozen=True, slots=True)
class SequenceOutput:
    """New tokens of one sequence in one step. With `finish` set its blocks are already free."""

    request_id: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    drafted: int = 0
    accepted: int = 0
    finish: FinishReason | None = None
    successors: tuple[Successors, ...] = ()  # of each token that was computed, rejected ones too; see `tell_successors`


@dataclass(frozen=True, slots=True)
class SequenceProgress:
    """KV of a sequence's first `computed_tokens` tokens is in the pool, after a step that computed a part of it.

    Reported for steps that yield the sequence no token; `held` when it has reached its goal and waits.
    """

    request_id: str
    computed_tokens: int
    held: bool


@dataclass(frozen=True, slots=True)
class GrowingTree:
    """A tree that is being drafted; nodes in `done` were computed, or cannot be. ROOT is one of them."""

    tree: TokenTree = EMPTY
    done: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one step did."""

    outputs: tuple[SequenceOutput, ...] = ()
    progress: tuple[SequenceProgress, ...] = ()
    preempted: tuple[str, ...] = ()
    grown: tuple[str, ...] = ()  # requests whose trees were attended to
    batch_tokens: int = 0  # rows of the flattened forward
    seconds: float = 0.0


class LayerSink(Protocol):
    """Takes a prompt's KV layer by layer, while the step that computes it still runs; called on the engine's thread."""

    @property
    def first_block(self) -> int:
        """Earlier blocks are not wanted."""
        ...

    def take(self, layer: int, first_block: int, kv: torch.Tensor) -> None:
        """`kv` [1, n, 2, kv_heads, block_size, head_dim] is one layer of the blocks first_block.., and the sink's own.

        Layers come in order; the last one completes the blocks.
        """
        ...


class Engine(Protocol):
    """One model on one accelerator. Not thread-safe: one thread calls it."""

    @property
    def info(self) -> EngineInfo: ...

    def submit(self, request: Request) -> None:
        """Compute the request's KV here and decode until it finishes.

        Raises RequestTooLong if it can never fit. Otherwise it waits its turn.
        """
        ...

    def prefill(self, request: Request, sink: LayerSink | None = None) -> None:
        """Compute the KV of `request.kv_tokens` tokens, report progress, then hold. Raises RequestTooLong.

        An engine that can look into its steps hands each layer of the blocks a step completes to `sink`; blocks that
        no sink took are there for `export_kv` afterwards.
        """
        ...

    def follow(self, request_id: str, output: Sequence[int]) -> None:
        """The output of a sequence that was prefilled is this now: keep the KV of the common prefix.

        If it is longer than before, so much of its tree stays as follows it. Raises KeyError if unknown, ValueError if
        the context is too short.
        """
        ...

    def grow(self, request_id: str, nodes: Sequence[int], width: int) -> bool:
        """Have the next step compute nodes of a HELD sequence's tree and add the `width` likeliest children of each.

        ROOT stands for the sequence's last token. A child's chance is how likely the model takes it, or thereabouts if
        it samples: then those that win with the request's own noise come first. False, and nothing happens, if the
        sequence is not HELD. Raises KeyError if unknown.
        """
        ...

    def growth(self, request_id: str) -> GrowingTree:
        """The tree of a sequence, if it has one. Raises KeyError if unknown."""
        ...

    def foresee(self, request_ids: Sequence[str], depth: int, width: int, layers: int) -> dict[str, TokenTree]:
        """Draft with the model's first `layers` for those of the requests that decode now; nothing else changes."""
        ...

    def tell_successors(self, count: int) -> None:
        """From now on outputs carry the `count` likeliest successors of the tokens computed; 0: none."""
        ...

    def reserve(self, request: Request, headroom_tokens: int = 0) -> Reservation:
        """Allocate blocks for KV of `request.kv_tokens` tokens that comes from elsewhere, and of so many more as it may
        get before that, but never more than it can have.

        Raises OutOfBlocks, RequestTooLong.
        """
        ...

    def import_kv(self, request_id: str, first_block: int, kv: torch.Tensor, first_layer: int = 0) -> None:
        """Copy `kv` [layers, n, 2, kv_heads, block_size, head_dim] into blocks first_block.. of a RECEIVING sequence,
        layers first_layer.. of them.

        Raises KeyError if unknown, ValueError on a shape or range that does not fit.
        """
        ...

    def activate(self, request_id: str, end_block: int | None = None, output: Sequence[int] = ()) -> None:
        """KV of a RECEIVING sequence came, all of it or that of the blocks before `end_block`: compute what is missing
        and decode it until it finishes. `output`: what it got elsewhere since it was reserved; its KV came too.

        Raises KeyError if unknown, ValueError if `output` does not fit what was reserved, or ends the request.
        """
        ...

    def pause(self, request_id: str) -> bool:
        """Decode a sequence no further, and keep its blocks. False, and nothing happens, if it is not decoding."""
        ...

    def resume(self, request_id: str) -> None:
        """Decode a PAUSED sequence on; nothing happens if it is not paused."""
        ...

    def export_kv(self, request_id: str, first_block: int, end_block: int) -> torch.Tensor:
        """Copy of a sequence's blocks, [layers, n, 2, kv_heads, block_size, head_dim], on the CPU for CPU engines."""
        ...

    def propose(self, draft: Draft) -> bool:
        """Attach a draft for the sequence's next step. False: stale, unknown or not verifiable; nothing happened."""
        ...

    def limit_prompts(self, tokens: int) -> None:
        """The next step computes at most so many tokens of prompts, unless it would have nothing else to do.

        An engine may disregard it, which changes the speed of requests and nothing else.
        """
        ...

    def release(self, request_id: str) -> None:
        """Forget a sequence and free its blocks; nothing happens if unknown."""
        ...

    def has_work(self) -> bool:
        """True if `step` would advance, or admit, some sequence."""
        ...

    def step(self) -> StepOutput:
        """Advance all sequences that can: decodes first, then prefill chunks up to the token budget."""
        ...

    def load(self) -> WorkerLoad:
        """Queue, running and block counts now."""
        ...
