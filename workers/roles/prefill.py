"""Prefill: compute a prompt's KV in chunks and send each finished block to the lease it is for, while the next chunk is
computed.

    command -> engine.prefill -> each step: export what is full -> link -> lease
                              -> last step: export the rest, release the blocks, Prefilled
"""

from dataclasses import dataclass

from torch import Tensor

from tidemill.core.messages import (
    Cancel,
    Command,
    Failure,
    Lease,
    Migrate,
    Prefill,
    Prefilled,
    Proceed,
    Refusal,
    Resume,
)
from tidemill.core.metrics import Metrics
from tidemill.core.model import Request, Role
from tidemill.core.settings import Settings
from tidemill.types import SamplingParams
from workers.engine.base import Engine, RequestTooLong, SequenceProgress, StepOutput
from workers.kv.link import FeederFactory, KvMessage
from workers.kv.transfers import Deliver, Transfer, Transfers
from workers.roles.base import Outbox, fail, for_each, refuse

LINK_BACKLOG_BYTES = 64 << 20  # exported and not yet sent to one peer; more, and its finished blocks stay in the pool
MAX_BACKLOG_BYTES = 512 << 20  # to all peers; more, and the engine waits
BACKLOG_PAUSE_S = 0.002


@dataclass(slots=True, eq=False)
class Job:
    """A prompt on its way."""

    request: Request
    transfer: Transfer
    received_at: float
    started_at: float | None = None
    computed: bool = False  # its own blocks are free; copies may still be with the link
    by_layer: bool = False  # the blocks from the transfer's next on are being handed over while the step runs


@dataclass(frozen=True, slots=True)
class _Layers:
    """A job's workers.engine.base.LayerSink."""

    role: "PrefillRole"
    request_id: str
    first_block: int

    def take(self, layer: int, first_block: int, kv: Tensor) -> None:
        self.role.send_layer(self.request_id, layer, first_block, kv)


