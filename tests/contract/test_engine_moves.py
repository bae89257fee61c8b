"""What workers/engine/base.py promises of sequences that are paused, or go on in another engine, for every engine."""

from dataclasses import replace

import pytest

from tests.contract.test_engine import request_of
from tests.support.engines import make_engine, pool_of, random_requests
from tidemill.core.model import Request
from tidemill.types import TokenLogprobs
from workers.engine.base import OutOfBlocks
from workers.engine.native.engine import NativeEngine

Answer = list[tuple[int, tuple[TokenLogprobs, ...]]]


def requests_for(kind: str) -> list[Request]:
    """vLLM promises the same tokens for greedy ones whose penalties do not tell the prompt from the output."""
    changes: dict[str, object] = {"logprobs": 2, "max_tokens": 30, "ignore_eos": True}
    if kind == "vllm":
        changes |= {"temperature": 0.0, "frequency_penalty": 0.0}
    requests = random_requests(seed=5, count=6)
    return [replace(each, sampling=replace(each.sampling, **changes)) for each in requests]  # type: ignore[arg-type]


def assert_same(kind: str, answer: Answer, expected: Answer) -> None:
    """To the last bit, or as vLLM promises it: the same tokens, chances but for rounding."""
    if kind != "vllm":
        assert answer == expected
        return
    assert [token for token, _ in answer] == [token for token, _ in expected]
    found, wanted = ([entry.logprob for _, entries in each for entry in entries] for each in (answer, expected))
    assert found == pytest.approx(wanted, abs=1e-3)


def decode(engine: NativeEngine, most: int = 10**9) -> Answer:
    """Up to so many tokens of the one sequence there."""
    found: Answer = []
    while len(found) < most and engine.has_work():
        for each in engine.step().outputs:
            found += zip(each.tokens, [(entry,) for entry in each.logprobs], strict=True)
        engine.check()
    return found


def undisturbed(engine: NativeEngine, request: Request) -> Answer:
    engine.submit(request)
    return decode(engine)


@pytest.mark.parametrize(("told", "paused"), [(1, 1), (1, 16), (7, 8), (5, 29)])
def test_what_goes_on_elsewhere_goes_on_the_same(kind: str, told: int, paused: int) -> None:
    """The target knows `told` tokens when it reserves, and hears of the others when the source has paused."""
    source, target, alone = make_engine(kind), make_engine(kind), make_engine(kind)
    for request in requests_for(kind):
        source.submit(request)
        answer = decode(source, told)
        tokens = tuple(token for token, _ in answer)
        blocks = target.reserve(replace(request, output=tokens), headroom_tokens=40)
        answer += decode(source, paused - told)
        assert source.pause(request.id)
        assert not source.has_work()
        computed = len(request.prompt) + len(answer) - 1
        end = -(-computed // source.info.kv.block_size)
        assert end <= blocks.end_block
        first = blocks.first_block
        if end > first:
            target.import_kv(request.id, first, source.export_kv(request.id, first, end))
        target.activate(request.id, output=[token for token, _ in answer[told:]])
        target.check()
        source.release(request.id)
        assert source.load().kv_blocks_used == 0
        answer += decode(target)
        assert_same(kind, answer, undisturbed(alone, request))
        assert target.load().kv_blocks_used == 0


def test_what_pauses_goes_on_the_same(kind: str) -> None:
    request = request_of(40, max_tokens=12, temperature=0.0 if kind == "vllm" else 1.0, logprobs=1)
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
    assert_same(kind, answer + decode(engine), undisturbed(make_engine(kind), request))


def test_a_paused_sequence_keeps_its_blocks_whatever_others_need(kind: str) -> None:
    engine = make_engine(kind, pool_of(kind, 128))
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
    assert_same(kind, answer + decode(engine), decode(alone))


def test_only_what_decodes_can_be_paused(kind: str) -> None:
    engine = make_engine(kind, pool_of(kind, 4096, max_batch_tokens=16))
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
    assert blocks.end_block == -(-(40 + 30 - 1) // engine.info.kv.block_size)
    engine.release("r")
    small = make_engine(kind, pool_of(kind, 64))
    with pytest.raises(OutOfBlocks):
        small.reserve(request_of(30, max_tokens=1000, name="first"), headroom_tokens=20)
        small.reserve(request_of(30, max_tokens=1000, name="second"), headroom_tokens=20)
    small.release("first")
    assert small.load().kv_blocks_used == 0


def test_tokens_that_do_not_fit_are_refused(kind: str) -> None:
    engine = make_engine(kind)
    engine.reserve(request_of(40, max_tokens=100), headroom_tokens=8)
    with pytest.raises(ValueError, match="more than blocks were reserved for"):
        engine.activate("r", output=[5] * 40)
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
