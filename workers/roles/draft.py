"""Draft: keep the small model's KV of each request and grow the tree of what may come next.

The draft chooses with the request's own parameters and noise, so its choice is the target's wherever the two models
agree. Its words change the speed of a request, never its tokens.

    call -> committed tokens -> the tree is re-rooted -> grows to the shape asked for -> sent
                                                      -> grows on, ahead of the verdict -> sent again, unasked
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from tidemill.core.messages import (
    Command,
    Draft,
    DraftAsk,
    DraftCall,
    DraftReply,
    Failure,
    Prefill,
    Refusal,
    Reserve,
    Submit,
)
from tidemill.core.model import Request, Role
from tidemill.core.settings import Settings
from tidemill.core.tree import ROOT, Shape, prefix_hash
from tidemill.types import SamplingParams
from workers.engine.base import Engine, GrowingTree, RequestTooLong, StepOutput
from workers.roles.base import Outbox, for_each, refuse
from workers.speculation.frontier import Strategy, frontier, worth_sending
from workers.speculation.ranks import RankAcceptance

Reply = Callable[[DraftReply], None]
Key = tuple[int, str]  # stream and request: two verify workers may carry the same request

AHEAD_ROWS = 8  # nodes of one tree that a step computes ahead of the verdict
STEP_MEMORY = 0.1  # weight of the newest step in their average
MAX_WIDTH, MAX_NODES, MAX_DEPTH = 16, 256, 64  # of a tree, whatever is asked for


@dataclass(slots=True, eq=False)
class Drafting:
    """What the draft worker knows of a request: its tokens so far, and what is wanted after them."""

    request: Request
    key: Key
    engine_id: str
    tokens: list[int]
    prefix: int  # their hash
    shape: Shape | None = None  # None: nothing was asked for yet
    ahead: int = 0
    rounds_sent: int = 0  # how many times the shape was sent already: 1 is the answer, more is ahead
    nodes_sent: int = 0
    resumed: bool = False  # since the ask, its KV was found missing


@dataclass(slots=True, eq=False)
class Stream:
    """A verify worker. `unanswered` are asks whose tree is not there yet, by request: the round of the newest."""

    reply: Reply
    round: int = 0
    unanswered: dict[str, int] = field(default_factory=dict)
    drafts: list[Draft] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    acknowledged: int = 0

    def flush(self, step_s: float) -> None:
        """Say what is new, if anything is."""
        done = min(self.unanswered.values(), default=self.round + 1) - 1
        if self.drafts or self.lost or done > self.acknowledged:
            self.acknowledged = max(done, self.acknowledged)
            self.reply(DraftReply(self.acknowledged, tuple(self.drafts), tuple(self.lost), step_s))
            self.drafts, self.lost = [], []


class DraftRole:
    """See WorkerRole. Streams of verify workers are numbered."""

    role = Role.DRAFT

    def __init__(self, engine: Engine, outbox: Outbox, settings: Settings) -> None:
        self._engine = engine
        self._outbox = outbox
        self._max_known = settings.engine.max_waiting
        self._strategy = Strategy(settings.speculation.strategy)
        self._ranks = RankAcceptance()
        self._known: dict[Key, Drafting] = {}  # least recently asked for first
        self._by_engine_id: dict[str, Drafting] = {}
        self._streams: dict[int, Stream] = {}
        self._step_s = 0.0  # a moving average

    # --- calls of verify workers --------------------------------------------------------------------------------

    def on_call(self, number: int, call: DraftCall, reply: Reply) -> None:
        """Take a verify worker's message. `reply` is called when drafts are there, now and later."""
        stream = self._streams.setdefault(number, Stream(reply))
        stream.reply, stream.round = reply, call.round
        for request_id in call.closes:
            self._close((number, request_id))
        for each in call.opens:
            self._open((number, each.request.id), each.request)
        for ask in call.asks:
            self._ask(stream, (number, ask.request_id), ask)
        stream.flush(self._step_s)

    def _open(self, key: Key, request: Request) -> None:
        while len(self._known) >= self._max_known:
            self._close(next(iter(self._known)))
        self._close(key)
        if not self._in_vocabulary(request.tokens):
            return  # unknown from here on: it is lost as soon as it is asked for
        engine_id = f"{key[0]}/{key[1]}"
        # Nothing ends a draft but its length: stop conditions are the target's to find.
        sampling = replace(request.sampling, stop=(), stop_token_ids=(), logprobs=None, ignore_eos=True)
        try:
            self._engine.prefill(replace(request, id=engine_id, sampling=sampling))
        except (RequestTooLong, ValueError):
            return
        drafting = Drafting(request, key, engine_id, list(request.tokens), prefix_hash(request.tokens))
        self._known[key] = self._by_engine_id[engine_id] = drafting

    def _ask(self, stream: Stream, key: Key, ask: DraftAsk) -> None:
        known = self._known.pop(key, None)
        if known is None:
            stream.lost.append(ask.request_id)
            return
        self._known[key] = known
        room = self._engine.info.context_length - len(known.tokens) - len(ask.tokens)
        if len(known.tokens) != ask.base or not self._in_vocabulary(ask.tokens) or room <= 0:
            self._close(key)  # lost track of it, for good: it has to be opened again
            stream.lost.append(ask.request_id)
            return
        self._ranks.observe(self._engine.growth(known.engine_id).tree, ask.tokens)
        known.tokens += ask.tokens
        known.prefix = prefix_hash(ask.tokens, known.prefix)
        shape = ask.shape
        known.shape = Shape(min(shape.depth, MAX_DEPTH), min(shape.width, MAX_WIDTH), min(shape.nodes, MAX_NODES))
        known.ahead, known.rounds_sent, known.nodes_sent, known.resumed = ask.ahead, 0, 0, False
        stream.unanswered[ask.request_id] = stream.round
        self._engine.follow(known.engine_id, self._output(known))
        self._advance(known)

    def _output(self, known: Drafting) -> list[int]:
        return known.tokens[len(known.request.prompt) :]

    def _in_vocabulary(self, tokens: Sequence[int]) -> bool:
        """The target's vocabulary may be the larger one."""
        return max(tokens, default=0) < self._engine.info.vocab_size

    def _close(self, key: Key) -> None:
        known = self._known.pop(key, None)
        if known is not None:
            del self._by_engine_id[known.engine_id]
            self._engine.release(known.engine_id)
            stream = self._streams.get(key[0])
            if stream is not None:
                stream.unanswered.pop(key[1], None)

    def stream_closed(self, stream: int) -> None:
        """The verify worker is gone, and with it all its requests."""
        self._streams.pop(stream, None)
        for key in [each for each in self._known if each[0] == stream]:
            self._close(key)

    # --- growing ------------------------------------------------------------------------------------------------

    def _advance(self, known: Drafting) -> None:
        """Send the tree as often as it has reached what was wanted next, and have it grow on until nothing is."""
        while known.shape is not None and known.rounds_sent <= known.ahead:
            growing = self._engine.growth(known.engine_id)
            shape = known.shape.times(known.rounds_sent + 1)
            # An answer is waited for; what is drafted ahead covers more outcomes if more nodes share a step.
            at_once = max(shape.width, AHEAD_ROWS) if known.rounds_sent else shape.width
            nodes = frontier(self._strategy, growing.tree, growing.done, shape, self._ranks.template(shape), at_once)
            if nodes and self._engine.grow(known.engine_id, nodes, shape.width):
                return
            if nodes and known.rounds_sent:
                return  # its KV was taken: what is drafted ahead is not worth computing it again
            if nodes and not known.resumed:
                # Its prompt is being computed; or its KV was taken, and then it is now computed again, once for an ask:
                # requests that take each other's would go on for ever.
                known.resumed = True
                self._engine.follow(known.engine_id, self._output(known))
                return
            self._send(known, growing, shape)

    def _send(self, known: Drafting, growing: GrowingTree, shape: Shape) -> None:
        """The answer is sent in any case; what was drafted ahead only if it is more."""
        stream = self._streams[known.key[0]]
        tree = worth_sending(self._strategy, growing.tree, shape, self._ranks.template(shape))
        known.rounds_sent += 1
        stream.unanswered.pop(known.request.id, None)
        if len(tree) > known.nodes_sent:
            known.nodes_sent = len(tree)
            stream.drafts.append(Draft(known.request.id, len(known.tokens), tree, known.prefix))

    # --- WorkerRole ---------------------------------------------------------------------------------------------

    def handle(self, command: Command, now: float) -> None:
        match command:
            case Reserve() | Submit() | Prefill():
                refuse(self._outbox, command.request.id, Refusal.WRONG_ROLE)
            case _:
                self._outbox.forget(command.request_id)

    def cancel(self, request_id: str) -> None:
        """Routers hold nothing here; verify workers close their own requests."""

    def poll(self, now: float) -> None:
        """Nothing here has a deadline."""

    def next_step_at(self, now: float) -> float | None:
        return now if self._engine.has_work() else None

    def next_poll_at(self) -> float | None:
        return None

    def before_step(self, now: float) -> None:
        """What grows was said as soon as it was known."""

    def after_step(self, output: StepOutput, now: float) -> None:
        if output.grown and not output.progress:
            self._step_s += (STEP_MEMORY if self._step_s else 1.0) * (output.seconds - self._step_s)
        ready = [*output.grown, *(each.request_id for each in output.progress if each.held)]
        for engine_id in ready:
            known = self._by_engine_id.get(engine_id)
            if known is not None:
                self._advance(known)
        for stream in self._streams.values():
            stream.flush(self._step_s)

    def drain(self) -> None:
        """Drafts are not worth waiting for."""

    def give_up(self, failure: Failure, detail: str) -> None:
        """Forget every request, and say so."""
        for stream in self._streams.values():
            stream.lost += stream.unanswered
            stream.unanswered.clear()
        for_each([each.engine_id for each in self._known.values()], self._engine.release)
        self._known.clear()
        self._by_engine_id.clear()
        for stream in self._streams.values():
            stream.flush(self._step_s)

    def close(self) -> None:
        """Streams belong to the service."""

    @property
    def idle(self) -> bool:
        """Drafts are optional at every moment, so only an ask being worked on is worth waiting for."""
        return not any(stream.unanswered for stream in self._streams.values())

    def probe(self) -> None:
        """Draft one token."""
        probe = Request("probe/draft", (0, 0), SamplingParams(max_tokens=1, seed=0))
        try:
            self._engine.prefill(probe)
            self._engine.step()
            self._engine.grow(probe.id, [ROOT], 1)
            self._engine.step()
            drafted = self._engine.growth(probe.id).tree
        finally:
            self._engine.release(probe.id)
        if not drafted:
            raise RuntimeError("no token was drafted")
