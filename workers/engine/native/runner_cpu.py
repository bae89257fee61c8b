"""Runs the decoder with the compiled CPU kernels: one C call a step."""

from ctypes import CDLL, POINTER, Structure, byref, c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from workers.engine.native.batch import StepBatch
from workers.engine.native.build import load_kernels
from workers.engine.native.config import ModelConfig
from workers.engine.native.memory import Arena
from workers.engine.native.weights import ModelWeights

SIZE_STEP = 16  # channels of the widest vectors
MAX_HEAD_DIM = 256
MAX_HEADS = 128
PROJECTIONS = {"qkv": 1, "output": 1, "gate_up": 2, "down": 1}  # and how many matrices share their panels


class _Layer(Structure):
    _fields_ = [(name, c_void_p) for name in ("input_norm", "qkv", "output", "post_norm", "gate_up", "down", "q_norm",
                                              "k_norm", "qkv_bias", "output_bias")]  # fmt: skip


class _Decoder(Structure):
    _fields_ = [
        *((name, c_int32) for name in ("is_bf16", "layers", "hidden", "intermediate", "heads", "kv_heads", "head_dim",
                                       "vocabulary")),
        ("eps", c_float),
        ("scale", c_float),
        ("layer", POINTER(_Layer)),
        *((name, c_void_p) for name in ("final_norm", "head", "cosines")),
    ]  # fmt: skip


class _Step(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("rows", "logit_rows", "copies")),
        *((name, c_int32) for name in ("layers", "sequences", "table_width", "block_size", "threads")),
        *((name, c_void_p) for name in ("positions", "slots", "logit_row", "copy_row", "copy_slot", "starts", "context",
                                        "tables")),
        *((name, c_void_p) for name in ("residual", "normed", "qkv", "mixed", "gated")),
        ("kv", c_void_p),
        ("kv_layer_stride", c_int64),
        ("logits", c_void_p),
    ]  # fmt: skip


def load_library() -> CDLL:
    """The compiled kernels with their signatures. Raises NoCompiler."""
    library = load_kernels()
    library.decoder_forward.argtypes = [POINTER(_Decoder), POINTER(_Step)]
    library.decoder_forward.restype = None
    library.packed_size.argtypes = [c_int64, c_int64, c_int32]
    library.packed_size.restype = c_int64
    library.pack.argtypes = [c_int32, c_void_p, c_void_p, c_int64, c_int64, c_int32]
    library.pack.restype = None
    library.panel_columns.restype = c_int64
    return library


def unsupported(config: ModelConfig, block_size: int) -> str | None:
    """Why the compiled kernels cannot run a model, or None if they can."""
    sizes = (config.hidden_size, config.intermediate_size, config.head_dim, block_size)
    if any(size % SIZE_STEP for size in sizes):
        return f"hidden, feed-forward, head and block sizes must be multiples of {SIZE_STEP}, not {sizes}"
    if config.head_dim > MAX_HEAD_DIM:
        return f"heads of at most {MAX_HEAD_DIM} channels, not {config.head_dim}"
    if config.num_heads > MAX_HEADS:
        return f"at most {MAX_HEADS} heads, not {config.num_heads}"
    return None


