"""Prefill: compute a prompt's KV in chunks and send each finished block to the lease it is for, while the next chunk is
computed.

    command -> engine.prefill -> each step: export what is full -> link -> lease
                              -> last step: export the rest, release the blocks, Prefilled
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from tidemill.core import metrics
from tidemill.core.messages import Cancel, Command, Failure, Lease, Prefill, Prefilled, Proceed, Refusal
from tidemill.core.metrics import Metrics
from tidemill.core.model import Peer, Request, Role, WorkerId
from tidemill.core.settings import Settings
from tidemill.types import SamplingParams
from workers.engine.base import Engine, RequestTooLong, SequenceProgress, StepOutput
from workers.kv.link import Feeder, FeederFactory, KvMessage
from workers.roles.base import Outbox, fail, for_each, refuse

LINK_BACKLOG_BYTES = 64 << 20  # exported and not yet sent to one peer; more, and its finished blocks stay in the pool
MAX_BACKLOG_BYTES = 512 << 20  # to all peers; more, and the engine waits
MAX_MESSAGE_BYTES = 4 << 20  # of one message; stays in the cache between the socket and the pool
BACKLOG_PAUSE_S = 0.002
LINK_IDLE_S = 300.0  # a link nobody used for so long is closed; half of what its receiver bears with


@dataclass(slots=True, eq=False)
class Job:
    """A prompt on its way. `next_block` is the first block not yet handed to the link."""

    request: Request
    lease: Lease
    received_at: float
    next_block: int
    started_at: float | None = None
    computed: bool = False  # its own blocks are free; copies may still be with the link
    unsent: int = 0  # messages with the link
    by_layer: bool = False  # the blocks from `next_block` on are being handed over while the step runs


@dataclass(slots=True, eq=False)
class Link:
    """The way to one verify worker."""

    feeder: Feeder
    used_at: float


@dataclass(frozen=True, slots=True)
class _Layers:
    """A job's workers.engine.base.LayerSink."""

    role: "PrefillRole"
    job: Job

    @property
    def first_block(self) -> int:
        return self.job.lease.first_block

    def take(self, layer: int, first_block: int, kv: Tensor) -> None:
        self.role.send_layer(self.job, layer, first_block, kv)


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
        deliver: Callable[[Callable[[], None]], None],
    ) -> None:
        """`feed` makes the way to a peer; `deliver` brings a call from its thread to the engine's."""
        self._engine = engine
        self._outbox = outbox
        self._settings = settings
        self._metrics = metrics
        self._feed = feed
        self._deliver = deliver
        self._jobs: dict[str, Job] = {}
        self._links: dict[WorkerId, Link] = {}

    # --- commands -----------------------------------------------------------------------------------------------

    def handle(self, command: Command, now: float) -> None:
        match command:
            case Prefill(request, lease):
                self._start(request, lease, now)
            case Cancel(request_id):
                self.cancel(request_id)
            case Proceed():
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
        job = Job(request, lease, now, lease.first_block)
        try:
            self._engine.prefill(request, _Layers(self, job))
        except RequestTooLong:
            return refuse(self._outbox, request.id, Refusal.TOO_LONG)
        except ValueError as error:
            return fail(self._outbox, request.id, Failure.ENGINE, str(error))
        self._jobs[request.id] = job
        self._link_to(lease.holder, now).feeder.prepare()

    def cancel(self, request_id: str) -> None:
        self._engine.release(request_id)
        job = self._jobs.pop(request_id, None)
        if job is not None and job.lease.holder.id in self._links:
            self._links[job.lease.holder.id].feeder.drop(job.lease.id)
        self._outbox.forget(request_id)

    # --- steps --------------------------------------------------------------------------------------------------

    def poll(self, now: float) -> None:
        """The router watches the stage and the link its messages; here only unused links are closed."""
        busy = {job.lease.holder.id for job in self._jobs.values()}
        for holder, link in list(self._links.items()):
            if holder in busy:
                link.used_at = now
            elif now - link.used_at > LINK_IDLE_S:
                self._links.pop(holder).feeder.close()

    def next_step_at(self, now: float) -> float | None:
        if not self._engine.has_work():
            return None
        backlog = sum(link.feeder.backlog_bytes for link in self._links.values())
        return now if backlog < MAX_BACKLOG_BYTES else now + BACKLOG_PAUSE_S

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
        feeder = self._link_to(job.lease.holder, now).feeder
        if progress.held:
            self._send(job, job.lease.end_block, feeder)
            # The copies belong to the link now; this worker's blocks are free at once.
            self._engine.release(job.request.id)
            job.computed = True
            self._outbox.emit(Prefilled(job.request.id, job.started_at - job.received_at, now - job.started_at))
            self._end_if_sent(job)
        elif feeder.backlog_bytes < LINK_BACKLOG_BYTES:
            self._send(job, progress.computed_tokens // self._engine.info.kv.block_size, feeder)

    def _send(self, job: Job, end_block: int, feeder: Feeder) -> None:
        """Hand blocks [next_block, end_block) to the link, in messages of a bounded size."""
        at_once = max(MAX_MESSAGE_BYTES // self._engine.info.kv.block_bytes, 1)
        while job.next_block < end_block:
            until = min(job.next_block + at_once, end_block)
            kv = self._engine.export_kv(job.request.id, job.next_block, until)
            feeder.put(KvMessage(job.lease.id, job.request.id, job.next_block, kv))
            job.next_block = until
            job.unsent += 1

    def send_layer(self, job: Job, layer: int, first_block: int, kv: Tensor) -> None:
        """Within a step: a layer of blocks that the step completes. They are exported afterwards unless the first layer
        is sent now; then all of them are."""
        link = self._links.get(job.lease.holder.id)
        if link is None or first_block != job.next_block:
            return
        if layer == 0:
            job.by_layer = link.feeder.backlog_bytes < LINK_BACKLOG_BYTES
        if job.by_layer:
            link.feeder.put(KvMessage(job.lease.id, job.request.id, first_block, kv, layer))
            job.unsent += 1
            if layer == self._engine.info.kv.layers - 1:
                job.next_block += kv.shape[1]

    def _end_if_sent(self, job: Job) -> None:
        if job.computed and job.unsent == 0:
            del self._jobs[job.request.id]
            self._outbox.forget(job.request.id)

    # --- links --------------------------------------------------------------------------------------------------

    def _link_to(self, holder: Peer, now: float) -> Link:
        if holder.id not in self._links:
            for old in [each for each in self._links if each.name == holder.id.name]:
                self._leave(old, f"{holder.id} has taken its place")
            self._links[holder.id] = Link(
                self._feed(
                    holder,
                    lambda message, seconds: self._deliver(lambda: self._on_sent(message, seconds)),
                    lambda message, why: self._deliver(lambda: self._on_failed(message, why)),
                ),
                now,
            )
        return self._links[holder.id]

    def _leave(self, holder: WorkerId, why: str) -> None:
        self._links.pop(holder).feeder.close()
        theirs = [request_id for request_id, job in self._jobs.items() if job.lease.holder.id == holder]
        for_each(theirs, lambda request_id: self._fail(request_id, Failure.KV_LINK, f"{holder} is gone: {why}"))

    def _job_of(self, message: KvMessage) -> Job | None:
        """None if it was given up meanwhile, or has come back under another lease."""
        job = self._jobs.get(message.request_id)
        return job if job is not None and job.lease.id == message.lease_id else None

    def _on_sent(self, message: KvMessage, seconds: float) -> None:
        self._metrics.add(metrics.TRANSFER_BYTES, message.nbytes, direction="sent")
        self._metrics.observe(metrics.TRANSFER_TIME, seconds, direction="sent")
        job = self._job_of(message)
        if job is not None:
            job.unsent -= 1
            self._end_if_sent(job)

    def _on_failed(self, message: KvMessage, why: str) -> None:
        if self._job_of(message) is not None:
            self._fail(message.request_id, Failure.KV_LINK, why)

    # --- ends ---------------------------------------------------------------------------------------------------

    def _fail(self, request_id: str, failure: Failure, detail: str) -> None:
        fail(self._outbox, request_id, failure, detail)
        self.cancel(request_id)

    def give_up(self, failure: Failure, detail: str) -> None:
        for_each(self._jobs, lambda request_id: self._fail(request_id, failure, detail))
        self._jobs.clear()

    def close(self) -> None:
        for link in self._links.values():
            link.feeder.close()
        self._links.clear()

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
