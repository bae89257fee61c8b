"""Draft: keep the small model's KV of each request and propose what comes next.

The draft samples with the request's own parameters and noise, so its choice is the target's wherever the two models
agree. Its words change the speed of a request, never its tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from tidemill.core.messages import Cancel, Command, Draft, DraftCall, DraftReply, Failure, Refusal, Refused
from tidemill.core.model import Request, Role
from tidemill.core.settings import Settings
from tidemill.types import SamplingParams
from workers.engine.base import Engine, RequestTooLong, StepOutput
from workers.roles.base import Outbox

Reply = Callable[[DraftReply], None]


@dataclass(slots=True, eq=False)
class Drafting:
    """What the draft worker knows of a request: its tokens so far."""

    request: Request
    tokens: list[int]


@dataclass(slots=True, eq=False)
class Round:
    """A call being worked on: tokens drafted so far for each ask; answered when none is missing."""

    stream: int
    number: int
    reply: Reply
    wanted: dict[str, int] = field(default_factory=dict)  # engine id -> tokens still to draft
    drafted: dict[str, list[int]] = field(default_factory=dict)


class DraftRole:
    """See WorkerRole. Streams of verify workers are numbered; two of them may carry the same request id."""

    role = Role.DRAFT

    def __init__(self, engine: Engine, outbox: Outbox, settings: Settings) -> None:
        self._engine = engine
        self._outbox = outbox
        self._settings = settings
        self._known: dict[str, Drafting] = {}  # by engine id, oldest first
        self._rounds: list[Round] = []

    def handle(self, command: Command, now: float) -> None:
        request_id = command.request_id if isinstance(command, Cancel) else command.request.id
        if not isinstance(command, Cancel):
            self._outbox.emit(Refused(request_id, Refusal.WRONG_ROLE))
        self._outbox.forget(request_id)

    def on_call(self, stream: int, call: DraftCall, reply: Reply) -> None:
        """Take a verify worker's message; `reply` is called once if it asks for anything."""
        for request_id in call.closes:
            self._close(_engine_id(stream, request_id))
        for each in call.opens:
            self._open(_engine_id(stream, each.request.id), each.request)
        if not call.asks:
            return
        current = Round(stream, call.round, reply)
        for ask in call.asks:
            engine_id = _engine_id(stream, ask.request_id)
            current.drafted[engine_id] = []
            known = self._known.get(engine_id)
            if known is None or len(known.tokens) != ask.base:
                continue  # lost track of it: an empty draft
            known.tokens += ask.tokens
            want = min(ask.want, self._engine.info.context_length - len(known.tokens))
            if want > 0:
                self._engine.rewrite(engine_id, known.tokens[len(known.request.prompt) :], want)
                current.wanted[engine_id] = want
        self._rounds.append(current)
        self._answer_finished()

    def _open(self, engine_id: str, request: Request) -> None:
        while len(self._known) >= self._settings.engine.max_waiting:
            self._close(next(iter(self._known)))
        # Nothing ends a draft but its length: stop conditions are the target's to find.
        sampling = replace(request.sampling, stop=(), stop_token_ids=(), logprobs=None, ignore_eos=True)
        self._close(engine_id)
        try:
            self._engine.prefill(replace(request, id=engine_id, sampling=sampling))
        except RequestTooLong:
            return  # unknown from here on: its asks get empty drafts
        self._known[engine_id] = Drafting(request, list(request.tokens))

    def _close(self, engine_id: str) -> None:
        if self._known.pop(engine_id, None) is not None:
            self._engine.release(engine_id)
        for current in self._rounds:
            current.wanted.pop(engine_id, None)

    def stream_closed(self, stream: int) -> None:
        """The verify worker is gone, and with it all its requests."""
        self._rounds = [each for each in self._rounds if each.stream != stream]
        for engine_id in [each for each in self._known if each.startswith(f"{stream}/")]:
            self._close(engine_id)

    def cancel(self, request_id: str) -> None:
        """Routers hold nothing here; verify workers close their own requests."""

    def poll(self, now: float) -> None:
        """Nothing waits for a time here."""

    def next_step_at(self, now: float) -> float | None:
        return now if self._engine.has_work() else None

    def before_step(self, now: float) -> None:
        """Nothing to attach."""

    def after_step(self, output: StepOutput, now: float) -> None:
        for each in output.outputs:
            for current in self._rounds:
                if each.request_id in current.wanted:
                    current.drafted[each.request_id] += each.tokens
                    current.wanted[each.request_id] -= len(each.tokens)
                    if current.wanted[each.request_id] <= 0:
                        del current.wanted[each.request_id]
        self._answer_finished()

    def _answer_finished(self) -> None:
        finished = [current for current in self._rounds if not current.wanted]
        self._rounds = [current for current in self._rounds if current.wanted]
        for current in finished:
            drafts = tuple(
                Draft(
                    engine_id.partition("/")[2],
                    len(self._known[engine_id].tokens) if engine_id in self._known else 0,
                    tuple(tokens),
                    tuple(range(-1, len(tokens) - 1)),
                )
                for engine_id, tokens in current.drafted.items()
            )
            current.reply(DraftReply(current.number, drafts))

    def engine_failed(self, detail: str) -> None:
        self.give_up(Failure.ENGINE, detail)

    def give_up(self, failure: Failure, detail: str) -> None:
        """Answer what is asked with empty drafts and forget every request."""
        for engine_id in list(self._known):
            self._close(engine_id)
        for current in self._rounds:
            current.drafted = {engine_id: [] for engine_id in current.drafted}
        self._answer_finished()

    def close(self) -> None:
        """Streams belong to the service."""

    @property
    def idle(self) -> bool:
        return not self._known

    def probe(self) -> None:
        """Draft one token."""
        probe = Request("probe/draft", (0, 0), SamplingParams(max_tokens=1, seed=0))
        self._engine.prefill(probe)
        self._engine.step()
        self._engine.rewrite(probe.id, (), 1)
        outputs = self._engine.step().outputs
        self._engine.release(probe.id)
        if not outputs:
            raise RuntimeError("no token was drafted")


def _engine_id(stream: int, request_id: str) -> str:
    return f"{stream}/{request_id}"
