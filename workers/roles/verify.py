"""Verify and decode: hold leases until their KV is here, then give every request a token, or several, each step.

Drafts are asked for after each step and attached before the next; a step waits for them only so long.
"""

import logging
from dataclasses import dataclass

from torch import Tensor

from tidemill.core import metrics
from tidemill.core.lifecycle import LeaseState
from tidemill.core.messages import (
    Cancel,
    Command,
    DraftReply,
    Failed,
    Failure,
    FirstToken,
    Lease,
    LeaseGranted,
    Refusal,
    Refused,
    Reserve,
    Submit,
    Tokens,
)
from tidemill.core.metrics import Metrics
from tidemill.core.model import Peer, Request, Role
from tidemill.core.settings import Settings
from tidemill.types import SamplingParams
from workers.engine.base import Engine, OutOfBlocks, RequestTooLong, SequenceOutput, StepOutput
from workers.kv.lease import LeaseTable, OpenLease
from workers.kv.link import Arrival
from workers.roles.base import Outbox
from workers.speculation.pool import DrafterPool
from workers.speculation.remote import RoundResult

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Decoding:
    """A request held here: waiting for KV, computing its prompt, or decoding. `tokens` grows with each step."""

    request: Request
    tokens: list[int]
    received_at: float
    drafter: Peer | None
    started_at: float | None = None  # first step that computed a part of it, or the lease's commitment
    computed_at: float | None = None  # its KV complete
    emitted: bool = False


