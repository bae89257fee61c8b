"""A whole cluster on a virtual clock: arrivals, the routers' policies and telemetry, simulated workers, the controller.

    arrival -> split, place, reserve (router/policy) -> prefill worker -> KV -> verify worker -> telemetry
    each period: telemetry -> rebalance (cluster/policy) -> role switches

What decides is the code that runs in production; only workers, links and clients are made up.
"""

import random
from collections import Counter, deque
from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace
from functools import lru_cache

from cluster.policy.rebalance import Memory, RebalanceConfig, RoleChange, Situation, rebalance
from cluster.sim.events import EventLoop
from cluster.sim.traffic import Arrival
from cluster.sim.worker import OPT_13B_80GB, Hardware, Sequence, SimWorker, Stepped
from router.journey import Journey
from router.policy.admission import Admission, AdmissionLimits, admit
from router.policy.placement import place
from router.policy.split import split
from router.route import FIRST_PAUSE_S, MAX_PAUSE_S
from router.telemetry import NOTHING, Telemetry
from tidemill.core.messages import FirstToken, Prefilled, Tokens
from tidemill.core.model import PoolSnapshot, Request, Role, SloClass
from tidemill.core.settings import ControllerSettings
from tidemill.types import FinishReason, SamplingParams
from workers.engine.latency import OPT_13B, LatencyModel

GOALS = SloClass("default", 1.0, 0.05)
LIMITS = AdmissionLimits(1024, 512)


@dataclass(frozen=True, slots=True)
class SimConfig:
    """A cluster, its goals, and what happens to whom without delay."""

    roles: Items[Role]
    slo: SloClass = GOALS
    hardware: Hardware = OPT_13B_80GB
    latency: LatencyModel = OPT_13B
    rebalance: RebalanceConfig | None = None  # None: roles stay
    drafts: bool = False  # a draft model is there
    windows_s: tuple[float, ...] = ControllerSettings().windows_s
    period_s: float = 0.5
    min_prefill_tokens: int = 32
    transfer_s: float = 0.008  # what is left of the KV's way when the prompt is computed
    migrate_s: float = 0.02  # between two requests that leave a worker
    drain_s: float = 5.0
    switch_s: float = 0.2  # from idle to serving in the new role
    reserve_s: float = 10.0
    limits: AdmissionLimits = LIMITS
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Ended:
    """How a request fared; a failed one has no times."""

    arrival: Arrival
    ttft_s: float | None
    tpot_s: float | None
    met: bool


@dataclass(frozen=True, slots=True)
class Look:
    """How things stood at a moment."""

    at_s: float
    roles: Mapping[Role, int]  # workers of each
    waiting: int  # requests without a token yet
    decoding: int


@dataclass(slots=True)
class Outcome:
    """What a simulation tells."""

    ended: list[Ended] = field(default_factory=list)
    changes: list[tuple[float, tuple[RoleChange, ...], str]] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    looks: list[Look] = field(default_factory=list)

    def attainment(self, phase: str | None = None, since_s: float = 0.0) -> float:
        """Share of requests that met both goals, of those that arrived in a phase, and not before `since_s`."""
        met = [e.met for e in self.ended if phase in (None, e.arrival.phase) and e.arrival.at_s >= since_s]
        return sum(met) / len(met) if met else 0.0


@lru_cache(maxsize=8192)
def _prompt(tokens: int) -> tuple[int, ...]:
    return (0,) * tokens


