"""The gRPC surface: transport only. What a request goes through is in route.py."""

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import start_http_server

from router import wire
from router.auth import BearerToken, read_secret, server_credentials
from router.gate import Gate
from router.journey import Journey
from router.policy.admission import AdmissionLimits
from router.pools_view import PoolsView
from router.route import Router
from router.served_model import ServedModel
from router.wellformed import WellFormed
from tidemill.core import metrics
from tidemill.core.clock import Clock, SystemClock
from tidemill.core.lifecycle import RequestState
from tidemill.core.metrics import ROUTER_SERIES, Metrics
from tidemill.core.model import Member, Request, Role
from tidemill.core.settings import Settings
from tidemill.errors import (
    KIND_METADATA_KEY,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    TidemillError,
    status_of,
)
from tidemill.proto import inference_pb2 as pb
from tidemill.proto.inference_pb2_grpc import InferenceServicer, add_InferenceServicer_to_server

log = logging.getLogger(__name__)

SERVICE = "tidemill.v1.Inference"
HEALTH_PERIOD_S = 0.25


class RouterServer:
    """Made by cluster/pools.py inside a Ray actor, or by a test in its own process. Runs on one event loop."""

    def __init__(self, settings: Settings, clock: Clock | None = None) -> None:
        """Raises SettingsError or TokenizerError for settings that cannot be served."""
        self._settings = settings
        self._clock = clock or SystemClock()
        self.metrics = Metrics(ROUTER_SERIES)
        self._model = ServedModel(settings.target, settings.engine.kv_blocks * settings.engine.block_size)
        self._pools = PoolsView(self._clock)
        limits = AdmissionLimits(settings.router.max_active, settings.router.max_queued)
        self._gate = Gate(limits, self.metrics)
        router = Router(settings, self._pools, self._gate, self.metrics, self._clock, random.Random())
        self._servicer = _Servicer(settings, self._model, router, self.metrics, self._clock)
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._tasks: list[asyncio.Task[None]] = []
        self.address = ""

    async def start(self) -> str:
        """Listen; returns host:port. Raises OSError if the port is taken."""
        settings = self._settings.router
        limit = settings.max_message_bytes
        token = settings.token_file and read_secret(settings.token_file)
        self._server = grpc.aio.server(
            interceptors=[*([BearerToken(token)] if token else []), WellFormed()],
            options=[
                ("grpc.max_receive_message_length", limit),
                ("grpc.max_send_message_length", limit),
                ("grpc.so_reuseport", 0),
            ],
        )
        add_InferenceServicer_to_server(self._servicer, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        port = self._bind(server_credentials(settings))
        self._metrics_server, _ = start_http_server(
            self._settings.metrics.router_port, self._settings.metrics.host, self.metrics.registry
        )
        await self._server.start()
        self._tasks.append(asyncio.create_task(self._watch_health()))
        self.address = f"{settings.host}:{port}"
        log.info("router listens at %s", self.address)
        return self.address

    def _bind(self, credentials: grpc.ServerCredentials | None) -> int:
        where = f"{self._settings.router.host}:{self._settings.router.port}"
        try:
            if credentials is None:
                return int(self._server.add_insecure_port(where))
            return int(self._server.add_secure_port(where, credentials))
        except RuntimeError as error:
            raise OSError(f"cannot listen on {where}: is the port in use? set router.port to another, or 0") from error

    async def stop(self, grace_s: float = 1.0) -> None:
        """Refuse new requests, give running ones `grace_s`, close every stream."""
        for task in self._tasks:
            task.cancel()
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)
        await self._pools.close()
        self._metrics_server.shutdown()
        self._metrics_server.server_close()

    async def set_members(self, members: Sequence[Member]) -> None:
        """The workers there are now; called when one comes, goes or restarts."""
        await self._pools.set_members(members)

    async def _watch_health(self) -> None:
        """Serving means: a request could be placed now."""
        while True:
            ready = self._pools.has(Role.VERIFY)
            status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
            for service in ("", SERVICE):
                await self._health.set(service, status)
            await asyncio.sleep(HEALTH_PERIOD_S)

    def describe(self) -> dict[str, object]:
        """For `tidemill status`."""
        return {
            "address": self.address,
            "metrics_address": f"{self._settings.metrics.host}:{self._metrics_server.server_port}",
            "model": self._model.card.name,
            "active": self._gate.active,
            "queued": self._gate.queued,
            "workers": self._pools.describe(),
        }