class PrefillRole:
    """See WorkerRole."""

    role = Role.PREFILL

    def __init__(
        self,
        engine: Engine,
        outbox: Outbox,
        settings: Settings,
        metrics: Metrics,
        feed: FeederFactory,
        deliver: Deliver,
    ) -> None:
        """`feed` and `deliver`: see Transfers."""
        self._engine = engine
        self._outbox = outbox
        self._settings = settings
        self._transfers = Transfers(engine, metrics, feed, deliver, self._on_sent, self._on_failed)
        self._jobs: dict[str, Job] = {}

    # --- commands -----------------------------------------------------------------------------------------------

    def handle(self, command: Command, now: float) -> None:
        match command:
            case Prefill(request, lease):
                self._start(request, lease, now)
            case Cancel(request_id):
                self.cancel(request_id)
            case Proceed() | Migrate() | Resume():
                pass  # for verify workers
            case _:
                refuse(self._outbox, command.request.id, Refusal.WRONG_ROLE)

    def _start(self, request: Request, lease: Lease, now: float) -> None:
        blocks = -(-request.kv_tokens // self._engine.info.kv.block_size)
        if sum(not job.computed for job in self._jobs.values()) >= self._settings.engine.max_waiting:
            return refuse(self._outbox, request.id, Refusal.QUEUE_FULL)
        if lease.end_block != blocks or not 0 <= lease.first_block < blocks:
            what = f"the lease is for blocks {lease.first_block}..{lease.end_block} of {blocks}"
            return fail(self._outbox, request.id, Failure.ENGINE, what)
        try:
            self._engine.prefill(request, _Layers(self, request.id, lease.first_block))
        except RequestTooLong:
            return refuse(self._outbox, request.id, Refusal.TOO_LONG)
        except ValueError as error:
            return fail(self._outbox, request.id, Failure.ENGINE, str(error))
        self._jobs[request.id] = Job(request, self._transfers.begin(request.id, lease, now), now)

    def cancel(self, request_id: str) -> None:
        job = self._jobs.pop(request_id, None)
        if job is not None:
            self._transfers.end(job.transfer)
        self._engine.release(request_id)
        self._outbox.forget(request_id)

    # --- steps --------------------------------------------------------------------------------------------------

    def poll(self, now: float) -> None:
        """The router watches the stage and the link its messages; here only unused links are closed."""
        self._transfers.poll(now)

    def next_step_at(self, now: float) -> float | None:
        if not self._engine.has_work():
            return None
        return now if self._transfers.backlog_bytes < MAX_BACKLOG_BYTES else now + BACKLOG_PAUSE_S

    def next_poll_at(self) -> float | None:
        return None

    def before_step(self, now: float) -> None:
        """Nothing is decided at the last moment."""

    def after_step(self, output: StepOutput, now: float) -> None:
        for progress in output.progress:
            job = self._jobs.get(progress.request_id)
            if job is not None:
                self._advance(job, progress, output.seconds, now)

    def _advance(self, job: Job, progress: SequenceProgress, step_s: float, now: float) -> None:
        if job.started_at is None:
            job.started_at = now - step_s
        transfer = job.transfer
        if progress.held:
            self._transfers.send(transfer, transfer.lease.end_block)
            # The copies belong to the link now; this worker's blocks are free at once.
            self._engine.release(job.request.id)
            job.computed = True
            self._outbox.emit(Prefilled(job.request.id, job.started_at - job.received_at, now - job.started_at))
            self._end_if_sent(job)
        elif self._transfers.feeder(transfer).backlog_bytes < LINK_BACKLOG_BYTES:
            self._transfers.send(transfer, progress.computed_tokens // self._engine.info.kv.block_size)

    def send_layer(self, request_id: str, layer: int, first_block: int, kv: Tensor) -> None:
        """Within a step: a layer of blocks that the step completes. They are exported afterwards unless the first layer
        is sent now; then all of them are."""
        job = self._jobs.get(request_id)
        if job is None or first_block != job.transfer.next_block:
            return
        if layer == 0:
            job.by_layer = self._transfers.feeder(job.transfer).backlog_bytes < LINK_BACKLOG_BYTES
        if job.by_layer:
            self._transfers.send_layer(job.transfer, layer, kv)

    def _end_if_sent(self, job: Job) -> None:
        if job.computed and job.transfer.unsent == 0:
            self._transfers.end(job.transfer)
            del self._jobs[job.request.id]
            self._outbox.forget(job.request.id)

    def _on_sent(self, transfer: Transfer, message: KvMessage) -> None:
        self._end_if_sent(self._jobs[transfer.request_id])

    def _on_failed(self, transfer: Transfer, why: str) -> None:
        self._fail(transfer.request_id, Failure.KV_LINK, why)

    # --- ends ---------------------------------------------------------------------------------------------------

    def _fail(self, request_id: str, failure: Failure, detail: str) -> None:
        fail(self._outbox, request_id, failure, detail)
        self.cancel(request_id)

    def drain(self) -> None:
        """Prompts that are not begun are computed elsewhere; the others are finished."""
        for_each([job.request.id for job in self._jobs.values() if job.started_at is None], self._hand_back)

    def _hand_back(self, request_id: str) -> None:
        refuse(self._outbox, request_id, Refusal.DRAINING)
        self.cancel(request_id)

    def give_up(self, failure: Failure, detail: str) -> None:
        for_each(self._jobs, lambda request_id: self._fail(request_id, failure, detail))
        self._jobs.clear()

    def close(self) -> None:
        self._transfers.close()

    @property
    def idle(self) -> bool:
        return not self._jobs

    def probe(self) -> None:
        """Compute one token's KV."""
        probe = Request("probe/prefill", (0, 0), SamplingParams(max_tokens=1, seed=0))
        try:
            self._engine.prefill(probe)
            held = any(progress.held for progress in self._engine.step().progress)
        finally:
            self._engine.release(probe.id)
        if not held:
            raise RuntimeError("prefill of a two-token prompt did not finish in one step")
