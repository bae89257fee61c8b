"""Sends a load: every request when it is due, however slow the answers are.

An open loop, as users are: one that waited for answers would slow down with the cluster and hide its queues. At most
`max_in_flight` requests are open at a time; those that are due beyond it are dropped, and counted as such.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from cluster.bench.arrivals import Arrival
from cluster.bench.summary import CANCELLED, DROPPED, OK, Exchange
from tidemill import Chunk, Summary, TidemillError


class Streams(Protocol):
    """What is used of tidemill.AsyncClient."""

    def stream(
        self, prompt: Sequence[int], *, slo: str, timeout: float, max_tokens: int, ignore_eos: bool
    ) -> AsyncIterator[Chunk]: ...


class Driver:
    """One rate's load. `exchanges` grows as requests end; whoever shows progress reads it meanwhile."""

    def __init__(
        self, client: Streams, vocabulary: int, rate: float, *, max_in_flight: int, timeout_s: float, seed: int
    ) -> None:
        self._client = client
        self._vocabulary = vocabulary
        self._rate = rate
        self._max_in_flight = max_in_flight
        self._timeout_s = timeout_s
        self._seed = seed
        self._tasks: set[asyncio.Task[None]] = set()
        self.exchanges: list[Exchange] = []

    @property
    def in_flight(self) -> int:
        return len(self._tasks)

    async def run(self, arrivals: Sequence[Arrival]) -> None:
        """Until every request has ended. If it is cancelled so are the requests; they are in `exchanges` then too."""
        clock = asyncio.get_running_loop()
        started = clock.time()
        try:
            for number, arrival in enumerate(arrivals):
                due = started + arrival.at_s
                await asyncio.sleep(max(due - clock.time(), 0.0))
                if self.in_flight >= self._max_in_flight:
                    self.exchanges.append(Exchange(number, self._rate, arrival, DROPPED))
                else:
                    task = asyncio.create_task(self._send(number, arrival, due))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
            await asyncio.gather(*self._tasks)
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _send(self, number: int, arrival: Arrival, due: float) -> None:
        clock = asyncio.get_running_loop()
        sent, first = clock.time(), None
        result, tokens = CANCELLED, 0
        summary: Summary | None = None
        try:
            chunks = self._client.stream(
                self._prompt(number, arrival.prompt_tokens),
                slo=arrival.slo_class,
                timeout=self._timeout_s,
                max_tokens=arrival.output_tokens,
                ignore_eos=True,
            )
            async for chunk in chunks:
                first = first or clock.time()
                tokens += len(chunk.tokens)
                summary = chunk.summary or summary
            result = OK
        except TidemillError as error:
            result = error.kind
        finally:
            ended = clock.time()
            spent_s = None if first is None else ended - first
            self.exchanges.append(
                Exchange(
                    number=number,
                    rate=self._rate,
                    arrival=arrival,
                    result=result,
                    sent_late_s=sent - due,
                    ttft_s=None if first is None else first - due,
                    tpot_s=None if spent_s is None else spent_s / (tokens - 1) if tokens > 1 else 0.0,
                    total_s=ended - due,
                    output_tokens=tokens,
                    accepted_per_verify=summary.speculation.accepted_per_verify if summary else 0.0,
                    retries=summary.route.retries if summary else 0,
                    prefill_worker=summary.route.prefill_worker if summary else "",
                    draft_worker=summary.route.draft_worker if summary else "",
                    verify_worker=summary.route.verify_worker if summary else "",
                )
            )

    def _prompt(self, number: int, length: int) -> list[int]:
        """Random tokens: no two prompts share a prefix worth caching."""
        return random.Random(f"{self._seed}/{number}").choices(range(self._vocabulary), k=length)
