"""The life of a request under every combination of faults: the real router, scripted workers, virtual time.

Whatever refuses, fails, hangs, dies or changes its role, and whenever the client leaves: the tokens that reach the
client are those of an undisturbed run, from the first on, and in the end no worker holds anything.
"""

import asyncio
import random
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import aclosing
from dataclasses import dataclass, replace
from enum import StrEnum

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from router.gate import Gate
from router.journey import Journey
from router.policy.admission import AdmissionLimits
from router.pools_view import PoolsView
from router.route import Router
from router.telemetry import Telemetry
from tests.support.scripted_worker import ScriptedWorker, expected_tokens, lease_for, router_settings, step
from tests.support.virtual_time import LoopClock, run_virtual
from tidemill.core import control_pb2 as pb
from tidemill.core import metrics
from tidemill.core.lifecycle import RequestState
from tidemill.core.messages import (
    Cancel,
    Command,
    Event,
    Failed,
    Failure,
    FirstToken,
    Prefill,
    Prefilled,
    Proceed,
    Refusal,
    Refused,
    Reserve,
    Submit,
    Tokens,
)
from tidemill.core.metrics import ROUTER_SERIES, Metrics
from tidemill.core.model import Request, Role
from tidemill.errors import TidemillError
from tidemill.types import SamplingParams

EXAMPLES = 80
STEP_S = 0.05
FREEZE_S = 8.0  # longer than a stage may take, shorter than a request waits for a place
STAGES = {"reserve_s": 10.0, "prefill_s": 5.0, "transfer_s": 5.0, "token_s": 5.0}


class Fault(StrEnum):
    """What a worker does with the next thing it is asked for."""

    NONE = "none"
    REFUSE = "refuse"
    FAIL = "fail"
    HANG = "hang"  # says nothing more of this request, but lives
    FREEZE = "freeze"  # says nothing at all for a while, as if stopped
    BREAK = "break"  # its streams end; it serves on
    SWITCH = "switch"  # comes back as a new incarnation


@dataclass(frozen=True)
class Plan:
    """A fault, and after how many tokens it comes."""

    fault: Fault
    after: int


class FaultyWorker(ScriptedWorker):
    """Follows its plans, one for each thing it is asked for, and is well-behaved after the last."""

    heartbeat_s = 0.5

    def __init__(self, name: str, role: Role, plans: list[Plan], cluster: "Cluster") -> None:
        super().__init__(name, role)
        self.plans = list(plans)
        self.held: dict[str, Request] = {}  # like an engine: what takes up blocks here
        self.on = self._on
        self._cluster = cluster
        self._frozen_until = 0.0
        self._missed: list[Command] = []

    def take(self, command: Command) -> None:
        if self.silent:
            self._missed.append(command)
        else:
            super().take(command)

    def detached(self) -> None:
        """What came over the stream goes with it, done or not."""
        self.held.clear()
        self._missed.clear()

    def _on(self, command: Command) -> Iterable[Event]:
        if isinstance(command, Cancel):
            self.held.pop(command.request_id, None)
            return ()
        if isinstance(command, Proceed):
            self._start_decoding(command.request_id)
            return ()
        request = command.request
        plan = self.plans.pop(0) if self.plans else Plan(Fault.NONE, 0)
        if plan.fault is Fault.REFUSE:
            return (Refused(request.id, Refusal.NO_BLOCKS),)
        self.held[request.id] = request
        match command:
            case Submit():
                self._decode(request, len(request.output), plan)
            case Reserve():
                self._later(1, lambda: self._grant(request, plan))
            case Prefill(_, lease):
                self._later(1, lambda: self._prefill(request, lease.holder.id.name, plan))
        return ()

    def _later(self, steps: int, do: object) -> None:
        loop = asyncio.get_running_loop()
        at = max(loop.time(), self._frozen_until) + steps * STEP_S
        loop.call_at(at, lambda: self._later(0, do) if loop.time() < self._frozen_until else do())  # type: ignore[operator]

    def _grant(self, request: Request, plan: Plan) -> None:
        """A fault that comes after 0 tokens comes instead of the lease."""
        if request.id not in self.held or (plan.after == 0 and self._strike(request, plan)):
            return
        self.say(lease_for(self, request))
        self._cluster.waiting[request.id] = plan

    def _prefill(self, request: Request, holder: str, plan: Plan) -> None:
        if request.id not in self.held or self._strike(request, plan):
            return
        del self.held[request.id]
        self.say(Prefilled(request.id, 0.0, STEP_S))
        self._cluster.by_name[holder]._start_decoding(request.id)

    def _start_decoding(self, request_id: str) -> None:
        """Its KV is here, or no more of it comes; either is heard once."""
        plan = self._cluster.waiting.pop(request_id, None)
        if plan is not None and request_id in self.held:
            request = self.held[request_id]
            self._decode(request, len(request.output), plan)

    def _decode(self, request: Request, at: int, plan: Plan) -> None:
        self._later(1, lambda: self._step(request, at, plan))

    def _step(self, request: Request, at: int, plan: Plan) -> None:
        if request.id not in self.held:
            return
        if at - len(request.output) >= plan.after and self._strike(request, plan):
            return
        end = at == request.sampling.max_tokens - 1
        if end:
            del self.held[request.id]
        self.say(step(request, 1, at, end=end))
        if not end:
            self._decode(request, at + 1, plan)

    def _strike(self, request: Request, plan: Plan) -> bool:
        """True if the request gets nothing more here."""
        match plan.fault:
            case Fault.FAIL:
                del self.held[request.id]
                self.say(Failed(request.id, Failure.ENGINE, "planned"))
            case Fault.BREAK:
                self.break_streams()
            case Fault.SWITCH:
                self.held.clear()
                self.become(self.role, self.id.epoch + 1)
            case Fault.FREEZE:
                self._frozen_until = asyncio.get_running_loop().time() + FREEZE_S
                self.silent = True
                asyncio.get_running_loop().call_at(self._frozen_until, self._thaw)
                return False  # it goes on where it was, and nobody may mind
            case Fault.HANG:
                pass
            case _:
                return False
        return True

    def _thaw(self) -> None:
        """What came meanwhile is handled now."""
        self.silent = False
        missed, self._missed = self._missed, []
        for command in missed:
            self.take(command)


