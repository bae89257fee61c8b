"""The public service's methods: check what came, serve it, answer. Errors become gRPC status in one place."""

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from functools import partial
from typing import Any, NoReturn, TypeVar

import grpc

from router import wire
from router.journey import Journey
from router.route import Router
from router.served_model import ServedModel
from router.slo import Verdict, verdict
from router.telemetry import Telemetry
from router.traces import Traces
from tidemill.core import metrics
from tidemill.core.clock import Clock
from tidemill.core.lifecycle import RequestState
from tidemill.core.messages import Tokens
from tidemill.core.metrics import Metrics
from tidemill.core.model import Request
from tidemill.core.promises import unsupported
from tidemill.core.settings import Settings
from tidemill.core.text import TextStream
from tidemill.errors import (
    KIND_METADATA_KEY,
    Cancelled,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    TidemillError,
    status_of,
)
from tidemill.proto import inference_pb2 as pb
from tidemill.proto.inference_pb2_grpc import InferenceServicer

log = logging.getLogger(__name__)

LONG_TEXT = 16_384  # characters; tokenizing more than that would hold up everyone's tokens for several milliseconds
CLIENT_AHEAD_S = 0.1  # a client's timer started when it sent the request: it may end the call before ours rings

Read = Callable[[], Awaitable[Request]]
Emit = Callable[[pb.GenerateChunk], Awaitable[None]]
Text = TypeVar("Text")


