"""Requests for the emulated engine, and what it answers when it has nothing else to do."""

from tests.support.engines import SMALL, VOCABULARY, one_by_one
from tidemill.core.model import Request
from tidemill.types import SamplingParams
from workers.engine.emulated import EmulatedEngine


def request_of(name: str = "r", tokens: int = 20, max_tokens: int = 24) -> Request:
    prompt = tuple(2 + i * 7 % (VOCABULARY - 2) for i in range(tokens))
    return Request(name, prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=1))


def plain(request: Request) -> tuple[int, ...]:
    """Its tokens."""
    return one_by_one(EmulatedEngine(SMALL, VOCABULARY), [request])[request.id]
