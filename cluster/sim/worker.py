"""A simulated worker: what it holds, and how its steps move that on. It decides nothing; times come from a model."""

import heapq
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from router.journey import Journey
from router.telemetry import NOTHING, Counted
from tidemill.core.model import Peer, Role, WorkerId, WorkerLoad, WorkerSnapshot
from workers.engine.latency import LatencyModel, StepWork


@dataclass(frozen=True, slots=True)
class Hardware:
    """What one worker can hold and take."""

    kv_tokens: int = 60_000
    block_size: int = 16
    max_batch_tokens: int = 2048
    max_running: int = 256
    drafts_per_worker: int = 64  # requests one draft worker keeps up with
    drafted: int = 4  # nodes verified for a request that is drafted for
    accepted: float = 2.0  # of them, on average
    draft_max_batch: int = 16  # with more running nobody drafts


OPT_13B_80GB = Hardware()  # a token's KV is 0.8 MB; 50 GB are left for it


@dataclass(slots=True, eq=False)
class Sequence:
    """A request on a worker: first its prompt (and output so far), then its tokens."""

    journey: Journey
    output_tokens: int  # of the whole request
    context: int  # tokens whose KV it needs before it decodes
    got: float = 0.0  # output tokens so far
    computed: int = 0
    started_at: float | None = None  # of its prompt's computation here
    joined_at: float = 0.0  # worker's `emitted` when it began to decode here
    ready_at: float = 0.0  # when its KV was complete
    fresh: bool = True  # no token from here yet
    holder: "SimWorker | None" = None  # the verify worker whose lease waits for its KV
    computer: "SimWorker | None" = None  # the worker that has its prompt

    def since_joined(self, emitted: float) -> float:
        """Tokens it got here."""
        return max(emitted - self.joined_at, 0.0)


@dataclass(slots=True)
class Stepped:
    """What a step did."""

    prefilled: list[Sequence] = field(default_factory=list)  # on a prefill worker: their KV is ready to go
    started: list[Sequence] = field(default_factory=list)  # got their first token on this worker
    finished: list[Sequence] = field(default_factory=list)
    counted: Counted = NOTHING


