"""The life of a request, from admission to its last token.

    1 admit      a bounded number is served, a bounded number waits, the rest is turned away
    2 split      prefill on a prefill worker, or where it will be decoded
    3 place      the least loaded verify, prefill and draft worker
    4 reserve    the verify worker grants a lease for the KV blocks, or says no and another is tried
    5 prefill    the prefill worker computes; finished blocks travel to the lease while the next are computed
    6 decode     the verify worker's tokens, one message a step; meanwhile it may move to another, see move.py
    7 finish     whatever any worker still holds is released, whether the request finished, failed or was cancelled

A worker that fails, at whatever stage, costs the request a new attempt elsewhere from the tokens already sent. Being
cancelled (the client left, or servicer.py ends a request whose deadline passed) is an exception like any other:
`finally` tells every worker at once.
"""

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Set
from contextlib import aclosing
from dataclasses import dataclass
from enum import StrEnum

from router.attempt import TIMEOUT, Attempt, AttemptFailed, AttemptRefused
from router.gate import Gate
from router.journey import Journey
from router.move import MoveOutcome
from router.moves import Moves
from router.policy.placement import place
from router.policy.split import SplitReason, split
from router.pools_view import PoolsView
from router.telemetry import Telemetry
from tidemill.core import metrics
from tidemill.core.clock import Clock
from tidemill.core.lifecycle import RequestState
from tidemill.core.messages import (
    Failure,
    Lease,
    LeaseGranted,
    Prefill,
    Prefilled,
    Proceed,
    Refusal,
    Reserve,
    Submit,
    Tokens,
)
from tidemill.core.metrics import Metrics
from tidemill.core.model import Peer, PoolSnapshot, Request, Role, WorkerId, WorkerSnapshot
from tidemill.core.settings import Settings
from tidemill.core.telemetry import Decoding
from tidemill.core.trace import Stage
from tidemill.errors import InvalidRequest, Overloaded, TidemillError, Unavailable

log = logging.getLogger(__name__)

FIRST_PAUSE_S, MAX_PAUSE_S = 0.02, 0.5
LINK_REST_S = 10.0  # how long others are preferred to a verify worker that a KV link failed to reach
# What the prefill worker may be to blame for as well as the verify worker it was sending to.
HANDOVER_FAILURES = frozenset({Failure.KV_LINK, Failure.LEASE_EXPIRED, TIMEOUT})


@dataclass(frozen=True, slots=True)
class Placement:
    """The workers of one attempt. Without `prefill` the verify worker computes the prompt itself."""

    verify: WorkerSnapshot
    prefill: WorkerSnapshot | None
    draft: WorkerSnapshot | None

    @property
    def drafter(self) -> Peer | None:
        return self.draft.peer if self.draft else None