class VerifyRole:
    """See WorkerRole."""

    role = Role.VERIFY

    def __init__(
        self, engine: Engine, outbox: Outbox, settings: Settings, metrics: Metrics, me: Peer, drafters: DrafterPool
    ) -> None:
        self._engine = engine
        self._outbox = outbox
        self._settings = settings
        self._metrics = metrics
        self._me = me
        self._drafters = drafters
        self._leases = LeaseTable()
        self._requests: dict[str, Decoding] = {}

    # --- commands -----------------------------------------------------------------------------------------------

    def handle(self, command: Command, now: float) -> None:
        match command:
            case Reserve(request, ttl_s, drafter):
                self._reserve(request, ttl_s, drafter, now)
            case Submit(request, drafter):
                self._submit(request, drafter, now)
            case Cancel(request_id):
                self.cancel(request_id)
            case _:
                self._refuse(command.request.id, Refusal.WRONG_ROLE)

    def _reserve(self, request: Request, ttl_s: float, drafter: Peer | None, now: float) -> None:
        if not self._has_room(request):
            return
        try:
            reservation = self._engine.reserve(request)
        except OutOfBlocks:
            return self._refuse(request.id, Refusal.NO_BLOCKS)
        except RequestTooLong:
            return self._refuse(request.id, Refusal.TOO_LONG)
        lease = Lease(
            self._leases.next_id(), request.id, self._me, reservation.first_block, reservation.end_block, ttl_s
        )
        entry = self._leases.grant(lease, now)
        self._admit(request, drafter, now)
        self._outbox.emit(LeaseGranted(request.id, lease))
        if entry.filled:
            self._commit(entry, now)

    def _submit(self, request: Request, drafter: Peer | None, now: float) -> None:
        if not self._has_room(request):
            return
        try:
            self._engine.submit(request)
        except RequestTooLong:
            return self._refuse(request.id, Refusal.TOO_LONG)
        self._admit(request, drafter, now)

    def _has_room(self, request: Request) -> bool:
        if request.id in self._requests:
            self._outbox.emit(Failed(request.id, Failure.ENGINE, "this request is here already"))
            return False
        if len(self._requests) >= self._settings.engine.max_waiting:
            self._refuse(request.id, Refusal.QUEUE_FULL)
            return False
        return True

    def _admit(self, request: Request, drafter: Peer | None, now: float) -> None:
        self._requests[request.id] = Decoding(request, list(request.tokens), now, drafter)
        if drafter is not None and self._settings.speculation.enabled:
            self._drafters.open(drafter, request)

    def _refuse(self, request_id: str, reason: Refusal) -> None:
        self._outbox.emit(Refused(request_id, reason))
        self._outbox.forget(request_id)

    def cancel(self, request_id: str) -> None:
        entry = self._leases.of_request(request_id)
        if entry is not None:
            self._end_lease(entry, LeaseState.ABORTED)
        self._forget(request_id)

    def _forget(self, request_id: str) -> None:
        self._engine.release(request_id)
        decoding = self._requests.pop(request_id, None)
        if decoding is not None and decoding.drafter is not None:
            self._drafters.close_request(decoding.drafter, request_id)
        self._outbox.forget(request_id)

    # --- leases -------------------------------------------------------------------------------------------------

    def on_kv(self, arrival: Arrival, now: float) -> None:
        """Blocks came, or a link ended. Blocks of a lease that is over are dropped: nobody waits for them."""
        if arrival.kv is None:
            for entry in self._leases:
                if entry.sender == arrival.sender:
                    self._fail(entry.lease.request_id, Failure.KV_LINK, arrival.error)
            return
        kv = arrival.kv
        self._metrics.add(metrics.TRANSFER_BYTES, kv.numel() * kv.element_size(), direction="received")
        self._metrics.observe(metrics.TRANSFER_TIME, arrival.seconds, direction="received")
        lease = self._leases.find(arrival.lease_id)
        if lease is not None:
            self._fill(lease, arrival, kv, now)

    def _fill(self, entry: OpenLease, arrival: Arrival, kv: Tensor, now: float) -> None:
        entry.sender = arrival.sender
        try:
            if arrival.first_block != entry.next_block:
                raise ValueError(f"block {arrival.first_block} came, expected {entry.next_block}")
            self._engine.import_kv(entry.lease.request_id, arrival.first_block, kv)
        except ValueError as error:
            return self._fail(entry.lease.request_id, Failure.KV_LINK, str(error))
        entry.next_block += kv.shape[1]
        if entry.filled:
            self._commit(entry, now)

    def _commit(self, entry: OpenLease, now: float) -> None:
        """All blocks are here: they are the sequence's now, and it decodes."""
        self._end_lease(entry, LeaseState.COMMITTED)
        self._engine.activate(entry.lease.request_id)
        decoding = self._requests[entry.lease.request_id]
        decoding.started_at = decoding.computed_at = now

    def _end_lease(self, entry: OpenLease, state: LeaseState) -> None:
        self._leases.end(entry, state)
        self._metrics.add(metrics.LEASES, end=state)

    def poll(self, now: float) -> None:
        for entry in self._leases.expired(now):
            self._end_lease(entry, LeaseState.EXPIRED)
            self._fail(entry.lease.request_id, Failure.LEASE_EXPIRED, f"KV did not come within {entry.lease.ttl_s} s")

    # --- steps --------------------------------------------------------------------------------------------------

    def next_step_at(self, now: float) -> float | None:
        if not self._engine.has_work():
            return self._leases.next_deadline()
        return self._drafters.wait_until(now) or now

    def on_drafts(self, peer: Peer, reply: DraftReply) -> None:
        """Drafts came; those that fit are verified in the next step."""
        result = self._drafters.answered(peer, reply)
        used = [self._engine.propose(draft) for draft in reply.drafts if draft.tokens]
        if result is RoundResult.LATE and any(used):
            result = RoundResult.USED
        self._metrics.add(metrics.DRAFT_ROUNDS, result=result)

    def on_drafter_lost(self, peer: Peer, why: str) -> None:
        """Its requests go on without drafts; the next one tries it again."""
        if self._drafters.lost(peer):
            log.warning("draft worker %s is lost: %s", peer.id, why)
            self._metrics.add(metrics.DRAFT_ROUNDS, result=RoundResult.LOST)

    def before_step(self, now: float) -> None:
        """Drafts are attached as they come."""

    def after_step(self, output: StepOutput, now: float) -> None:
        for progress in output.progress:
            self._mark_started(progress.request_id, now - output.seconds)
        for each in output.outputs:
            self._emit_tokens(each, now - output.seconds, now)
        self._ask_for_drafts(now)

    def _mark_started(self, request_id: str, at: float) -> None:
        decoding = self._requests.get(request_id)
        if decoding is not None and decoding.started_at is None:
            decoding.started_at = at

    def _emit_tokens(self, output: SequenceOutput, started: float, now: float) -> None:
        decoding = self._requests[output.request_id]
        self._mark_started(output.request_id, started)
        decoding.tokens += output.tokens
        first = None if decoding.emitted else _first_token(decoding, now)
        decoding.emitted = True
        self._metrics.add(metrics.VERIFIES)
        self._metrics.add(metrics.DRAFTED, output.drafted)
        self._metrics.add(metrics.ACCEPTED, output.accepted)
        self._outbox.emit(
            Tokens(
                output.request_id,
                output.tokens,
                output.logprobs,
                output.drafted,
                output.accepted,
                output.finish,
                first,
            )
        )
        if output.finish is not None:
            self._forget(output.request_id)

    def _ask_for_drafts(self, now: float) -> None:
        settings = self._settings.speculation
        decoding = {
            request_id: each for request_id, each in self._requests.items() if each.emitted and each.drafter is not None
        }
        if not settings.enabled or len(decoding) > settings.max_batch:
            decoding = {}
        self._drafters.call(
            [(each.drafter, each.request, each.tokens) for each in decoding.values() if each.drafter], now
        )

    # --- ends ---------------------------------------------------------------------------------------------------

    def _fail(self, request_id: str, failure: Failure, detail: str) -> None:
        self._metrics.add(metrics.ERRORS, failure=failure)
        self._outbox.emit(Failed(request_id, failure, detail))
        self.cancel(request_id)

    def engine_failed(self, detail: str) -> None:
        self.give_up(Failure.ENGINE, detail)

    def give_up(self, failure: Failure, detail: str) -> None:
        for request_id in list(self._requests):
            self._fail(request_id, failure, detail)

    def close(self) -> None:
        self._drafters.close()

    @property
    def idle(self) -> bool:
        return not self._requests

    def probe(self) -> None:
        """Decode one token."""
        probe = Request("probe/verify", (0, 0), SamplingParams(max_tokens=1, seed=0))
        self._engine.submit(probe)
        outputs = self._engine.step().outputs
        self._engine.release(probe.id)
        if not outputs or not outputs[0].finish:
            raise RuntimeError("a one-token request did not finish in one step")


def _first_token(decoding: Decoding, now: float) -> FirstToken:
    """A prompt computed here ends with the step that yields the first token, so no decode time is left over."""
    started = decoding.started_at if decoding.started_at is not None else now
    if decoding.computed_at is not None:
        return FirstToken(0.0, 0.0, now - decoding.computed_at)
    return FirstToken(started - decoding.received_at, now - started, 0.0)
