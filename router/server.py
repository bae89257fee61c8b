"""The gRPC surface: transport only. What a request goes through is in route.py."""

import asyncio
import logging
import random
import time
from collections.abc import Sequence
from enum import StrEnum

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from router.auth import BearerToken, read_secret, server_credentials
from router.gate import Gate
from router.move import MoveOutcome
from router.moves import MoveReason
from router.otlp import TraceExport
from router.policy.admission import AdmissionLimits
from router.pools_view import PoolsView, attach_over
from router.route import Router
from router.served_model import ServedModel
from router.servicer import Servicer
from router.status_page import StatusPage, tls_context
from router.telemetry import Telemetry
from router.traces import Traces
from router.wellformed import WellFormed
from tidemill.core import metrics
from tidemill.core.channels import NodeChannels
from tidemill.core.clock import Clock, SystemClock
from tidemill.core.exposition import MetricsServer
from tidemill.core.metrics import ROUTER_SERIES, Metrics
from tidemill.core.model import Member, Role, WorkerId
from tidemill.core.picture import FrontDoor, Outlook, Picture
from tidemill.core.settings import Settings
from tidemill.core.telemetry import DecisionRecord, Decoding, RouterTelemetry
from tidemill.core.trace import Trace
from tidemill.proto.inference_pb2_grpc import add_InferenceServicer_to_server

log = logging.getLogger(__name__)

SERVICE = "tidemill.v1.Inference"
HEALTH_PERIOD_S = 0.25
PICTURE_PERIOD_S = 0.5


