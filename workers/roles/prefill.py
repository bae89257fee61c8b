"""Prefill: compute a prompt's KV in chunks and send each finished block to the lease it is for, while the next chunk is
computed.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tidemill.core import metrics
from tidemill.core.messages import Cancel, Command, Failed, Failure, Lease, Prefill, Prefilled, Refusal, Refused
from tidemill.core.metrics import Metrics
from tidemill.core.model import Peer, Request, Role
from tidemill.core.settings import Settings
from tidemill.types import SamplingParams
from workers.engine.base import Engine, RequestTooLong, SequenceProgress, StepOutput
from workers.kv.link import KvMessage, Opener, Outgoing
from workers.roles.base import Outbox

MAX_BACKLOG_BYTES = 256 * 1024 * 1024  # exported and not yet sent; more, and the engine waits for the links
BACKLOG_PAUSE_S = 0.002


@dataclass(slots=True, eq=False)
class Job:
    """A prompt on its way. `next_block` is the first block not yet handed to the link."""

    request: Request
    lease: Lease
    received_at: float
    next_block: int
    started_at: float | None = None


class PrefillRole:
    """See WorkerRole."""

    role = Role.PREFILL

    def __init__(
        self,
        engine: Engine,
        outbox: Outbox,
        settings: Settings,
        metrics: Metrics,
        opener: Opener,
        post: Callable[[Callable[[], None]], None],
    ) -> None:
        """`opener` opens links; `post` brings a call from the links' threads to the engine's."""
        self._engine = engine
        self._outbox = outbox
        self._settings = settings
        self._metrics = metrics
        self._opener = opener
        self._post = post
        self._jobs: dict[str, Job] = {}
        self._sending: dict[str, int] = {}  # request -> messages handed to a link and not yet sent
        self._links: dict[str, Outgoing] = {}

    def handle(self, command: Command, now: float) -> None:
        match command:
            case Prefill(request, lease):
                self._start(request, lease, now)
            case Cancel(request_id):
                self.cancel(request_id)
            case _:
                self._refuse(command.request.id, Refusal.WRONG_ROLE)

    def _start(self, request: Request, lease: Lease, now: float) -> None:
        if len(self._jobs) >= self._settings.engine.max_waiting:
            return self._refuse(request.id, Refusal.QUEUE_FULL)
        try:
            self._engine.prefill(request)
        except RequestTooLong:
            return self._refuse(request.id, Refusal.TOO_LONG)
        except ValueError as error:
            self._outbox.emit(Failed(request.id, Failure.ENGINE, str(error)))
            return self._outbox.forget(request.id)
        self._jobs[request.id] = Job(request, lease, now, lease.first_block)

    def _refuse(self, request_id: str, reason: Refusal) -> None:
        self._outbox.emit(Refused(request_id, reason))
        self._outbox.forget(request_id)

    def cancel(self, request_id: str) -> None:
        self._engine.release(request_id)
        self._jobs.pop(request_id, None)
        self._sending.pop(request_id, None)
        self._outbox.forget(request_id)

    def poll(self, now: float) -> None:
        """Nothing waits for a time here: the router watches the stage, the link its messages."""

    def next_step_at(self, now: float) -> float | None:
        if not self._engine.has_work():
            return None
        backlog = sum(link.backlog_bytes for link in self._links.values())
        return now if backlog < MAX_BACKLOG_BYTES else now + BACKLOG_PAUSE_S

    def before_step(self, now: float) -> None:
        """Nothing to attach."""

    def after_step(self, output: StepOutput, now: float) -> None:
        for progress in output.progress:
            job = self._jobs.get(progress.request_id)
            if job is not None:
                self._advance(job, progress, output.seconds, now)

    def _advance(self, job: Job, progress: SequenceProgress, step_s: float, now: float) -> None:
        if job.started_at is None:
            job.started_at = now - step_s
        block_size = self._engine.info.kv.block_size
        ready = job.lease.end_block if progress.held else progress.computed_tokens // block_size
        if ready > job.next_block:
            self._send(job, ready)
        if progress.held:
            # The copies belong to the link now; this worker's blocks are free at once.
            self._engine.release(job.request.id)
            del self._jobs[job.request.id]
            self._outbox.emit(Prefilled(job.request.id, job.started_at - job.received_at, now - job.started_at))
            if job.request.id not in self._sending:
                self._outbox.forget(job.request.id)

    def _send(self, job: Job, end_block: int) -> None:
        kv = self._engine.export_kv(job.request.id, job.next_block, end_block)
        self._sending[job.request.id] = self._sending.get(job.request.id, 0) + 1
        self._link_to(job.lease.holder).put(KvMessage(job.lease.id, job.request.id, job.next_block, kv))
        job.next_block = end_block

    def _link_to(self, holder: Peer) -> Outgoing:
        key = str(holder.id)
        if key not in self._links:
            self._close_links_of(holder.id.name)  # an older incarnation of the same worker is gone
            self._links[key] = Outgoing(
                holder,
                self._opener,
                sent=lambda message, seconds: self._post(lambda: self._on_sent(message, seconds)),
                failed=lambda message, why: self._post(lambda: self._on_failed(message, why)),
            )
        return self._links[key]

    def _close_links_of(self, name: str) -> None:
        for key in [key for key, link in self._links.items() if link.to.id.name == name]:
            self._links.pop(key).close()

    def _on_sent(self, message: KvMessage, seconds: float) -> None:
        self._metrics.add(metrics.TRANSFER_BYTES, message.nbytes, direction="sent")
        self._metrics.observe(metrics.TRANSFER_TIME, seconds, direction="sent")
        left = self._sending.get(message.request_id, 0) - 1
        if left > 0:
            self._sending[message.request_id] = left
        elif left == 0:
            del self._sending[message.request_id]
            if message.request_id not in self._jobs:
                self._outbox.forget(message.request_id)

    def _on_failed(self, message: KvMessage, why: str) -> None:
        if message.request_id in self._sending:
            self._fail(message.request_id, Failure.KV_LINK, why)

    def _fail(self, request_id: str, failure: Failure, detail: str) -> None:
        self._outbox.emit(Failed(request_id, failure, detail))
        self.cancel(request_id)

    def engine_failed(self, detail: str) -> None:
        for request_id in list(self._jobs):
            self._fail(request_id, Failure.ENGINE, detail)

    def give_up(self, failure: Failure, detail: str) -> None:
        for request_id in dict.fromkeys([*self._jobs, *self._sending]):
            self._fail(request_id, failure, detail)

    def close(self) -> None:
        for link in self._links.values():
            link.close()
        self._links.clear()

    @property
    def idle(self) -> bool:
        return not self._jobs and not self._sending

    def probe(self) -> None:
        """Compute one token's KV."""
        probe = Request("probe/prefill", (0, 0), SamplingParams(max_tokens=1, seed=0))
        self._engine.prefill(probe)
        held = any(progress.held for progress in self._engine.step().progress)
        self._engine.release(probe.id)
        if not held:
            raise RuntimeError("prefill of a two-token prompt did not finish in one step")
