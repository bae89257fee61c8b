"""The load tool's open loop in virtual time: it sends what is due, whatever the cluster does."""

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest

from cluster.bench.arrivals import Arrival
from cluster.bench.drive import Driver
from cluster.bench.summary import CANCELLED, DROPPED, OK, Exchange
from tests.support.virtual_time import run_virtual
from tidemill import Chunk, FinishReason, Overloaded, Route, Speculation, Summary

VOCABULARY = 50
SUMMARY = Summary(
    "id", "m", FinishReason.LENGTH, 1, 1, 0,
    route=Route("prefill-0@1", "verify-0@1", "draft-0@1", "", 1), speculation=Speculation(2, 6, 3),
)  # fmt: skip


class FakeClient:
    """The first token after `ttft_s`, the others `tpot_s` apart; overloaded if the prompt has 13 tokens."""

    def __init__(self, ttft_s: float = 1.0, tpot_s: float = 0.1) -> None:
        self.ttft_s, self.tpot_s = ttft_s, tpot_s
        self.sent_at: list[float] = []
        self.prompts: list[Sequence[int]] = []
        self.open = 0

    async def stream(
        self, prompt: Sequence[int], *, slo: str, timeout: float, max_tokens: int, ignore_eos: bool
    ) -> AsyncIterator[Chunk]:
        self.sent_at.append(asyncio.get_running_loop().time())
        self.prompts.append(prompt)
        self.open += 1
        try:
            if len(prompt) == 13:
                raise Overloaded("full")
            await asyncio.sleep(self.ttft_s)
            for index in range(max_tokens):
                if index:
                    await asyncio.sleep(self.tpot_s)
                yield Chunk("", (5,), summary=SUMMARY if index == max_tokens - 1 else None)
        finally:
            self.open -= 1


def arrivals(count: int, gap_s: float = 1.0, prompt: int = 3, output: int = 5) -> list[Arrival]:
    return [Arrival(number * gap_s, prompt, output, "default") for number in range(count)]


def driver(client: FakeClient, max_in_flight: int = 100) -> Driver:
    return Driver(client, VOCABULARY, 1.0, max_in_flight=max_in_flight, timeout_s=60.0, seed=0)


def drive(client: FakeClient, due: list[Arrival], max_in_flight: int = 100) -> list[Exchange]:
    it = driver(client, max_in_flight)
    run_virtual(it.run(due))
    assert client.open == it.in_flight == 0
    return sorted(it.exchanges, key=lambda each: each.number)


def test_slow_answers_hold_nothing_back() -> None:
    client = FakeClient(ttft_s=1000.0)
    exchanges = drive(client, arrivals(20))
    assert client.sent_at == pytest.approx(range(20))
    assert [each.result for each in exchanges] == [OK] * 20


def test_times_and_route() -> None:
    (one,) = drive(FakeClient(), arrivals(1, output=5))
    assert (one.ttft_s, one.tpot_s, one.total_s, one.sent_late_s) == pytest.approx((1.0, 0.1, 1.4, 0.0))
    assert (one.output_tokens, one.accepted_per_verify, one.retries) == (5, 1.5, 1)
    assert (one.prefill_worker, one.draft_worker, one.verify_worker) == ("prefill-0@1", "draft-0@1", "verify-0@1")


def test_a_single_token_has_no_time_between_tokens() -> None:
    (one,) = drive(FakeClient(), arrivals(1, output=1))
    assert (one.ttft_s, one.tpot_s) == (1.0, 0.0)


def test_what_is_due_beyond_the_limit_is_dropped() -> None:
    """Answers take 3.4 s, so with two at a time the third and fourth of each four find no place."""
    client = FakeClient(ttft_s=3.0)
    exchanges = drive(client, arrivals(8), max_in_flight=2)
    assert [each.result for each in exchanges] == [OK, OK, DROPPED, DROPPED] * 2
    assert len(client.sent_at) == 4


def test_errors_are_kept_by_kind_and_do_not_stop_the_load() -> None:
    exchanges = drive(FakeClient(), [*arrivals(1, prompt=13), *arrivals(2)])
    assert [each.result for each in exchanges] == ["overloaded", OK, OK]
    assert exchanges[0].ttft_s is None


def test_prompts_differ_but_not_from_run_to_run() -> None:
    clients = [FakeClient(), FakeClient()]
    for client in clients:
        drive(client, arrivals(5, prompt=40))
    assert clients[0].prompts == clients[1].prompts
    assert len({tuple(prompt) for prompt in clients[0].prompts}) == 5
    assert all(len(prompt) == 40 and set(prompt) <= set(range(VOCABULARY)) for prompt in clients[0].prompts)


def test_interrupted_it_cancels_what_is_in_flight_and_keeps_what_there_is() -> None:
    client = FakeClient(ttft_s=2.0)
    it = driver(client)

    async def interrupted() -> None:
        task = asyncio.create_task(it.run(arrivals(100)))
        await asyncio.sleep(5.5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run_virtual(interrupted())
    assert sorted(each.result for each in it.exchanges) == [CANCELLED] * 2 + [OK] * 4
    assert client.open == it.in_flight == 0
    assert len(client.sent_at) == 6


def test_a_defect_is_not_hidden() -> None:
    class Broken(FakeClient):
        def stream(self, *_: object, **__: object) -> AsyncIterator[Chunk]:
            raise KeyError("defect")

    with pytest.raises(KeyError):
        drive(Broken(), arrivals(3))