class Simulation:
    """Run once."""

    def __init__(self, config: SimConfig, arrivals: Items[Arrival]) -> None:
        self._config = config
        self._arrivals = arrivals
        self._loop = EventLoop()
        self._rng = random.Random(config.seed)
        self._telemetry = Telemetry(config.windows_s, 0.0)
        self._workers = [
            SimWorker(f"w{index}", role, config.hardware, config.latency) for index, role in enumerate(config.roles)
        ]
        self._by_id = {each.id: each for each in self._workers}
        self._active = 0
        self._queue: deque[Sequence] = deque()
        self._busy: set[str] = set()  # workers with a step under way
        self._changing: dict[str, Role] = {}
        self._output = {str(index): arrival for index, arrival in enumerate(arrivals)}
        self._memory = Memory()
        self._outcome = Outcome()

    def run(self, until: float) -> Outcome:
        for index, arrival in enumerate(self._arrivals):
            self._loop.at(arrival.at_s, lambda i=index: self._arrive(str(i)))  # type: ignore[misc]
        self._control()
        self._loop.run(until)
        return self._outcome

    # --- the router ---------------------------------------------------------------------------------------------

    def _arrive(self, request_id: str) -> None:
        arrival = self._output[request_id]
        sampling = SamplingParams(max_tokens=arrival.output_tokens)
        request = Request(request_id, _prompt(arrival.prompt_tokens), sampling, slo=self._config.slo)
        journey = Journey(request, self._loop.now, float("inf"))
        self._telemetry.arrived(journey, self._loop.now)
        sequence = Sequence(journey, arrival.output_tokens, len(request.prompt))
        match admit(self._active, len(self._queue), self._config.limits).choice:
            case Admission.SERVE:
                self._active += 1
                self._attempt(sequence)
            case Admission.WAIT:
                self._queue.append(sequence)
            case Admission.REJECT:
                self._end(journey, None)

    def _end(self, journey: Journey, met: bool | None) -> None:
        """`met` None: it failed."""
        self._telemetry.ended(journey, self._loop.now, failed=met is None)
        arrival = self._output[journey.request.id]
        ttft_s, tpot_s = (None, None) if met is None else (journey.timing.ttft_s, journey.tpot_s)
        self._outcome.ended.append(Ended(arrival, ttft_s, tpot_s, bool(met)))

    def _leave(self) -> None:
        """One that was served is not any more: the next in the queue is."""
        if self._queue:
            self._attempt(self._queue.popleft())
        else:
            self._active -= 1

    def _attempt(self, sequence: Sequence) -> None:
        """Split, place and reserve, as router/route.py does."""
        journey = sequence.journey
        pools = PoolSnapshot(tuple(each.snapshot() for each in self._workers if each.accepting))
        full = {each.peer.id for each in pools.of(Role.VERIFY) if not self._by_id[each.peer.id].has_room(sequence)}
        verify = place(pools, Role.VERIFY, full if pools.of(Role.PREFILL) else frozenset(), self._rng).choice
        if verify is None:
            return self._pause(sequence)
        elsewhere = split(pools, journey.request, self._config.min_prefill_tokens)
        prefill = place(pools, Role.PREFILL, frozenset(), self._rng).choice if elsewhere.choice else None
        holder = self._by_id[verify.peer.id]
        journey.prefill_worker = str(prefill.peer.id) if prefill else ""
        if prefill is None:
            sequence.holder, sequence.computer = None, holder
        else:
            journey.pauses = 0
            holder.lease(sequence)
            sequence.holder, sequence.computer = holder, self._by_id[prefill.peer.id]
        sequence.computer.compute(sequence)
        self._wake(sequence.computer)

    def _pause(self, sequence: Sequence) -> None:
        journey = sequence.journey
        if journey.pauses == 0:
            journey.without_place_since = self._loop.now
        elif self._loop.now - journey.without_place_since > self._config.reserve_s:
            self._end(journey, None)
            return self._leave()
        longest_s = min(FIRST_PAUSE_S * 2 ** min(journey.pauses, 10), MAX_PAUSE_S)
        journey.pauses += 1
        self._loop.after(longest_s * self._rng.uniform(0.5, 1.0), lambda: self._attempt(sequence))

    # --- workers ------------------------------------------------------------------------------------------------

    def _wake(self, worker: SimWorker) -> None:
        if worker.id.name in self._busy or not worker.has_work:
            return
        step = worker.begin(self._loop.now)
        if step is None:
            return
        seconds, done = step
        self._busy.add(worker.id.name)

        def over() -> None:
            self._busy.discard(worker.id.name)
            self._stepped(worker, done())
            self._wake(worker)

        self._loop.after(seconds, over)

    def _stepped(self, worker: SimWorker, stepped: Stepped) -> None:
        now = self._loop.now
        for sequence in stepped.prefilled:
            assert sequence.started_at is not None
            sequence.journey.prefilled(Prefilled("", 0.0, now - sequence.started_at), now)
            self._loop.after(self._config.transfer_s, lambda s=sequence: self._kv_came(s))  # type: ignore[misc]
        for sequence in stepped.started:
            if not sequence.journey.sent:
                prefill_s = 0.0 if sequence.started_at is None else now - sequence.started_at
                first = FirstToken(0.0, prefill_s, now - sequence.ready_at)
                sequence.journey.took(Tokens("", (0,), first=first), now)
                self._telemetry.started(sequence.journey, now)
        for sequence in stepped.finished:
            self._finish(sequence)
        self._report(worker, stepped)

    def _report(self, worker: SimWorker, stepped: Stepped | None = None) -> None:
        counted = stepped.counted if stepped else NOTHING
        self._telemetry.reported(worker.id, worker.role, worker.accepting, worker.load(), counted, self._loop.now)

    def _kv_came(self, sequence: Sequence) -> None:
        holder = sequence.holder
        if holder is None:
            return  # given up meanwhile, and elsewhere by now
        holder.end_lease(sequence)
        sequence.ready_at, sequence.started_at = self._loop.now, None
        holder.decode(sequence)
        self._wake(holder)

    def _finish(self, sequence: Sequence) -> None:
        journey, now = sequence.journey, self._loop.now
        left = sequence.output_tokens - len(journey.sent)
        journey.took(Tokens("", (0,) * left, finish=FinishReason.LENGTH), now)
        slo = journey.request.slo
        self._end(journey, journey.timing.ttft_s <= slo.ttft_s and journey.tpot_s <= slo.tpot_s)
        self._leave()

    # --- the controller -----------------------------------------------------------------------------------------

    def _control(self) -> None:
        now, config = self._loop.now, self._config
        for worker in self._workers:
            self._report(worker)
        self._share_drafts()
        self._outcome.looks.append(self._look(now))
        if config.rebalance is not None and now > 0:
            changing = tuple(sorted(self._changing.items()))
            situation = Situation(self._telemetry.snapshot(now), changing, drafts=config.drafts)
            decision, self._memory = rebalance(situation, self._memory, config.rebalance, now)
            self._outcome.reasons[decision.reason] += 1
            if decision.choice:
                self._outcome.changes.append((now, decision.choice, decision.reason))
            by_name = {worker.id.name: worker for worker in self._workers}
            for change in decision.choice:
                self._switch(by_name[change.worker], change.to)
        self._loop.after(config.period_s, self._control)

    def _look(self, now: float) -> Look:
        roles = {role: sum(worker.role is role for worker in self._workers) for role in Role}
        decoding = sum(len(worker.decoding) for worker in self._workers)
        return Look(now, roles, self._telemetry.present(now).waiting.requests, decoding)

    def _share_drafts(self) -> None:
        drafters = sum(worker.role is Role.DRAFT and worker.accepting for worker in self._workers)
        limit = self._config.hardware.draft_max_batch
        small = [w for w in self._workers if w.role is Role.VERIFY and 0 < len(w.decoding) <= limit]
        wanting = sum(len(worker.decoding) for worker in small)
        room = drafters * self._config.hardware.drafts_per_worker
        for worker in self._workers:
            worker.draft_share = min(room / wanting, 1.0) if wanting else 0.0
        for worker in (each for each in self._workers if each.role is Role.DRAFT):
            worker.busy_s += self._config.period_s * min(wanting / room, 1.0) if worker.accepting else 0.0

    # --- change of role -----------------------------------------------------------------------------------------

    def _switch(self, worker: SimWorker, to: Role) -> None:
        """No new work; what has not begun begins elsewhere, decoding requests move to others, the rest is finished, or
        given up when time is over.
        """
        worker.accepting = False
        self._changing[worker.id.name] = to
        for sequence in worker.not_begun():
            for other in (sequence.computer, sequence.holder):
                if other is not None:
                    other.hand_back(sequence)
            self._attempt(sequence)
        self._report(worker)
        self._drain(worker, to, self._loop.now + self._config.drain_s)

    def _drain(self, worker: SimWorker, to: Role, deadline: float) -> None:
        if worker.idle or self._loop.now >= deadline:
            for sequence in worker.give_up():
                if sequence.holder is not None:
                    sequence.holder.end_lease(sequence)
                self._attempt(replace(sequence, holder=None))
                sequence.holder = None  # whoever computes it still, computes for nobody
            self._loop.after(self._config.switch_s, lambda: self._become(worker, to))
            return
        self._move_one(worker)
        self._loop.after(self._config.migrate_s, lambda: self._drain(worker, to, deadline))

    def _move_one(self, worker: SimWorker) -> None:
        others = [each for each in self._workers if each.role is Role.VERIFY and each.accepting]
        if not worker.decoding or not others:
            return
        sequence = next(iter(worker.decoding.values()))
        free = max(others, key=lambda each: (each.free_tokens / (len(each.decoding) + 1), each.id.name))
        room = free.free_tokens - sequence.context - sequence.since_joined(worker.emitted)
        if room > 0 and len(free.decoding) < free.hardware.max_running:
            worker.leave(sequence)
            free.decode(sequence)
            self._wake(free)

    def _become(self, worker: SimWorker, to: Role) -> None:
        del self._by_id[worker.id]
        worker.become(to)
        self._by_id[worker.id] = worker
        del self._changing[worker.id.name]
        self._report(worker)