class Servicer(InferenceServicer):
    """Streamed answers are written to the call, not yielded: a cancellation then finds the handler wherever it waits,
    in a write to a client that does not read too.
    """

    def __init__(
        self,
        settings: Settings,
        model: ServedModel,
        router: Router,
        telemetry: Telemetry,
        traces: Traces,
        counters: Metrics,
        clock: Clock,
    ) -> None:
        self._settings = settings
        self._model = model
        self._router = router
        self._telemetry = telemetry
        self._traces = traces
        self._metrics = counters
        self._clock = clock
        self._tag = f"{secrets.token_hex(3)}-"
        self._active: set[str] = set()  # ids clients gave, or were given

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:
        return await self._whole(partial(self._from_generate, request), context)

    async def GenerateStream(self, request: pb.GenerateRequest, context: Any) -> None:  # type: ignore[override]
        await self._serve(partial(self._from_generate, request), context, context.write)

    async def Chat(self, request: pb.ChatRequest, context: Any) -> pb.GenerateResponse:
        return await self._whole(partial(self._from_chat, request), context)

    async def ChatStream(self, request: pb.ChatRequest, context: Any) -> None:  # type: ignore[override]
        await self._serve(partial(self._from_chat, request), context, context.write)

    async def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        try:
            wire.check_model(request.model, self._model.card)
        except TidemillError as error:
            await abort(context, error)
        return pb.TokenizeResponse(tokens=await _encode(self._model.encode, request.text, len(request.text)))

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(models=[wire.card_to_pb(self._model.card)])

    # --- what was asked for -------------------------------------------------------------------------------------

    async def _from_generate(self, message: pb.GenerateRequest) -> Request:
        wire.check_model(message.model, self._model.card)
        if message.text:
            return self._request(message, await _encode(self._model.encode, message.text, len(message.text)))
        return self._request(message, list(message.tokens.ids))

    async def _from_chat(self, message: pb.ChatRequest) -> Request:
        wire.check_model(message.model, self._model.card)
        messages = wire.messages_from_pb(message.messages)
        size = sum(len(each.content) for each in messages)
        return self._request(message, await _encode(self._model.encode_chat, messages, size))

    def _request(self, message: pb.GenerateRequest | pb.ChatRequest, prompt: list[int]) -> Request:
        card = self._model.card
        wire.check_prompt(prompt, card)
        wire.check_tokens(message.received, card)
        sampling = wire.sampling_from_pb(message.sampling, card, len(prompt))
        engine, drafts = self._settings.engine.kind, self._settings.speculation.enabled
        if (fault := unsupported(engine, sampling, drafts=drafts)) is not None:
            raise InvalidRequest(fault)
        return wire.new_request(message, prompt, sampling, self._settings.slo)

    # --- answers ------------------------------------------------------------------------------------------------

    async def _whole(self, read: Read, context: Any) -> pb.GenerateResponse:
        chunks: list[pb.GenerateChunk] = []

        async def keep(chunk: pb.GenerateChunk) -> None:
            chunks.append(chunk)

        await self._serve(read, context, keep)
        return wire.response_to_pb(chunks)

    async def _serve(self, read: Read, context: Any, emit: Emit) -> None:
        """One request to its end. Errors leave as gRPC status; a call that gRPC cancels leaves as CancelledError."""
        try:
            await self._serve_and_count(read, context, emit)
        except TidemillError as error:
            await abort(context, error)
        except Exception as error:
            log.exception("a request failed")
            await abort(context, InternalError(f"{type(error).__name__}: {error}; see the router's log"))

    async def _serve_and_count(self, read: Read, context: Any, emit: Emit) -> None:
        """Nothing is left of the request before its client hears of an error, and may send it again."""
        outcome, journey = InternalError.kind, None
        try:
            journey = await self._begin(read, context)
            await self._answer(journey, emit)
            outcome = str(journey.finish)
        except asyncio.CancelledError:
            left_s = context.time_remaining()
            outcome = Cancelled.kind if left_s is None or left_s > CLIENT_AHEAD_S else DeadlineExceeded.kind
            raise
        except TidemillError as error:
            outcome = error.kind
            raise
        finally:
            self._metrics.add(metrics.REQUESTS, outcome=outcome)
            if journey is not None:
                self._active.discard(journey.request.id)
                now = self._clock.monotonic()
                self._telemetry.ended(journey, now, failed=outcome != Cancelled.kind)
                self._traces.ended(journey, outcome, now, time.time())
                self._count(journey, outcome)

    async def _begin(self, read: Read, context: Any) -> Journey:
        """The id is taken from here on. Raises DeadlineExceeded if time is over already, InvalidRequest."""
        arrived_at = self._clock.monotonic()
        left_s = context.time_remaining()
        if left_s is not None and left_s <= 0:
            raise DeadlineExceeded("the deadline had passed when the request arrived")
        request = await read()
        if request.id in self._active:
            raise InvalidRequest(f"a request with id {request.id!r} is being served; ids must be unique")
        self._active.add(request.id)
        deadline = arrived_at + (self._settings.router.default_deadline_s if left_s is None else left_s)
        journey = Journey(request, arrived_at, deadline, self._tag)
        self._telemetry.arrived(journey, arrived_at)
        return journey

    async def _answer(self, journey: Journey, emit: Emit) -> None:
        """Raises DeadlineExceeded wherever the request is when its time is over: in a queue, a stage or a write."""
        text = self._model.text_stream(journey.request.sampling.stop)
        text.push(journey.request.output)  # came with the tokens that another router sent
        if text.stopped:
            raise InvalidRequest("received holds a stop string: the answer is complete")
        try:
            async with (
                asyncio.timeout(journey.deadline - self._clock.monotonic()),
                aclosing(self._router.serve(journey)) as steps,
            ):
                async for some in steps:
                    await emit(self._chunk(journey, text, some))
        except TimeoutError:
            raise DeadlineExceeded(
                f"the deadline passed after {len(journey.sent)} tokens, in state {journey.lifecycle.state}"
            ) from None

    def _chunk(self, journey: Journey, text: TextStream, steps: list[Tokens]) -> pb.GenerateChunk:
        piece = text.push(steps[0].tokens) if len(steps) == 1 else "".join([text.push(step.tokens) for step in steps])
        if journey.finish is None:
            return wire.chunk_to_pb(piece, steps)
        chunk = wire.chunk_to_pb(piece + text.finish(), steps)
        summary = journey.summary(self._model.card.name, self._settings.engine.kind, self._clock.monotonic())
        chunk.summary.CopyFrom(wire.summary_to_pb(summary))
        return chunk

    def _count(self, journey: Journey, outcome: str) -> None:
        slo_class, timing = journey.request.slo.name, journey.timing
        kept = verdict(journey, outcome)
        for each in Verdict:  # all of them, so that none is missing from a ratio
            self._metrics.add(metrics.SLO_REQUESTS, each is kept, slo_class=slo_class, verdict=each)
        self._metrics.add(metrics.OUTPUT_TOKENS, len(journey.sent), slo_class=slo_class)
        self._metrics.add(metrics.GOODPUT_TOKENS, len(journey.sent) * (kept is Verdict.MET), slo_class=slo_class)
        self._metrics.add(metrics.REQUEST_VERIFIES, journey.verify_steps, slo_class=slo_class)
        self._metrics.add(metrics.REQUEST_ACCEPTED, journey.accepted, slo_class=slo_class)
        if journey.finish is None:
            if not journey.lifecycle.ended:
                journey.lifecycle.move(RequestState.FAILED)
            return
        for series, seconds in (
            (metrics.TTFT, timing.ttft_s),
            (metrics.TTFT_QUEUE, timing.queue_s),
            (metrics.TTFT_PREFILL, timing.prefill_s),
            (metrics.TTFT_TRANSFER, timing.transfer_s),
            (metrics.TTFT_FIRST_DECODE, timing.first_decode_s),
        ):
            self._metrics.observe(series, seconds, slo_class=slo_class)
        if len(journey.sent) > 1:
            self._metrics.observe(metrics.TPOT, journey.tpot_s, slo_class=slo_class)


async def abort(context: Any, error: TidemillError) -> NoReturn:
    """End the call with an error's status; its kind goes along, because one status stands for several."""
    await context.abort(getattr(grpc.StatusCode, status_of(error)), str(error), ((KIND_METADATA_KEY, error.kind),))
    raise AssertionError("abort raises")


async def _encode(encode: Callable[[Text], list[int]], text: Text, size: int) -> list[int]:
    """Long texts in a thread: the tokenizer lets others run meanwhile."""
    return await asyncio.to_thread(encode, text) if size > LONG_TEXT else encode(text)