class Cluster:
    """Workers on an in-memory transport, and a router's insides."""

    def __init__(self, verify: list[list[Plan]], prefill: list[list[Plan]], max_retries: int) -> None:
        self.waiting: dict[str, Plan] = {}
        self.workers = [
            FaultyWorker(f"{role}-{index}", role, plans, self)
            for role, pool in ((Role.VERIFY, verify), (Role.PREFILL, prefill))
            for index, plans in enumerate(pool)
        ]
        self.by_name = {worker.id.name: worker for worker in self.workers}
        config = router_settings(router={"max_retries": max_retries, "max_active": 4}, deadlines=STAGES)
        self.counters, clock, rng = Metrics(ROUTER_SERIES), LoopClock(), random.Random(0)
        telemetry = Telemetry((5.0,), clock.monotonic())
        self.pools = PoolsView(clock, self._attach, telemetry)
        self.gate = Gate(AdmissionLimits(4, 8), self.counters)
        self.router = Router(config, self.pools, self.gate, telemetry, self.counters, clock, rng)

    async def _attach(self, address: str, commands: AsyncIterator[pb.Command]) -> AsyncGenerator[pb.StepReport, None]:
        async with aclosing(self.by_name[address].Attach(commands, None)) as reports:  # type: ignore[type-var]
            async for report in reports:
                yield report

    async def __aenter__(self) -> "Cluster":
        members = [
            replace(worker.member, peer=replace(worker.member.peer, address=worker.id.name)) for worker in self.workers
        ]
        await self.pools.set_members(members)
        while len(self.pools.snapshot().workers) < len(self.workers):  # noqa: ASYNC110 - virtual time
            await asyncio.sleep(0.01)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.pools.close()

    async def serve(self, journey: Journey) -> list[Tokens]:
        got: list[Tokens] = []
        async with aclosing(self.router.serve(journey)) as steps:
            async for some in steps:
                got += some
        return got

    async def check_nothing_is_held(self) -> None:
        await asyncio.sleep(3 * FREEZE_S)  # frozen ones wake and hear what they missed
        for worker in self.workers:
            assert not worker.held, f"{worker.id} still holds {list(worker.held)}"
        assert not any(each._conversations for each in self.pools._workers.values())
        assert self.gate.active == self.gate.queued == 0


def new_journey(index: int, prompt: int, tokens: int) -> Journey:
    request = Request(f"r{index}", tuple(range(10, 10 + prompt)), SamplingParams(max_tokens=tokens, seed=index))
    now = asyncio.get_running_loop().time()
    return Journey(request, now, now + 1e6)


