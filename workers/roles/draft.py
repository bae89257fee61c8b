"""Draft: keep the small model's KV of each request and propose what comes next.

The draft samples with the request's own parameters and noise, so its choice is the target's wherever the two models
agree. Its words change the speed of a request, never its tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from tidemill.core.messages import Cancel, Command, Draft, DraftAsk, DraftCall, DraftReply, Failure, Refusal
from tidemill.core.model import Request, Role
from tidemill.core.settings import Settings
from tidemill.types import SamplingParams
from workers.engine.base import Engine, RequestTooLong, StepOutput
from workers.roles.base import Outbox, for_each, refuse

Reply = Callable[[DraftReply], None]
Key = tuple[int, str]  # stream and request: two verify workers may carry the same request


@dataclass(slots=True, eq=False)
class Drafting:
    """What the draft worker knows of a request: its tokens so far."""

    request: Request
    engine_id: str
    tokens: list[int]


@dataclass(slots=True, eq=False)
class Round:
    """A call being worked on: tokens drafted so far for each ask; answered when none is missing."""

    stream: int
    number: int
    reply: Reply
    bases: dict[str, int] = field(default_factory=dict)  # request -> its committed tokens
    drafted: dict[str, list[int]] = field(default_factory=dict)
    wanted: dict[str, int] = field(default_factory=dict)  # engine id -> tokens still to draft


class DraftRole:
    """See WorkerRole. Streams of verify workers are numbered."""

    role = Role.DRAFT

    def __init__(self, engine: Engine, outbox: Outbox, settings: Settings) -> None:
        self._engine = engine
        self._outbox = outbox
        self._settings = settings
        self._known: dict[Key, Drafting] = {}  # least recently asked for first
        self._rounds: list[Round] = []

    # --- calls of verify workers --------------------------------------------------------------------------------

    def on_call(self, stream: int, call: DraftCall, reply: Reply) -> None:
        """Take a verify worker's message; `reply` is called once, when all drafts asked for are there."""
        for request_id in call.closes:
            self._close((stream, request_id))
        for each in call.opens:
            self._open((stream, each.request.id), each.request)
        current = Round(stream, call.round, reply)
        for ask in call.asks:
            self._ask(current, ask)
        self._rounds.append(current)
        self._answer_finished()

    def _open(self, key: Key, request: Request) -> None:
        while len(self._known) >= self._settings.engine.max_waiting:
            self._close(next(iter(self._known)))
        self._close(key)
        if not self._in_vocabulary(request.tokens):
            return  # unknown from here on: its asks get empty drafts
        engine_id = f"{key[0]}/{key[1]}"
        # Nothing ends a draft but its length: stop conditions are the target's to find.
        sampling = replace(request.sampling, stop=(), stop_token_ids=(), logprobs=None, ignore_eos=True)
        try:
            self._engine.prefill(replace(request, id=engine_id, sampling=sampling))
        except (RequestTooLong, ValueError):
            return
        self._known[key] = Drafting(request, engine_id, list(request.tokens))

    def _ask(self, current: Round, ask: DraftAsk) -> None:
        current.bases[ask.request_id] = ask.base + len(ask.tokens)
        current.drafted[ask.request_id] = []
        key = (current.stream, ask.request_id)
        known = self._known.pop(key, None)
        if known is None:
            return
        self._known[key] = known
        if len(known.tokens) != ask.base or not self._in_vocabulary(ask.tokens):
            return self._close(key)  # lost track of it, for good: it has to be opened again
        known.tokens += ask.tokens
        want = min(ask.want, self._engine.info.context_length - len(known.tokens))
        if want > 0:
            self._engine.rewrite(known.engine_id, known.tokens[len(known.request.prompt) :], want)
            current.wanted[known.engine_id] = want

    def _in_vocabulary(self, tokens: Sequence[int]) -> bool:
        """The target's vocabulary may be the larger one."""
        return max(tokens, default=0) < self._engine.info.vocab_size

    def _close(self, key: Key) -> None:
        known = self._known.pop(key, None)
        if known is not None:
            self._engine.release(known.engine_id)
            for current in self._rounds:
                current.wanted.pop(known.engine_id, None)

    def stream_closed(self, stream: int) -> None:
        """The verify worker is gone, and with it all its requests."""
        self._rounds = [each for each in self._rounds if each.stream != stream]
        for key in [each for each in self._known if each[0] == stream]:
            self._close(key)

    # --- WorkerRole ---------------------------------------------------------------------------------------------

    def handle(self, command: Command, now: float) -> None:
        if isinstance(command, Cancel):
            self._outbox.forget(command.request_id)
        else:
            refuse(self._outbox, command.request.id, Refusal.WRONG_ROLE)

    def cancel(self, request_id: str) -> None:
        """Routers hold nothing here; verify workers close their own requests."""

    def poll(self, now: float) -> None:
        self._answer_finished()  # a request that was closed may have been the last that a round waited for

    def next_step_at(self, now: float) -> float | None:
        return now if self._engine.has_work() else None

    def next_poll_at(self) -> float | None:
        return None

    def after_step(self, output: StepOutput, now: float) -> None:
        for each in output.outputs:
            for current in self._rounds:
                if each.request_id in current.wanted:
                    self._take(current, each.request_id, each.tokens)
        self._answer_finished()

    def _take(self, current: Round, engine_id: str, tokens: tuple[int, ...]) -> None:
        current.drafted[engine_id.partition("/")[2]] += tokens
        current.wanted[engine_id] -= len(tokens)
        if current.wanted[engine_id] <= 0:
            del current.wanted[engine_id]

    def _answer_finished(self) -> None:
        finished = [current for current in self._rounds if not current.wanted]
        self._rounds = [current for current in self._rounds if current.wanted]
        for current in finished:
            drafts = tuple(
                Draft(request_id, current.bases[request_id], tuple(tokens), tuple(range(-1, len(tokens) - 1)))
                for request_id, tokens in current.drafted.items()
            )
            current.reply(DraftReply(current.number, drafts))

    def give_up(self, failure: Failure, detail: str) -> None:
        """Answer what is asked with empty drafts and forget every request."""
        for current in self._rounds:
            current.drafted = {request_id: [] for request_id in current.drafted}
            current.wanted.clear()
        for_each([each.engine_id for each in self._known.values()], self._engine.release)
        self._known.clear()
        self._answer_finished()

    def close(self) -> None:
        """Streams belong to the service."""

    @property
    def idle(self) -> bool:
        """Drafts are optional at every moment, so only a call being worked on is worth waiting for."""
        return not self._rounds

    def probe(self) -> None:
        """Draft one token."""
        probe = Request("probe/draft", (0, 0), SamplingParams(max_tokens=1, seed=0))
        try:
            self._engine.prefill(probe)
            self._engine.step()
            self._engine.rewrite(probe.id, (), 1)
            outputs = self._engine.step().outputs
        finally:
            self._engine.release(probe.id)
        if not outputs:
            raise RuntimeError("no token was drafted")
