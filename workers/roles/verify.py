"""Verify and decode: hold leases until their KV is here, then give every request a token, or several, each step.

Reserve -> engine.reserve -> lease -> blocks come over a link -> committed -> decodes
           (moving here: with the last of them, the tokens it got elsewhere)
Submit  -> engine.submit  -> computes its prompt here ---------------------> decodes
decodes: each step's tokens go out; drafts are asked for after a step and attached before the next
Migrate -> it leaves for another verify worker while it decodes, see departures.py
"""

import logging
from dataclasses import dataclass, replace

from tidemill.core import metrics
from tidemill.core.lifecycle import LeaseState
from tidemill.core.messages import (
    Cancel,
    Command,
    DraftReply,
    Failure,
    FirstToken,
    LeaseGranted,
    Migrate,
    Proceed,
    Refusal,
    Reserve,
    Resume,
    Submit,
    Tokens,
)
from tidemill.core.metrics import Metrics
from tidemill.core.model import Peer, Request, Role
from tidemill.core.settings import Settings
from tidemill.types import SamplingParams
from workers.engine.base import Engine, OutOfBlocks, RequestTooLong, SequenceOutput, StepOutput
from workers.kv.lease import LeaseTable, OpenLease
from workers.kv.link import Arrival, FeederFactory
from workers.kv.transfers import Deliver
from workers.roles.base import Outbox, fail, for_each, refuse
from workers.roles.departures import Departures
from workers.speculation.pool import DrafterPool
from workers.speculation.speculator import Speculator
from workers.speculation.step_time import StepTimes

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Decoding:
    """A request held here: waiting for KV, computing its prompt, or decoding. `tokens` grows with each step."""

    request: Request
    tokens: list[int]
    drafter: Peer | None
    received_at: float
    started_at: float | None = None  # start of the first step that computed a part of it
    received_kv_at: float | None = None  # its lease was committed
    emitted: bool = False


