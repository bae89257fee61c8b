"""What workers/engine/base.py promises of sequences that are paused, or go on in another engine, for every engine."""

from dataclasses import replace

import pytest

from tests.contract.test_engine import KINDS, request_of
from tests.support.engines import SMALL, make_engine, random_requests
from tidemill.core.model import Request
from tidemill.types import TokenLogprobs
from workers.engine.base import OutOfBlocks
from workers.engine.native.engine import NativeEngine

Answer = list[tuple[int, tuple[TokenLogprobs, ...]]]
REQUESTS = [
    replace(each, sampling=replace(each.sampling, logprobs=2, max_tokens=30, ignore_eos=True))
    for each in random_requests(seed=5, count=6)
]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def decode(engine: NativeEngine, most: int = 10**9) -> Answer:
    """Up to so many tokens of the one sequence there."""
    found: Answer = []
    while len(found) < most and engine.has_work():
        for each in engine.step().outputs:
            found += zip(each.tokens, [(entry,) for entry in each.logprobs], strict=True)
        engine.check()
    return found


def undisturbed(kind: str, request: Request) -> Answer:
    engine = make_engine(kind)
    engine.submit(request)
    return decode(engine)


@pytest.mark.parametrize(("told", "paused"), [(1, 1), (1, 16), (7, 8), (5, 29)])
def test_what_goes_on_elsewhere_goes_on_the_same(kind: str, told: int, paused: int) -> None:
    """The target knows `told` tokens when it reserves, and hears of the others when the source has paused."""
    for request in REQUESTS:
        source, target = make_engine(kind), make_engine(kind)
        source.submit(request)
        answer = decode(source, told)
        tokens = tuple(token for token, _ in answer)
        blocks = target.reserve(replace(request, output=tokens), headroom_tokens=40)
        answer += decode(source, paused - told)
        assert source.pause(request.id)
        assert not source.has_work()
        computed = len(request.prompt) + len(answer) - 1
        end = -(-computed // SMALL.block_size)
        assert end <= blocks.end_block
        if end > 0:
            target.import_kv(request.id, 0, source.export_kv(request.id, 0, end))
        target.activate(request.id, output=[token for token, _ in answer[told:]])
        target.check()
        source.release(request.id)
        assert source.load().kv_blocks_used == 0
        answer += decode(target)
        assert answer == undisturbed(kind, request)
        assert target.load().kv_blocks_used == 0


def test_what_pauses_goes_on_the_same(kind: str) -> None:
    request = request_of(40, max_tokens=12, temperature=1.0, logprobs=1)
    engine = make_engine(kind)
    engine.submit(request)
    answer = decode(engine, 5)
    held = engine.load().kv_blocks_used
    assert engine.pause("r")
    assert not engine.pause("r"), "it does not decode"
    assert decode(engine) == []
    assert engine.load().kv_blocks_used == held
    engine.resume("r")
    engine.resume("r")
    assert answer + decode(engine) == undisturbed(kind, request)


def test_a_paused_sequence_keeps_its_blocks_whatever_others_need(kind: str) -> None:
    engine = make_engine(kind, SMALL.model_copy(update={"kv_blocks": 8}))
    engine.submit(request_of(60, max_tokens=30, name="paused", logprobs=0))
    answer = decode(engine, 3)
    assert engine.pause("paused")
    engine.submit(request_of(50, max_tokens=60, name="hungry"))
    for _ in range(20):
        engine.step()
        engine.check()
    engine.resume("paused")
    engine.release("hungry")
    alone = make_engine(kind)
    alone.submit(request_of(60, max_tokens=30, name="paused", logprobs=0))
    assert answer + decode(engine) == decode(alone)


def test_only_what_decodes_can_be_paused(kind: str) -> None:
    engine = make_engine(kind, SMALL.model_copy(update={"max_batch_tokens": 16}))
    engine.submit(request_of(40, name="computing"))
    engine.step()
    engine.submit(request_of(40, name="waiting"))
    engine.prefill(request_of(5, name="held"))
    for name in ("computing", "waiting", "held", "nobody"):
        assert not engine.pause(name)
        engine.resume(name)


def test_room_beyond_what_can_come_is_not_reserved(kind: str) -> None:
    engine = make_engine(kind)
    blocks = engine.reserve(request_of(40, max_tokens=30), headroom_tokens=1000)
    assert blocks.end_block == -(-(40 + 30 - 1) // SMALL.block_size)
    engine.release("r")
    small = make_engine(kind, SMALL.model_copy(update={"kv_blocks": 4}))
    with pytest.raises(OutOfBlocks):
        small.reserve(request_of(30, max_tokens=1000, name="first"), headroom_tokens=20)
        small.reserve(request_of(30, max_tokens=1000, name="second"), headroom_tokens=20)
    small.release("first")
    assert small.load().kv_blocks_used == 0


def test_tokens_that_do_not_fit_are_refused(kind: str) -> None:
    engine = make_engine(kind)
    engine.reserve(request_of(40, max_tokens=100), headroom_tokens=8)
    with pytest.raises(ValueError, match="more than blocks were reserved for"):
        engine.activate("r", output=[5] * 20)
    with pytest.raises(ValueError, match="not receiving"):
        make_engine_with_running(kind).activate("r")
    engine.release("r")
    engine.reserve(request_of(40, max_tokens=4), headroom_tokens=8)
    with pytest.raises(ValueError, match="is over"):
        engine.activate("r", output=[5] * 4)
    engine.release("r")
    assert engine.load().kv_blocks_used == 0
    engine.check()


def make_engine_with_running(kind: str) -> NativeEngine:
    engine = make_engine(kind)
    engine.submit(request_of(4))
    engine.step()
    return engine
