"""vLLM's KV connector: who waits for KV from elsewhere, who keeps its own, and what leaves while a step runs.

vLLM makes two of them, one beside its scheduler and one beside its model; all they have in common travels from the
first to the second in each step's metadata. Both live on the engine's thread. The blocks are vLLM's: this says when a
transfer has ended, and vLLM frees or uses them then.

    scheduler side   kv_transfer_params of a request: {"receive": tokens} or {"hold": True}
    model side       the KV tensors by layer, and each layer as it is computed
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)
from vllm.v1.request import RequestStatus

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request


@dataclass(slots=True)
class Load:
    """KV of a request's first `tokens` tokens comes from elsewhere, into `blocks` from number `first_block` on."""

    tokens: int
    first_block: int = 0
    blocks: list[int] = field(default_factory=list)
    cached: bool = False  # all of it is here already; nothing is reserved


@dataclass(slots=True)
class Outgoing:
    """A prompt whose finished blocks leave while it is computed. Blocks before `next_block` have left."""

    tokens: int
    next_block: int = 0


@dataclass(frozen=True, slots=True)
class Leaving:
    """Blocks of a request that are complete with this step: `blocks` are numbers first_block.. of its own."""

    request_id: str
    first_block: int
    blocks: list[int]


@dataclass(slots=True)
class StepMetadata(KVConnectorMetadata):
    """What the model side hears of the scheduler side in one step."""

    loaded: set[str] = field(default_factory=set)  # requests whose KV has come, as far as it will
    lost: set[int] = field(default_factory=set)  # blocks of those that will not be filled: vLLM computes them
    sent: set[str] = field(default_factory=set)  # finished requests whose blocks are not needed any more
    leaving: list[Leaving] = field(default_factory=list)


LayerSink = Callable[[Leaving, str, Tensor], None]


class TidemillConnector(KVConnectorBase_V1, SupportsHMA):
    """See the module."""

    def __init__(self, vllm_config: "VllmConfig", role: KVConnectorRole, kv_cache_config: "KVCacheConfig") -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._block_size = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        self._next = StepMetadata()
        self._loads: dict[str, Load] = {}
        self._held: dict[str, list[int]] = {}
        self._outgoing: dict[str, Outgoing] = {}
        self.layers: dict[str, Tensor] = {}
        self.on_layer: LayerSink | None = None  # called within the step, after each layer

    @property
    def requires_kv_delivery(self) -> bool:
        """A prompt that lost its blocks is computed again before it counts as finished."""
        return True

    # --- scheduler side: from the engine ------------------------------------------------------------------------

    def load(self, request_id: str) -> Load | None:
        return self._loads.get(request_id)

    def end_load(self, request_id: str, end_block: int) -> None:
        """The request's blocks before `end_block` are filled; vLLM computes the rest."""
        load = self._loads.pop(request_id)
        if load.blocks:
            self._next.loaded.add(request_id)
            self._next.lost.update(load.blocks[max(end_block, load.first_block) :])

    def held(self, request_id: str) -> list[int]:
        """Blocks of a finished request that are kept."""
        return self._held[request_id]

    def end_hold(self, request_id: str) -> None:
        """Its blocks may be freed."""
        del self._held[request_id]
        self._next.sent.add(request_id)

    def send_layers(self, request_id: str, first_block: int, tokens: int) -> None:
        """Hand every layer of the request's blocks first_block.. to `on_layer` in the step that completes them."""
        self._outgoing[request_id] = Outgoing(tokens, first_block)

    # --- scheduler side: from vLLM ------------------------------------------------------------------------------

    def on_new_request(self, request: "Request") -> None:
        tokens = (request.kv_transfer_params or {}).get("receive")
        if tokens is not None:
            self._loads[request.request_id] = Load(tokens)

    def get_num_new_matched_tokens(self, request: "Request", num_computed_tokens: int) -> tuple[int | None, bool]:
        load = self._loads.get(request.request_id)
        if load is None:
            return 0, False
        missing = load.tokens - num_computed_tokens
        load.cached = missing <= 0
        return (None, False) if load.cached else (missing, True)  # None: it is not its turn yet

    def update_state_after_alloc(self, request: "Request", blocks: "KVCacheBlocks", num_external_tokens: int) -> None:
        load = self._loads.get(request.request_id)
        if load is not None and num_external_tokens > 0:
            load.blocks = list(blocks.get_block_ids()[0])
            load.first_block = (load.tokens - num_external_tokens) // self._block_size

    def get_loaded_kv_cache_group_ids(self, request: "Request") -> tuple[int, ...]:
        return (0,)

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> StepMetadata:
        metadata, self._next = self._next, StepMetadata()
        if self._outgoing:
            metadata.leaving = self._leaving(scheduler_output)
        return metadata

    def _leaving(self, planned: "SchedulerOutput") -> list[Leaving]:
        cached = planned.scheduled_cached_reqs
        starts = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        starts |= {new.req_id: new.num_computed_tokens for new in planned.scheduled_new_reqs}
        state = planned.kv_connector_block_state
        found = []
        for request_id, outgoing in list(self._outgoing.items()):
            rows = planned.num_scheduled_tokens.get(request_id)
            if rows is None or state is None:
                continue
            computed = starts[request_id] + rows
            whole = computed >= outgoing.tokens
            end = -(-outgoing.tokens // self._block_size) if whole else computed // self._block_size
            if end > outgoing.next_block:
                blocks = list(state.get_block_ids(request_id)[0][outgoing.next_block : end])
                found.append(Leaving(request_id, outgoing.next_block, blocks))
                outgoing.next_block = end
            if whole:
                del self._outgoing[request_id]
        return found

    def request_finished_all_groups(
        self, request: "Request", block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """True: the blocks stay until `end_hold`."""
        request_id = request.request_id
        self._outgoing.pop(request_id, None)
        if request_id in self._loads:  # given up while KV is on its way: nobody fills the blocks any more
            self.end_load(request_id, 0)
        holds = (request.kv_transfer_params or {}).get("hold") and request.status != RequestStatus.FINISHED_ABORTED
        if holds:
            self._held[request_id] = list(block_ids[0])
        return bool(holds), None

    # --- model side ---------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        self.layers = kv_caches

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """KV is copied into the blocks between steps, as it comes."""

    def wait_for_layer_load(self, layer_name: str) -> None:
        """No step computes with blocks that are not filled."""

    def save_kv_layer(self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        metadata = self._metadata()
        if self.on_layer is not None:
            for leaving in metadata.leaving:
                self.on_layer(leaving, layer_name, kv_layer)

    def wait_for_save(self) -> None:
        """What leaves was copied layer by layer."""

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        metadata = self._metadata()
        return KVConnectorTransferResults(finished_sending=metadata.sent, finished_recving=metadata.loaded)

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._metadata().lost

    def _metadata(self) -> StepMetadata:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, StepMetadata)
        return metadata