class _Servicer(InferenceServicer):
    """Each method: check what came, serve it, answer; errors are mapped in one place."""

    def __init__(self, settings: Settings, model: ServedModel, router: Router, counters: Metrics, clock: Clock) -> None:
        self._settings = settings
        self._model = model
        self._router = router
        self._metrics = counters
        self._clock = clock
        self._active: set[str] = set()

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:
        return await self._unary(lambda: self._from_generate(request), context)

    async def GenerateStream(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateChunk]:
        async with aclosing(self._stream(lambda: self._from_generate(request), context)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def Chat(self, request: pb.ChatRequest, context: Any) -> pb.GenerateResponse:
        return await self._unary(lambda: self._from_chat(request), context)

    async def ChatStream(self, request: pb.ChatRequest, context: Any) -> AsyncIterator[pb.GenerateChunk]:
        async with aclosing(self._stream(lambda: self._from_chat(request), context)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        try:
            wire.check_model(request.model, self._model.card)
        except TidemillError as error:
            await self._abort(context, error)
        return pb.TokenizeResponse(tokens=self._model.encode(request.text))

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(models=[wire.card_to_pb(self._model.card)])

    def _from_generate(self, message: pb.GenerateRequest) -> Request:
        wire.check_model(message.model, self._model.card)
        prompt = self._model.encode(message.text) if message.text else list(message.tokens.ids)
        return self._request(message, prompt)

    def _from_chat(self, message: pb.ChatRequest) -> Request:
        wire.check_model(message.model, self._model.card)
        return self._request(message, self._model.encode_chat(wire.messages_from_pb(message.messages)))

    def _request(self, message: pb.GenerateRequest | pb.ChatRequest, prompt: list[int]) -> Request:
        card = self._model.card
        wire.check_prompt(prompt, card)
        sampling = wire.sampling_from_pb(message.sampling, card)
        request = wire.new_request(message.request_id, prompt, sampling, message.slo_class, self._settings.slo)
        if request.id in self._active:
            raise InvalidRequest(f"a request with id {request.id!r} is being served; ids must be unique")
        return request

    async def _unary(self, parse: Any, context: Any) -> pb.GenerateResponse:
        answer = pb.GenerateResponse()
        texts = []
        async for chunk in self._stream(parse, context):
            texts.append(chunk.text)
            answer.tokens.extend(chunk.tokens)
            answer.logprobs.extend(chunk.logprobs)
            if chunk.HasField("summary"):
                answer.summary.CopyFrom(chunk.summary)
        answer.text = "".join(texts)
        return answer

    async def _stream(self, parse: Any, context: Any) -> AsyncGenerator[pb.GenerateChunk, None]:
        """Chunks of a request. Errors leave as gRPC status; a cancelled call leaves as CancelledError."""
        outcome, journey = "internal", None
        try:
            journey = self._journey(parse(), context)
            self._active.add(journey.request.id)
            async with aclosing(self._chunks(journey)) as chunks:
                async for chunk in chunks:
                    yield chunk
            outcome = str(journey.finish)
        except (asyncio.CancelledError, GeneratorExit):
            outcome = "cancelled"
            raise
        except TidemillError as error:
            outcome = error.kind
            await self._abort(context, error)
        except Exception as error:
            log.exception("a request failed")
            await self._abort(context, InternalError(f"{type(error).__name__}: {error}; see the router's log"))
        finally:
            self._metrics.add(metrics.REQUESTS, outcome=outcome)
            if journey is not None:
                self._active.discard(journey.request.id)
                self._count(journey)

    def _journey(self, request: Request, context: Any) -> Journey:
        """Raises DeadlineExceeded if it is over already."""
        now = self._clock.monotonic()
        left = context.time_remaining()
        if left is not None and left <= 0:
            raise DeadlineExceeded("the deadline had passed when the request arrived")
        default = self._settings.router.default_deadline_s
        return Journey(request, now, now + (default if left is None else min(left, default)))

    async def _chunks(self, journey: Journey) -> AsyncGenerator[pb.GenerateChunk, None]:
        text = self._model.text_stream(journey.request.sampling.stop)
        steps = self._router.serve(journey)
        try:
            async for some in steps:
                piece = "".join([text.push(step.tokens) for step in some])
                if journey.finish is not None:
                    piece += text.finish()
                chunk = wire.chunk_to_pb(piece, some)
                if journey.finish is not None:
                    summary = journey.summary(self._model.card.name, self._clock.monotonic())
                    chunk.summary.CopyFrom(wire.summary_to_pb(summary))
                yield chunk
        finally:
            started = time.perf_counter()
            await steps.aclose()
            if journey.finish is None:
                self._metrics.observe(metrics.CANCEL_TO_RELEASE, time.perf_counter() - started)

    def _count(self, journey: Journey) -> None:
        if journey.finish is None:
            if not journey.lifecycle.ended:
                journey.lifecycle.move(RequestState.FAILED)
            return
        slo_class, timing = journey.request.slo_class, journey.timing
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

    async def _abort(self, context: Any, error: TidemillError) -> None:
        await context.abort(getattr(grpc.StatusCode, status_of(error)), str(error), ((KIND_METADATA_KEY, error.kind),))