class CpuRunner:
    """Holds the packed weights and the scratch memory; `forward` is not reentrant."""

    packing = "pairs"  # how keys and values lie inside a KV block: see kernels/attention.h

    def __init__(self, config: ModelConfig, weights: ModelWeights, dtype: torch.dtype) -> None:
        self._config = config
        self._dtype = dtype
        self._library = load_library()
        self._embedding = weights.embedding
        self._kept: list[Tensor] = []  # whatever the structs point to
        self._arena = self._new_arena(weights)
        self._scratch_rows = 0
        self._scratch: list[Tensor] = []
        self._decoder = self._describe(weights)
        self._step = _Step()

    def _new_arena(self, weights: ModelWeights) -> Arena:
        """Room for all packed matrices; they lie in the order in which a step reads them."""
        size, layer, count = self._library.packed_size, weights.layers[0], len(weights.layers)
        of_layer = sum(size(*getattr(layer, name).shape, parts) for name, parts in PROJECTIONS.items())
        of_head = size(*weights.head.shape, 1)
        return Arena(count * of_layer + of_head, count * len(PROJECTIONS) + 1, self._dtype)

    def _describe(self, weights: ModelWeights) -> _Decoder:
        config = self._config
        layers = (_Layer * config.num_layers)()
        for into, layer in zip(layers, weights.layers, strict=True):
            for name, parts in PROJECTIONS.items():
                setattr(into, name, self._packed(getattr(layer, name), parts))
            for name in ("input_norm", "post_norm", "q_norm", "k_norm"):
                setattr(into, name, self._pointer(getattr(layer, name)))
            for name in ("qkv_bias", "output_bias"):
                setattr(into, name, self._padded_bias(getattr(layer, name)))
        return _Decoder(
            is_bf16=self._dtype is torch.bfloat16,
            layers=config.num_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            vocabulary=config.vocab_size,
            eps=config.rms_norm_eps,
            scale=config.head_dim**-0.5,
            layer=layers,
            final_norm=self._pointer(weights.final_norm),
            head=self._packed(weights.head, 1),
            cosines=self._pointer(config.cosines(torch.device("cpu"))),
        )

    def _pointer(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        contiguous = tensor.contiguous()
        self._kept.append(contiguous)
        return contiguous.data_ptr()

    def _packed(self, weight: Tensor, parts: int) -> int:
        packed = self._arena.take(self._library.packed_size(*weight.shape, parts))
        source = weight.contiguous()
        is_bf16 = int(self._dtype is torch.bfloat16)
        self._library.pack(is_bf16, source.data_ptr(), packed.data_ptr(), *weight.shape, parts)
        return packed.data_ptr()

    def _padded_bias(self, bias: Tensor | None) -> int | None:
        if bias is None:
            return None
        panel = self._library.panel_columns()
        padded = torch.zeros(-(-bias.numel() // panel) * panel)
        padded[: bias.numel()] = bias.float()
        return self._pointer(padded)

    def _grow_scratch(self, rows: int) -> None:
        config = self._config
        queries = config.num_heads * config.head_dim
        widths = {
            "normed": config.hidden_size,
            "qkv": queries + 2 * config.num_kv_heads * config.head_dim,
            "mixed": queries,
            "gated": config.intermediate_size,
        }
        self._scratch = [torch.empty(rows, width, dtype=self._dtype) for width in widths.values()]
        for name, tensor in zip(widths, self._scratch, strict=True):
            setattr(self._step, name, tensor.data_ptr())
        self._scratch_rows = rows

    def forward(self, batch: StepBatch, kv: Tensor) -> Tensor:
        """Float32 logits [R, vocabulary]; keys and values of all rows are written to `kv`."""
        rows, wanted = batch.token_ids.numel(), batch.logit_rows.numel()
        if max(rows, wanted) > self._scratch_rows:
            self._grow_scratch(max(rows, wanted))
        residual = self._embedding[batch.token_ids]
        logits = torch.empty(wanted, self._config.vocab_size)
        step = self._step
        step.rows, step.logit_rows, step.copies = rows, wanted, batch.copy_rows.numel()
        step.layers = self._config.num_layers if batch.layers is None else batch.layers
        step.sequences, step.table_width = batch.block_tables.shape
        step.block_size = kv.shape[4]
        step.threads = torch.get_num_threads()
        step.positions, step.slots = batch.positions.data_ptr(), batch.slots.data_ptr()
        step.logit_row, step.starts = batch.logit_rows.data_ptr(), batch.query_starts.data_ptr()
        step.copy_row, step.copy_slot = batch.copy_rows.data_ptr(), batch.copy_slots.data_ptr()
        step.context, step.tables = batch.context_lengths.data_ptr(), batch.block_tables.data_ptr()
        step.residual, step.logits = residual.data_ptr(), logits.data_ptr()
        step.kv, step.kv_layer_stride = kv.data_ptr(), kv.stride(0)
        self._library.decoder_forward(byref(self._decoder), byref(step))
        return logits