@pytest.mark.parametrize("kv_hit", [False, True])
def test_the_parts_of_ttft_come_from_where_they_were_measured(kv_hit: bool) -> None:
    async def run() -> None:
        async with Cluster([[]], [[]], max_retries=0) as cluster:
            verify, prefill = cluster.workers
            loop = asyncio.get_running_loop()

            def on_verify(command: Command) -> Iterable[Event]:
                if isinstance(command, Reserve):
                    blocks = 0 if kv_hit else 4
                    loop.call_later(0.3, lambda: verify.say(lease_for(verify, command.request, blocks)))
                    if kv_hit:
                        loop.call_later(0.5, lambda: verify.say(last_token(command.request)))
                return ()

            def on_prefill(command: Command) -> Iterable[Event]:
                if isinstance(command, Prefill):
                    done = Prefilled(command.request.id, queue_s=0.2, prefill_s=1.0)
                    loop.call_later(1.2, lambda: prefill.say(done))
                    loop.call_later(1.9, lambda: verify.say(last_token(command.request)))
                return ()

            verify.on, prefill.on = on_verify, on_prefill
            journey = new_journey(0, 100, 1)
            await cluster.serve(journey)
            timing = journey.timing
            parts = (timing.queue_s, timing.prefill_s, timing.transfer_s, timing.first_decode_s)
            # Lease, then the prefill worker's queue | its computation | the last blocks' way | the first step.
            assert parts == pytest.approx((0.3, 0.0, 0.15, 0.05) if kv_hit else (0.5, 1.0, 0.65, 0.05))
            assert timing.ttft_s == pytest.approx(sum(parts))

    run_virtual(run())


def last_token(request: Request) -> Tokens:
    return step(request, 1, 0, end=True, first=FirstToken(0.0, 0.0, 0.05))


plans = st.lists(st.builds(Plan, st.sampled_from(Fault), st.integers(0, 4)), max_size=4)
pools = st.tuples(st.lists(plans, min_size=1, max_size=3), st.lists(plans, max_size=2))
jobs = st.lists(st.tuples(st.sampled_from([2, 100]), st.integers(1, 8)), min_size=1, max_size=6)


@settings(max_examples=EXAMPLES, deadline=None)
@example(([[Plan(Fault.FREEZE, 2)]], []), [(2, 8)])
@example(([[Plan(Fault.SWITCH, 0)], [Plan(Fault.BREAK, 1)]], [[Plan(Fault.HANG, 0)]]), [(100, 8), (2, 3)])
@given(pools, jobs)
def test_the_tokens_are_the_same_whatever_fails(
    pool_plans: tuple[list[list[Plan]], list[list[Plan]]], wanted: list[tuple[int, int]]
) -> None:
    async def run() -> None:
        async with Cluster(*pool_plans, max_retries=1000) as cluster:
            journeys = [new_journey(index, *job) for index, job in enumerate(wanted)]
            answers = await asyncio.gather(*(cluster.serve(journey) for journey in journeys))
            for journey, steps in zip(journeys, answers, strict=True):
                got = tuple(token for each in steps for token in each.tokens)
                assert got == expected_tokens(journey.request, journey.request.sampling.max_tokens)
                assert journey.lifecycle.state is RequestState.FINISHED
                timing = journey.timing
                parts = (timing.queue_s, timing.prefill_s, timing.transfer_s, timing.first_decode_s)
                assert min(parts) >= -1e-9
                assert sum(parts) == pytest.approx(timing.ttft_s)
            await cluster.check_nothing_is_held()

    run_virtual(run())


@settings(max_examples=EXAMPLES, deadline=None)
@given(pools, jobs, st.lists(st.floats(0.0, 100.0), min_size=6, max_size=6), st.integers(0, 2))
def test_whoever_leaves_whenever_leaves_nothing_behind(
    pool_plans: tuple[list[list[Plan]], list[list[Plan]]],
    wanted: list[tuple[int, int]],
    leave_at: list[float],
    max_retries: int,
) -> None:
    async def run() -> None:
        async with Cluster(*pool_plans, max_retries=max_retries) as cluster:

            async def one(index: int, journey: Journey) -> None:
                try:
                    async with asyncio.timeout(leave_at[index] ** 2 / 100):  # most in the first seconds
                        await cluster.serve(journey)
                except (TimeoutError, TidemillError):
                    pass
                expected = expected_tokens(journey.request, journey.request.sampling.max_tokens)
                assert tuple(journey.sent) == expected[: len(journey.sent)]

            await asyncio.gather(*(one(index, new_journey(index, *job)) for index, job in enumerate(wanted)))
            await cluster.check_nothing_is_held()
            assert cluster.counters.value(metrics.ROUTER_ACTIVE) == 0

    run_virtual(run())