class RouterServer:
    """Made by cluster/pools.py inside a Ray actor, or by a test in its own process. Runs on one event loop."""

    def __init__(self, settings: Settings, clock: Clock | None = None) -> None:
        """Raises SettingsError or TokenizerError for settings that cannot be served."""
        self._settings = settings
        self._clock = clock or SystemClock()
        self.metrics = Metrics(ROUTER_SERIES)
        engine = settings.engine
        emulated = settings.emulated if engine.kind == "emulated" else None
        self._model = ServedModel(settings.target, engine.kv_blocks * engine.block_size, emulated)
        self._channels = NodeChannels(settings.network.tls)
        self._telemetry = Telemetry(settings.controller.windows_s, self._clock.monotonic())
        self._traces = Traces()
        self._pools = PoolsView(
            self._clock,
            attach_over(self._channels),
            self._telemetry,
            lambda seconds: self.metrics.observe(metrics.CANCEL_TO_RELEASE, seconds),
            stall_s=settings.deadlines.stall_s,
        )
        limits = AdmissionLimits(settings.router.max_active, settings.router.max_queued)
        self._gate = Gate(limits, self.metrics)
        self._router = Router(
            settings, self._pools, self._gate, self._telemetry, self.metrics, self._clock, random.Random()
        )
        self._servicer = Servicer(
            settings, self._model, self._router, self._telemetry, self._traces, self.metrics, self._clock
        )
        self._decisions: tuple[DecisionRecord, ...] = ()
        self._picture: Picture | None = None
        self._pictured_at = 0.0
        self._page: StatusPage | None = None
        self._export: TraceExport | None = None
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._tasks: list[asyncio.Task[None]] = []
        self._server: grpc.aio.Server | None = None
        self.address = ""
        self.metrics_address = ""
        self.page_address = ""  # URL

    async def start(self) -> str:
        """Listen; returns host:port. Raises OSError if a port is taken, SettingsError for a bad secret or key."""
        settings = self._settings.router
        limit = settings.max_message_bytes
        token = read_secret(settings.token_file) if settings.token_file else None
        server = grpc.aio.server(
            interceptors=[*([BearerToken(token)] if token else []), WellFormed()],
            options=[
                ("grpc.max_receive_message_length", limit),
                ("grpc.max_send_message_length", limit),
                ("grpc.so_reuseport", 0),
                # Clients ping to notice a router that is stopped: as often as they like.
                ("grpc.http2.min_recv_ping_interval_without_data_ms", 0),
                ("grpc.http2.max_ping_strikes", 0),
            ],
        )
        add_InferenceServicer_to_server(self._servicer, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        credentials = server_credentials(settings)
        self.metrics_address = self._serve_metrics()
        try:
            self._export_traces()
            await self._serve_page(token)
            self.address = self._bind(server, credentials)  # last: gRPC gives a port back when its server is destroyed
        except OSError:
            await self._stop_watching()
            raise
        await server.start()
        self._server = server
        self._tasks.append(asyncio.create_task(self._watch_health()))
        log.info("router listens at %s", self.address)
        return self.address

    def _bind(self, server: grpc.aio.Server, credentials: grpc.ServerCredentials | None) -> str:
        settings = self._settings.router
        where = _authority(settings.host, settings.port)
        try:
            port = server.add_secure_port(where, credentials) if credentials else server.add_insecure_port(where)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {where}: is the port in use? set router.port to another, or 0") from error
        return _authority(settings.host, port)

    def _serve_metrics(self) -> str:
        settings = self._settings.metrics
        try:
            self._metrics_server = MetricsServer(
                self.metrics.text, settings.host, settings.router_port, self._channels.metrics_context
            )
        except OSError as error:
            where = _authority(settings.host, settings.router_port)
            raise OSError(
                f"cannot serve metrics on {where}: {error.strerror}; set metrics.router_port to another, or 0"
            ) from error
        return _authority(settings.host, self._metrics_server.port)

    async def _serve_page(self, token: str | None) -> None:
        settings = self._settings.status_page
        if not settings.enabled:
            return
        page, context = StatusPage(self.picture, token), tls_context(self._settings.router)
        try:
            port = await page.start(settings.host, settings.port, context)
        except OSError as error:
            where = _authority(settings.host, settings.port)
            raise OSError(
                f"cannot serve the status page on {where}: {error.strerror}; set status_page.port to another, or 0"
            ) from error
        self._page = page
        self.page_address = f"{'https' if context else 'http'}://{_authority(settings.host, port)}/"

    def _export_traces(self) -> None:
        if self._settings.traces.endpoint:
            self._export = TraceExport(self._settings.traces, self._settings.name)
            self._traces.on_ended = self._export.add

    async def _stop_watching(self) -> None:
        if self._export is not None:
            await self._export.stop()
        if self._page is not None:
            await self._page.stop()
        await asyncio.to_thread(self._metrics_server.stop)

    async def stop(self, grace_s: float = 1.0) -> None:
        """Refuse new requests, give running ones `grace_s`, close every stream. Does nothing if it never started."""
        if self._server is None:
            return
        for task in self._tasks:
            task.cancel()
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)
        await self._router.close()
        await self._pools.close()
        await self._stop_watching()

    async def set_members(self, members: Sequence[Member]) -> None:
        """The workers there are now; called when one comes, goes or restarts."""
        await self._pools.set_members(members)

    def decoding(self) -> dict[str, WorkerId]:
        """The requests that could be moved now, and the verify workers they decode on."""
        return self._router.decoding()

    def held(self) -> list[Decoding]:
        """The same, with what each holds."""
        return self._router.held()

    async def move(self, request_id: str, to: WorkerId, reason: StrEnum = MoveReason.ASKED) -> MoveOutcome:
        """Have a request decode on another verify worker; returns when it does, or when that has come to nothing."""
        return await self._router.move(request_id, to, reason)

    async def _watch_health(self) -> None:
        """Serving means: a request could be placed now."""
        while True:
            ready = self._pools.has(Role.VERIFY)
            status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
            for service in ("", SERVICE):
                await self._health.set(service, status)
            await asyncio.sleep(HEALTH_PERIOD_S)

    def telemetry(self) -> RouterTelemetry:
        """For the controller."""
        return self._telemetry.snapshot(self._clock.monotonic())

    def set_decisions(self, decisions: Sequence[DecisionRecord]) -> None:
        """What the controller decided lately, the newest last, for people to look at."""
        self._decisions = tuple(decisions)

    def picture(self) -> Picture:
        """For the status page; made anew twice a second at most, however many look."""
        now = self._clock.monotonic()
        if self._picture is None or now - self._pictured_at >= PICTURE_PERIOD_S:
            self._picture, self._pictured_at = self.outlook().picture(time.time()), now
        return self._picture

    def outlook(self) -> Outlook:
        """What such a picture is made of, to be put together with what other routers see."""
        settings, now = self._settings, self._clock.monotonic()
        front = FrontDoor(
            settings.name,
            self.address,
            self._model.card.name,
            self._gate.active,
            self._gate.queued,
            settings.controller.rebalance,
        )
        return Outlook(front, self._telemetry.present(now), self._telemetry.history(now), self._decisions)

    def trace(self, request_id: str) -> Trace | None:
        """Of one of the requests that ended last."""
        return self._traces.find(request_id)

    def latest_traces(self) -> list[Trace]:
        """The newest first."""
        return self._traces.latest()

    def describe(self) -> dict[str, object]:
        """For `tidemill status`."""
        return {
            "address": self.address,
            "metrics_address": self.metrics_address,
            "page_address": self.page_address,
            "model": self._model.card.name,
            "active": self._gate.active,
            "queued": self._gate.queued,
            "workers": self._pools.describe(),
        }


def _authority(host: str, port: int) -> str:
    """host:port, with the brackets an IPv6 address needs."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