class VerifyRole:
    """See WorkerRole."""

    role = Role.VERIFY

    def __init__(
        self,
        engine: Engine,
        outbox: Outbox,
        settings: Settings,
        metrics: Metrics,
        me: Peer,
        drafters: DrafterPool,
        times: StepTimes,
        feed: FeederFactory,
        deliver: Deliver,
    ) -> None:
        """`times` are the engine's, and outlive the role. `feed` and `deliver`: see Transfers."""
        self._engine = engine
        self._outbox = outbox
        self._settings = settings
        self._metrics = metrics
        self._speculator = Speculator(engine, settings.speculation, metrics, drafters, times)
        self._leases = LeaseTable(me)
        self._departures = Departures(engine, outbox, metrics, feed, deliver, self._speculator.close_request)
        self._requests: dict[str, Decoding] = {}

    # --- commands -----------------------------------------------------------------------------------------------

    def handle(self, command: Command, now: float) -> None:
        match command:
            case Reserve():
                self._reserve(command, now)
            case Submit(request, drafter):
                self._submit(request, drafter, now)
            case Cancel(request_id):
                self.cancel(request_id)
            case Proceed(request_id):
                self._cut(request_id, "the router says so", now)
            case Migrate(request_id):
                self._stay(request_id, now)
                self._departures.begin(command, self._requests[request_id].tokens, now)
            case Resume(request_id):
                self._stay(request_id, now)
            case _:
                refuse(self._outbox, command.request.id, Refusal.WRONG_ROLE)

    def _reserve(self, command: Reserve, now: float) -> None:
        request, headroom = command.request, command.headroom_tokens
        try:
            blocks = self._engine.reserve(request, headroom)
        except OutOfBlocks:
            return refuse(self._outbox, request.id, Refusal.NO_BLOCKS)
        except RequestTooLong:
            return refuse(self._outbox, request.id, Refusal.TOO_LONG)
        except ValueError as error:
            return fail(self._outbox, request.id, Failure.ENGINE, str(error))
        entry = self._leases.grant(request, blocks, command.ttl_s, now, moving=headroom > 0)
        self._admit(request, command.drafter, now)
        self._outbox.emit(LeaseGranted(request.id, entry.lease))
        if entry.filled:
            self._commit(entry, now)

    def _submit(self, request: Request, drafter: Peer | None, now: float) -> None:
        waiting = sum(each.started_at is None for each in self._requests.values()) - len(self._leases)
        if waiting >= self._settings.engine.max_waiting:
            return refuse(self._outbox, request.id, Refusal.QUEUE_FULL)
        try:
            self._engine.submit(request)
        except RequestTooLong:
            return refuse(self._outbox, request.id, Refusal.TOO_LONG)
        except ValueError as error:
            return fail(self._outbox, request.id, Failure.ENGINE, str(error))
        self._admit(request, drafter, now, prompt_here=True)

    def _admit(self, request: Request, drafter: Peer | None, now: float, *, prompt_here: bool = False) -> None:
        decoding = self._requests[request.id] = Decoding(request, list(request.tokens), drafter, now)
        self._speculator.open(request, decoding.tokens, drafter, now, prompt_here=prompt_here)

    def cancel(self, request_id: str) -> None:
        entry = self._leases.of_request(request_id)
        if entry is not None:
            self._end_lease(entry, LeaseState.ABORTED)
        self._forget(request_id)

    def _forget(self, request_id: str) -> None:
        self._departures.forget(request_id)
        self._requests.pop(request_id, None)
        self._speculator.close_request(request_id)
        self._outbox.forget(request_id)
        self._engine.release(request_id)

    def _stay(self, request_id: str, now: float) -> None:
        """It was leaving, and does not any more."""
        if self._departures.forget(request_id):
            decoding = self._requests[request_id]
            resumed = replace(decoding.request, output=tuple(decoding.tokens[len(decoding.request.prompt) :]))
            self._engine.resume(request_id)
            self._speculator.open(resumed, decoding.tokens, decoding.drafter, now)

    # --- leases -------------------------------------------------------------------------------------------------

    def on_kv(self, arrival: Arrival, now: float) -> None:
        """Blocks came, or a link ended. Blocks of a lease that is over are dropped: nobody waits for them."""
        try:
            if arrival.kv is None:
                self._on_link_ended(arrival, now)
            else:
                self._on_blocks(arrival, now)
        finally:
            arrival.done()

    def _on_link_ended(self, arrival: Arrival, now: float) -> None:
        for entry in self._leases:
            if entry.link == arrival.link:
                self._cut(entry.lease.request_id, f"{arrival.sender}: {arrival.error}", now)

    def _cut(self, request_id: str, why: str, now: float) -> None:
        """No more KV comes: what is here is kept, the rest is computed here; if it was to move here it stays there."""
        entry = self._leases.of_request(request_id)
        if entry is not None and entry.moving:
            self._fail(request_id, Failure.KV_LINK, why)
        elif entry is not None:
            missing = entry.lease.end_block - entry.next_block
            log.warning("%s: %d of its KV blocks are computed here, since %s", request_id, missing, why)
            self._end_lease(entry, LeaseState.CUT)
            self._engine.activate(request_id, entry.next_block)

    def _on_blocks(self, arrival: Arrival, now: float) -> None:
        kv = arrival.kv
        assert kv is not None
        self._metrics.add(metrics.TRANSFER_BYTES, kv.numel() * kv.element_size(), direction="received")
        self._metrics.observe(metrics.TRANSFER_TIME, arrival.seconds, direction="received")
        entry = self._leases.find(arrival.lease_id)
        if entry is None:
            return
        entry.link = arrival.link
        try:
            came, expected = (arrival.first_block, arrival.first_layer), (entry.next_block, entry.next_layer)
            if came != expected:
                raise ValueError(f"block and layer {came} came, expected {expected}")
            self._engine.import_kv(entry.lease.request_id, arrival.first_block, kv, arrival.first_layer)
        except Exception as error:  # a copy that fails costs the request, as a link that breaks does
            return self._fail(entry.lease.request_id, Failure.KV_LINK, f"{arrival.sender}: {error!r}")
        entry.take(kv.shape[1], arrival.first_layer, kv.shape[0], self._engine.info.kv.layers)
        if entry.filled or arrival.output is not None:
            self._commit(entry, now, arrival.output or ())

    def _commit(self, entry: OpenLease, now: float, output: tuple[int, ...] = ()) -> None:
        """All blocks are here: they are the sequence's now, and it decodes. `output` came elsewhere meanwhile."""
        try:
            self._engine.activate(entry.lease.request_id, output=output)
        except ValueError as error:
            return self._fail(entry.lease.request_id, Failure.ENGINE, str(error))
        self._end_lease(entry, LeaseState.COMMITTED)
        decoding = self._requests[entry.lease.request_id]
        decoding.tokens += output
        decoding.started_at = decoding.received_kv_at = now

    def _end_lease(self, entry: OpenLease, state: LeaseState) -> None:
        self._leases.end(entry, state)
        self._metrics.add(metrics.LEASES, end=state)

    def poll(self, now: float) -> None:
        for entry in self._leases.expired(now):
            self._end_lease(entry, LeaseState.EXPIRED)
            self._fail(entry.lease.request_id, Failure.LEASE_EXPIRED, f"KV did not come within {entry.lease.ttl_s} s")
        self._speculator.poll(now)
        self._departures.poll(now)

    def next_poll_at(self) -> float | None:
        return self._leases.next_deadline()

    # --- steps --------------------------------------------------------------------------------------------------

    def next_step_at(self, now: float) -> float | None:
        if not self._engine.has_work():
            return None
        return self._speculator.wait_until(now) or now

    def on_drafts(self, peer: Peer, reply: DraftReply, came_at: float) -> None:
        """Drafts came, maybe while a step was under way."""
        self._speculator.answered(peer, reply, came_at)

    def on_drafter_lost(self, peer: Peer, why: str) -> None:
        """Its requests go on without its drafts."""
        log.info("the stream to draft worker %s ended: %s", peer.id, why)
        self._speculator.drafter_lost(peer)

    def before_step(self, now: float) -> None:
        self._speculator.before_step(now)

    def after_step(self, output: StepOutput, now: float) -> None:
        started = now - output.seconds
        for progress in output.progress:
            self._mark_started(progress.request_id, started)
        for each in output.outputs:
            self._emit_tokens(each, started, now)
        self._departures.after_step(output.preempted)
        self._speculator.after_step(output, now)

    def _mark_started(self, request_id: str, at: float) -> None:
        decoding = self._requests.get(request_id)
        if decoding is not None and decoding.started_at is None:
            decoding.started_at = at

    def _emit_tokens(self, output: SequenceOutput, started: float, now: float) -> None:
        decoding = self._requests.get(output.request_id)
        if decoding is None:
            return
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

    # --- ends ---------------------------------------------------------------------------------------------------

    def _fail(self, request_id: str, failure: Failure, detail: str) -> None:
        fail(self._outbox, request_id, failure, detail)
        self.cancel(request_id)

    def drain(self) -> None:
        """What no step and no block has come for begins elsewhere; routers move the rest away once it decodes."""
        for request_id, decoding in list(self._requests.items()):
            entry = self._leases.of_request(request_id)
            if decoding.started_at is None and (entry is None or not entry.link):
                refuse(self._outbox, request_id, Refusal.DRAINING)
                self.cancel(request_id)

    def give_up(self, failure: Failure, detail: str) -> None:
        for_each(self._requests, lambda request_id: self._fail(request_id, failure, detail))

    def close(self) -> None:
        self._departures.close()
        self._speculator.close()

    @property
    def idle(self) -> bool:
        return not self._requests

    def probe(self) -> None:
        """Decode one token."""
        probe = Request("probe/verify", (0, 0), SamplingParams(max_tokens=1, seed=0))
        try:
            self._engine.submit(probe)
            outputs = self._engine.step().outputs
        finally:
            self._engine.release(probe.id)
        if not outputs or not outputs[0].finish:
            raise RuntimeError("a one-token request did not finish in one step")


def _first_token(decoding: Decoding, now: float) -> FirstToken:
    """A prompt computed here ends with the step that yields the first token, so no decode time is left over."""
    if decoding.received_kv_at is not None:
        return FirstToken(0.0, 0.0, now - decoding.received_kv_at)
    started = decoding.started_at if decoding.started_at is not None else now
    return FirstToken(started - decoding.received_at, now - started, 0.0)