class SimWorker:
    """Prompts are computed in chunks, in order; everything that decodes gets its tokens in each step.

    All sequences of a worker advance alike, so one number, `emitted`, counts for all: a step costs the same whatever
    the batch.
    """

    def __init__(self, name: str, role: Role, hardware: Hardware, latency: LatencyModel) -> None:
        self.id = WorkerId(name, 1)
        self.role = role
        self.accepting = True
        self.hardware = hardware
        self.prompts: deque[Sequence] = deque()
        self.decoding: dict[str, Sequence] = {}  # in the order they came
        self.leased: dict[str, Sequence] = {}  # room is held, KV has not come
        self.emitted = 0.0
        self._under_way = 0.0  # what the step under way adds to it
        self.steps = 0
        self.step_s = self.busy_s = 0.0
        self.draft_share = 0.0  # of its requests, how many are drafted for
        self._latency = latency
        self._held = 0.0  # KV tokens of decoding sequences and of prompts begun here
        self._leased = 0
        self._queued_tokens = 0
        self._ends: list[tuple[float, int, Sequence]] = []  # when `emitted` is so large it finishes
        self._order = 0
        self._fresh: list[Sequence] = []  # those that wait for their first token from here
        self._gone = 0  # left the step under way
        self._lives = 0  # how often everything was given up
        self._seen: WorkerSnapshot | None = None

    @property
    def idle(self) -> bool:
        return not (self.prompts or self.decoding or self.leased)

    @property
    def has_work(self) -> bool:
        return bool(self.prompts or self.decoding)

    def snapshot(self) -> WorkerSnapshot:
        """As a router sees it, which has sent it all that it holds."""
        if self._seen is None:
            tokens = self._queued_tokens if self.role is Role.PREFILL else 0
            self._seen = WorkerSnapshot(Peer(self.id, self.id.name), self.role, self.load(), 0, tokens)
        return self._seen

    def become(self, role: Role) -> None:
        """A new incarnation, idle."""
        self.id, self.role, self.accepting = WorkerId(self.id.name, self.id.epoch + 1), role, True
        self._seen = None

    @property
    def free_tokens(self) -> float:
        return self.hardware.kv_tokens - self._held - self._leased

    def load(self) -> WorkerLoad:
        size = self.hardware.block_size
        return WorkerLoad(
            queued_requests=len(self.prompts),
            queued_tokens=self._queued_tokens,
            running_requests=len(self.decoding),
            kv_blocks_total=self.hardware.kv_tokens // size,
            kv_blocks_used=int(self._held) // size,
            kv_blocks_leased=self._leased // size,
            block_size=size,
            steps=self.steps,
            step_s=self.step_s,
            busy_s=self.busy_s,
        )

    # --- what comes ---------------------------------------------------------------------------------------------

    def has_room(self, sequence: Sequence) -> bool:
        """True if a reservation would be granted."""
        return sequence.context <= self.free_tokens and len(self.decoding) < self.hardware.max_running

    def lease(self, sequence: Sequence) -> None:
        """Hold room for a sequence."""
        self._seen = None
        self.leased[sequence.journey.request.id] = sequence
        self._leased += sequence.context

    def end_lease(self, sequence: Sequence) -> None:
        if self.leased.pop(sequence.journey.request.id, None) is not None:
            self._seen = None
            self._leased -= sequence.context

    def compute(self, sequence: Sequence) -> None:
        """Its prompt; on a verify worker it then decodes."""
        sequence.computed, sequence.started_at, sequence.fresh = 0, None, True
        self._seen = None
        self.prompts.append(sequence)
        self._queued_tokens += sequence.context

    def not_begun(self) -> list[Sequence]:
        """Of what was sent here, and not preempted since."""
        return [each for each in (*self.prompts, *self.leased.values()) if each.started_at is None and not each.got]

    def hand_back(self, sequence: Sequence) -> None:
        """One that has not begun goes elsewhere."""
        self.end_lease(sequence)
        if sequence in self.prompts:
            self._seen = None
            self.prompts.remove(sequence)
            self._queued_tokens -= sequence.context

    def decode(self, sequence: Sequence) -> None:
        """Its KV is here."""
        self._held += sequence.context
        self._join(sequence)
        if sequence.fresh:
            self._fresh.append(sequence)

    def _join(self, sequence: Sequence) -> None:
        """From the next step on."""
        self._seen = None
        sequence.joined_at = self.emitted + self._under_way
        self.decoding[sequence.journey.request.id] = sequence
        self._order += 1
        end = sequence.joined_at + sequence.output_tokens - sequence.got
        heapq.heappush(self._ends, (end, self._order, sequence))

    def leave(self, sequence: Sequence) -> None:
        """A decoding sequence goes elsewhere, with its KV."""
        self._seen = None
        del self.decoding[sequence.journey.request.id]
        if self._under_way and sequence.joined_at <= self.emitted:
            self._gone += 1
        more = sequence.since_joined(self.emitted)
        self._held -= sequence.context + more
        sequence.got += more
        sequence.context += round(more)
        sequence.joined_at = self.emitted

    def give_up(self) -> list[Sequence]:
        """Everything it holds; nothing of it is here afterwards."""
        for sequence in list(self.decoding.values()):
            self.leave(sequence)
            self.leased[sequence.journey.request.id] = sequence
        held = [*self.prompts, *self.leased.values()]
        self.prompts.clear()
        self.leased.clear()
        self._ends.clear()
        self._fresh.clear()
        self._seen = None
        self._lives += 1
        self._held = 0.0
        self._leased = self._queued_tokens = 0
        return held

    # --- steps --------------------------------------------------------------------------------------------------

    def begin(self, now: float) -> tuple[float, Callable[[], Stepped]] | None:
        """A step: (seconds, what it did, to be called when it is over); None if there is nothing that could advance."""
        drafting = 0 < len(self.decoding) <= self.hardware.draft_max_batch and self.draft_share > 0
        drafted = self.draft_share * self.hardware.drafted * len(self.decoding) if drafting else 0.0
        gain = 1.0 + (self.draft_share * self.hardware.accepted if drafting else 0.0)
        self._make_room(gain * len(self.decoding))
        batch = len(self.decoding)
        chunks = self._chunks(self.hardware.max_batch_tokens - batch, now)
        if not batch and not chunks:
            return None
        work = StepWork(
            sum(take for _, take in chunks),
            sum((each.computed + take) ** 2 - each.computed**2 for each, take in chunks),
            batch,
            int(self._held) if batch else 0,
            round(drafted),
        )
        seconds, life = self._latency(work), self._lives
        self._under_way, self._gone = gain, 0

        def done() -> Stepped:
            self._seen = None
            self.steps += 1
            self.step_s = seconds
            self.busy_s += seconds
            if life == self._lives:
                return self._end(batch - self._gone, chunks, gain, round(drafted))
            self._under_way = 0.0
            return Stepped()

        return seconds, done

    def _make_room(self, tokens: float) -> None:
        """Whoever came last gives way, and computes its KV again."""
        while self.free_tokens < tokens and len(self.decoding) > 1:
            last = next(reversed(self.decoding.values()))
            self.leave(last)
            last.computed, last.started_at = 0, None
            self.prompts.appendleft(last)
            self._queued_tokens += last.context

    def _chunks(self, budget: int, now: float) -> list[tuple[Sequence, int]]:
        chunks: list[tuple[Sequence, int]] = []
        for sequence in self.prompts:
            if budget <= 0:
                break
            if sequence.started_at is None:
                full = len(self.decoding) + len(chunks) >= self.hardware.max_running
                if self.role is Role.VERIFY and (sequence.context > self.free_tokens or full):
                    break
                sequence.started_at = now
                self._held += sequence.context if self.role is Role.VERIFY else 0
            take = min(sequence.context - sequence.computed, budget)
            chunks.append((sequence, take))
            budget -= take
        return chunks

    def _end(self, batch: int, chunks: list[tuple[Sequence, int]], gain: float, drafted: int) -> Stepped:
        stepped = Stepped()
        self.emitted += gain
        self._under_way = 0.0
        self._held += gain * batch
        stepped.started = [each for each in self._fresh if each.joined_at < self.emitted]
        self._fresh = [each for each in self._fresh if each.joined_at >= self.emitted]
        for sequence, take in chunks:
            sequence.computed += take
            self._queued_tokens -= take
            if sequence.computed >= sequence.context:
                self.prompts.popleft()
                if self.role is Role.PREFILL:
                    stepped.prefilled.append(sequence)
                else:  # its prompt's last row yields a token
                    sequence.got += 1.0
                    sequence.context += 1
                    self._held += 1.0
                    self._join(sequence)
                    batch += 1
                    if sequence.fresh:
                        stepped.started.append(sequence)
        for sequence in stepped.started:
            sequence.fresh = False
        stepped.finished = self._finished()
        prompt_tokens = sum(each.context for each in stepped.prefilled)
        if batch or prompt_tokens:
            tokens = round(gain * batch)
            stepped.counted = Counted(tokens, batch, drafted, tokens - batch, prompt_tokens)
        return stepped

    def _finished(self) -> list[Sequence]:
        finished = []
        while self._ends and self._ends[0][0] <= self.emitted + 1e-6:
            _, _, sequence = heapq.heappop(self._ends)
            request_id = sequence.journey.request.id
            if self.decoding.get(request_id) is sequence and (
                sequence.got + sequence.since_joined(self.emitted) >= sequence.output_tokens - 1e-6
            ):
                self.leave(sequence)
                finished.append(sequence)
        return finished
