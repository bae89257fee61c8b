"""Which router is called next, and when a client gives up."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidemill import InvalidRequest, Overloaded, SamplingParams, Unavailable, _call
from tidemill._call import CallOptions, addresses_of
from tidemill._failover import FIRST_REST_S, MAX_REST_S, Received, Routers, Tries
from tidemill.errors import Cancelled
from tidemill.proto import inference_pb2 as pb


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def options(retries: int = 2) -> CallOptions:
    return CallOptions(None, None, None, retries, 5.0)


def test_addresses_come_as_text_or_list() -> None:
    assert addresses_of("a:1, b:2") == addresses_of(["a:1", "b:2"]) == addresses_of(["a:1,b:2", "a:1"])
    for none in ("", [], [5]):
        with pytest.raises(InvalidRequest, match="expected host:port"):
            addresses_of(none)  # type: ignore[arg-type]


def test_each_router_in_its_turn() -> None:
    routers = Routers(3, Clock(), first=1)
    assert [routers.choose() for _ in range(4)] == [1, 2, 0, 1]


def test_one_that_failed_is_passed_over_for_longer_each_time_and_then_asked_for_its_health() -> None:
    clock = Clock()
    routers = Routers(2, clock, first=0)
    rests = []
    for _ in range(6):
        routers.failed(0)
        before = clock.now
        while routers.choose() != 0 or routers.choose() != 1:
            clock.now += 0.25
        rests.append(clock.now - before)
    assert rests == [FIRST_REST_S * 2**n for n in range(5)] + [MAX_REST_S]
    assert routers.suspect(0)
    assert not routers.suspect(1)
    routers.answered(0)
    assert not routers.suspect(0)
    alone = Routers(1, clock)
    alone.failed(0)
    assert not alone.suspect(0), "there is nobody else to ask meanwhile"


def test_all_are_tried_at_once_then_again_after_a_pause_until_patience_ends() -> None:
    routers, error = Routers(3, Clock(), first=0), Unavailable("gone")
    tries = Tries(routers, options(retries=2), None)
    pauses, order = [], []
    with pytest.raises(Unavailable):
        for _ in range(100):
            order.append(tries.next_router())
            pauses.append(tries.pause_after(order[-1], error))
    assert [sorted(order[at : at + 3]) for at in (0, 3, 6)] == [[0, 1, 2]] * 3
    assert [pause > 0 for pause in pauses] == [False, False, True] * 2 + [False, False]


def test_a_router_that_is_full_is_not_passed_over_by_other_calls() -> None:
    routers = Routers(2, Clock(), first=0)
    tries = Tries(routers, options(), None)
    assert tries.pause_after(tries.next_router(), Overloaded("full")) == 0.0
    assert not routers.suspect(0)


def test_what_cannot_pass_is_raised_at_once_and_a_call_that_the_router_ended_can() -> None:
    tries = Tries(Routers(2, Clock(), first=0), options(retries=0), None)
    with pytest.raises(InvalidRequest):
        tries.pause_after(0, InvalidRequest("no"))
    assert tries.pause_after(0, Cancelled("by the server")) == 0.0
    with pytest.raises(Unavailable, match="the router ended the call"):
        tries.pause_after(1, Cancelled("by the server"))


def test_no_pause_goes_past_the_deadline() -> None:
    tries = Tries(Routers(1, Clock()), options(retries=9), 0.0)
    with pytest.raises(Unavailable):
        tries.pause_after(0, Unavailable("gone"))


def test_progress_gives_patience_back() -> None:
    tries = Tries(Routers(1, Clock()), options(retries=1), None)
    for _ in range(5):
        tries.pause_after(0, Unavailable("gone"))
        tries.progressed(0)
    tries.pause_after(0, Unavailable("gone"))
    with pytest.raises(Unavailable):
        tries.pause_after(0, Unavailable("gone"))


@given(st.lists(st.lists(st.integers(0, 2**32 - 1), max_size=5), max_size=9))
def test_the_next_router_is_told_all_tokens_in_order(steps: list[list[int]]) -> None:
    request = _call.generate_request("x", SamplingParams(temperature=1.0), "", "", "", "")
    received = Received(request)
    for step in steps:
        assert received.take(pb.GenerateChunk(tokens=step)).tokens == tuple(step)
    assert list(received.request.received) == [token for step in steps for token in step]
    assert not received.complete


def test_the_seed_is_fixed_before_the_first_try() -> None:
    def seed(**sampling: float) -> int | None:
        message = _call.generate_request("x", _call.sampling_params(None, sampling), "", "", "", "").sampling
        return message.seed if message.HasField("seed") else None

    assert seed(temperature=0.7, seed=3) == 3
    assert seed(temperature=0.7) not in (None, seed(temperature=0.7))
    assert seed() is None
