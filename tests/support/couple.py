"""Two verify workers between which a request moves; a router's part, and the link's, are played by hand."""

from dataclasses import replace

import pytest

from tests.support.benches import Bench, carry_kv
from tests.support.engines import SMALL, VOCABULARY
from tests.support.requests import plain
from tests.support.workers import settings_of
from tidemill.core.messages import Cancel, Migrate, Paused, Reserve, Resume, Submit
from tidemill.core.model import Peer, Request, Role, WorkerId
from tidemill.core.settings import EngineSettings
from tidemill.types import SamplingParams
from workers.engine.emulated import EmulatedEngine
from workers.roles import departures

DRAFTER = Peer(WorkerId("draft-0", 1), "nowhere")
BLOCK_BYTES = EmulatedEngine(SMALL, VOCABULARY).info.kv.block_bytes


def request_of(name: str = "r", tokens: int = 100, max_tokens: int = 60) -> Request:
    prompt = tuple(2 + i * 7 % (VOCABULARY - 2) for i in range(tokens))
    sampling = SamplingParams(
        max_tokens=max_tokens, temperature=1.0, frequency_penalty=0.5, repetition_penalty=1.1, ignore_eos=True, seed=1
    )
    return Request(name, prompt, sampling)


class Couple:
    """Two verify workers, and one request that decodes on the first. `NEW` is its name on the second."""

    NEW = "r/moved"

    def __init__(
        self,
        engine: EngineSettings = SMALL,
        request: Request | None = None,
        drafter: Peer | None = None,
        elder: Request | None = None,
    ) -> None:
        """`elder` came to the first worker before it."""
        self.source = Bench(Role.VERIFY, settings_of(engine), name="verify-0")
        self.target = Bench(Role.VERIFY, settings_of(engine), name="verify-1")
        self.request = request or request_of()
        self.drafter = drafter
        if elder is not None:
            self.source.send(Submit(elder))
            self.source.turn(2)
        self.source.send(Submit(self.request, drafter))
        self.source.turn(6, advance_s=0.0 if drafter is None else 0.3)  # nobody answers, so nobody is waited for
        assert len(self.source.tokens("r")) == 5

    def reserve(self, headroom: int = 40, ttl_s: float = 10.0) -> None:
        request = replace(self.request, id=self.NEW, output=self.source.tokens("r"))
        self.known = len(request.tokens)
        self.target.send(Reserve(request, ttl_s, self.drafter, headroom))
        self.target.turn()

    def migrate(self) -> None:
        self.lease = self.target.granted(self.NEW).lease
        self.source.send(Migrate("r", self.lease, self.known))
        self.source.turn()

    def begin(self, headroom: int = 40, ttl_s: float = 10.0) -> None:
        self.reserve(headroom, ttl_s)
        self.migrate()

    @property
    def paused(self) -> bool:
        return Paused("r", self.lease.id) in self.source.events("r")

    def until_paused(self, most: int = 50) -> int:
        """Carry what comes; returns how many turns that took. The last messages are left with the link."""
        for turn in range(most):
            if self.paused:
                return turn
            carry_kv(self.source, self.target)
            self.source.turn()
        raise AssertionError(f"it does not pause: {self.source.events('r')[-3:]}")

    def fill(self) -> None:
        """The last blocks come."""
        carry_kv(self.source, self.target)
        self.target.turn()

    def arrived(self) -> None:
        """The router has the first token of the target."""
        assert self.target.tokens(self.NEW)
        self.source.send(Cancel("r"))
        self.source.turn()

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.source.tokens("r") + self.target.tokens(self.NEW)

    def stays(self) -> None:
        """What a router does when a move has failed; then the request must go on as if nothing had been."""
        self.target.send(Cancel(self.NEW))
        self.source.send(Resume("r"))
        self.target.turn()
        self.source.drain()
        assert self.source.tokens("r") == plain(self.request)
        self.assert_empty()

    def assert_empty(self) -> None:
        self.source.assert_empty()
        self.target.assert_empty()


def small_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """One block a step."""
    monkeypatch.setattr(departures, "STAGE_BYTES", BLOCK_BYTES)