class Router:
    """Leads requests through the pools. One event loop, no thread of its own."""

    def __init__(
        self,
        settings: Settings,
        pools: PoolsView,
        gate: Gate,
        telemetry: Telemetry,
        counters: Metrics,
        clock: Clock,
        rng: random.Random,
    ) -> None:
        self._settings = settings
        self._pools = pools
        self._gate = gate
        self._telemetry = telemetry
        self._metrics = counters
        self._clock = clock
        self._rng = rng
        self._moves = Moves(settings, pools, counters, clock, rng)
        self._unlinked: dict[WorkerId, float] = {}  # verify workers that KV did not reach, and until when they rest

    async def serve(self, journey: Journey) -> AsyncGenerator[list[Tokens], None]:
        """The steps of a request, each list as soon as it is there. Raises TidemillError."""
        async with self._gate.admitted():  # 1
            while journey.finish is None:
                attempt = Attempt(journey.next_attempt(), self._pools)
                try:
                    placement = await self._split_and_place(journey, attempt.request)  # 2, 3
                    if placement.prefill is None:
                        self._submit(journey, attempt, placement)
                    else:
                        lease = await self._reserve(journey, attempt, placement)  # 4
                        await self._prefill(journey, attempt, placement, lease)  # 5
                    with self._moves.open_to(journey, attempt, placement.drafter):
                        async with aclosing(self._decode(journey, attempt, placement)) as decoding:  # 6
                            async for steps in decoding:
                                yield steps
                except AttemptRefused as refusal:
                    attempt.close(None)  # first: it may have to wait, and holds nothing meanwhile
                    await self._try_another(journey, refusal)
                except AttemptFailed as failure:
                    self._try_again(journey, failure)
                finally:
                    attempt.close(journey.finish)  # 7

    async def move(self, request_id: str, to: WorkerId, reason: StrEnum) -> MoveOutcome:
        """Have a decoding request go on on another verify worker; its client notices a pause of a few steps at most."""
        return await self._moves.move(request_id, to, reason)

    def decoding(self) -> dict[str, WorkerId]:
        """The requests that could be moved now, and the workers they decode on."""
        return self._moves.decoding()

    def held(self) -> list[Decoding]:
        """The same, with what each holds."""
        return self._moves.held()

    async def close(self) -> None:
        """End what runs beside the requests."""
        await self._moves.close()

    async def _split_and_place(self, journey: Journey, request: Request) -> Placement:
        """Waits for a verify worker if there is none at the moment."""
        while True:
            snapshot = self._pools.snapshot()
            verify = self._choose(snapshot, Role.VERIFY, journey.refused, journey.avoid | self._resting())
            if verify is not None:
                break
            await self._pause(journey, Unavailable("no verify worker can be reached; see `tidemill status`"))
        elsewhere = split(snapshot, request, self._settings.split.min_prefill_tokens)
        prefill = self._choose(snapshot, Role.PREFILL, journey.refused | journey.avoid) if elsewhere.choice else None
        draft = self._choose(snapshot, Role.DRAFT, journey.avoid) if self._settings.speculation.enabled else None
        journey.lifecycle.move(RequestState.PLACED)
        journey.split_reason = elsewhere.reason if prefill or not elsewhere.choice else SplitReason.NO_PREFILL_WORKERS
        self._metrics.add(metrics.DECISIONS, policy="split", reason=journey.split_reason)
        journey.verify_worker = str(verify.peer.id)
        journey.prefill_worker = str(prefill.peer.id) if prefill else ""
        journey.draft_worker = str(draft.peer.id) if draft else ""
        return Placement(verify, prefill, draft)

    def _resting(self) -> Set[WorkerId]:
        """Each request that finds out anew that a link is silent loses the stall limit."""
        now = self._clock.monotonic()
        self._unlinked = {worker: until for worker, until in self._unlinked.items() if until > now}
        return self._unlinked.keys()

    def _choose(
        self, snapshot: PoolSnapshot, role: Role, avoid: set[WorkerId], last_resort: Set[WorkerId] = frozenset()
    ) -> WorkerSnapshot | None:
        decision = place(snapshot, role, avoid, self._rng, last_resort)
        self._metrics.add(metrics.DECISIONS, policy="placement", reason=decision.reason)
        return decision.choice

    def _submit(self, journey: Journey, attempt: Attempt, placement: Placement) -> None:
        attempt.tell(placement.verify, Submit(attempt.request, placement.drafter))
        now = self._clock.monotonic()
        journey.prefilled(None, now)
        journey.enter(Stage.FIRST, now, placement.verify.peer.id, "prefilled in place")

    async def _reserve(self, journey: Journey, attempt: Attempt, placement: Placement) -> Lease:
        deadlines = self._settings.deadlines
        attempt.tell(placement.verify, Reserve(attempt.request, deadlines.lease_s, placement.drafter))
        journey.enter(Stage.RESERVE, self._clock.monotonic(), placement.verify.peer.id)
        granted = await attempt.expect(LeaseGranted, deadlines.reserve_s, placement.verify.peer.id)
        journey.lifecycle.move(RequestState.RESERVED)
        journey.pauses = 0
        return granted.lease

    async def _prefill(self, journey: Journey, attempt: Attempt, placement: Placement, lease: Lease) -> None:
        """Nothing to do if the verify worker had all blocks in its prefix cache."""
        assert placement.prefill is not None
        done: Prefilled | None = None
        if lease.first_block < lease.end_block:
            attempt.tell(placement.prefill, Prefill(attempt.request, lease))
            journey.kv_from = placement.prefill.peer.id
            journey.enter(Stage.PREFILL, self._clock.monotonic(), placement.prefill.peer.id)
            try:
                done = await attempt.expect(Prefilled, self._settings.deadlines.prefill_s, placement.prefill.peer.id)
            except AttemptFailed as failure:
                self._without_prefill(journey, attempt, placement, failure)
        journey.lifecycle.move(RequestState.PREFILLED)
        now = self._clock.monotonic()
        journey.prefilled(done, now)
        note = "goes on without its prefill worker" if journey.kv_lost else "" if done else "all of it was cached"
        journey.enter(Stage.FIRST, now, placement.verify.peer.id, note)

    def _without_prefill(
        self, journey: Journey, attempt: Attempt, placement: Placement, failure: AttemptFailed
    ) -> None:
        """A prefill worker that fails costs only the KV that has not come: the verify worker computes that itself.

        Raises `failure` if another worker failed.
        """
        if placement.prefill is None or journey.kv_from is None or failure.worker != journey.kv_from:
            raise failure
        self._metrics.add(metrics.RETRIES, failure=failure.failure)
        log.warning("request %s goes on without its prefill worker: %s", journey.request.id, failure)
        if failure.failure == Failure.KV_LINK:
            self._unlinked[placement.verify.peer.id] = self._clock.monotonic() + LINK_REST_S
        journey.avoid.add(failure.worker)
        journey.kv_from, journey.kv_lost = None, True
        attempt.leave(placement.prefill, cancel=True)
        attempt.add(placement.verify, Proceed(attempt.request.id))

    async def _decode(
        self, journey: Journey, attempt: Attempt, placement: Placement
    ) -> AsyncGenerator[list[Tokens], None]:
        """The first token may take a prompt's time, those after it a step's."""
        deadlines = self._settings.deadlines
        patience_s = deadlines.transfer_s if placement.prefill and not journey.kv_lost else deadlines.prefill_s
        slo_class = journey.request.slo.name
        while journey.finish is None:
            decodes_on = attempt.decodes_on or placement.verify
            try:
                event = await attempt.next(patience_s, decodes_on.peer.id)
            except AttemptFailed as failure:
                self._without_prefill(journey, attempt, placement, failure)
                patience_s = deadlines.prefill_s
                continue
            if not isinstance(event, Tokens):
                continue  # a late word of the prefill worker, or of a move that was called off
            if journey.lifecycle.state is not RequestState.DECODING:
                journey.lifecycle.move(RequestState.DECODING)
                attempt.leave(placement.prefill)  # its part is done: it may go now
                journey.kv_from, journey.pauses = None, 0
            steps = [event, *attempt.more_tokens()]
            now = self._clock.monotonic()
            if journey.sent:
                self._metrics.observe(metrics.ITL, now - journey.last_at, slo_class=slo_class)
            first = not journey.sent
            if journey.stages[-1].stage is not Stage.DECODE:
                journey.enter(Stage.DECODE, now, placement.verify.peer.id)
            for step in steps:
                journey.took(step, now)
            if first:
                self._telemetry.started(journey, now)
            if journey.finish is not None:
                journey.lifecycle.move(RequestState.FINISHED)
            yield steps
            patience_s = deadlines.token_s

    async def _try_another(self, journey: Journey, refusal: AttemptRefused) -> None:
        """A worker without room is passed over until all have been asked; then the request waits a moment."""
        if refusal.reason is Refusal.TOO_LONG:
            tokens = len(journey.request.tokens) + len(journey.sent)
            raise InvalidRequest(
                f"prompt and output of {tokens} tokens do not fit a worker's KV pool; shorten the prompt, "
                "or raise engine.kv_blocks"
            )
        self._metrics.add(metrics.RETRIES, failure=refusal.reason)
        journey.refused.add(refusal.worker)
        journey.enter(Stage.QUEUE, self._clock.monotonic(), note=str(refusal))
        if all(worker.peer.id in journey.refused for worker in self._pools.snapshot().of(Role.VERIFY)):
            full = Overloaded(f"every worker is full ({refusal.reason}); try again after a pause")
            await self._pause(journey, full)

    async def _pause(self, journey: Journey, error: TidemillError) -> None:
        """Then ask everyone again. Pauses grow, so that many waiting requests do not keep the router busy; `error` is
        raised once a request without a place has waited as long as a reservation may take.
        """
        now = self._clock.monotonic()
        if journey.pauses == 0:
            journey.without_place_since = now
        elif now - journey.without_place_since > self._settings.deadlines.reserve_s:
            raise error
        longest_s = min(FIRST_PAUSE_S * 2 ** min(journey.pauses, 10), MAX_PAUSE_S)
        journey.pauses += 1
        journey.refused.clear()
        await asyncio.sleep(longest_s * self._rng.uniform(0.5, 1.0))

    def _try_again(self, journey: Journey, failure: AttemptFailed) -> None:
        """Raises Unavailable when the request has failed too often. A worker that became another's is no failure."""
        journey.retries += 1
        journey.failures += failure.failure != Failure.ROLE_CHANGED
        journey.enter(Stage.QUEUE, self._clock.monotonic(), note=f"{failure.worker} failed: {failure.failure}")
        journey.avoid.add(failure.worker)
        if journey.kv_from is not None and failure.failure in HANDOVER_FAILURES:
            journey.avoid.add(journey.kv_from)
        journey.kv_from, journey.pauses = None, 0  # it had a place until now
        self._metrics.add(metrics.RETRIES, failure=failure.failure)
        log.warning("request %s, after %d tokens: %s", journey.request.id, len(journey.sent), failure)
        if journey.failures > self._settings.router.max_retries:
            raise Unavailable(f"{journey.failures} workers in turn failed the request; the last: {failure}")
