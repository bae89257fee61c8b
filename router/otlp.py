"""Traces of requests that ended, to an OpenTelemetry collector (OTLP over gRPC), in batches and never in the way."""

import asyncio
import contextlib
import hashlib
import logging
from collections import deque
from collections.abc import Sequence

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import TraceServiceStub
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, InstrumentationScope, KeyValue
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Span, Status

from tidemill.core.settings import TracesSettings
from tidemill.core.trace import Trace
from tidemill.types import FinishReason

log = logging.getLogger(__name__)

PERIOD_S, TIMEOUT_S = 1.0, 5.0
MOST_WAITING, BATCH = 4096, 256  # traces
FINISHED = frozenset(map(str, FinishReason))
Value = str | int | float


def spans_of(trace: Trace) -> list[Span]:
    """One span for the request, and under it one for each stage. Ids follow from the request's id and its end."""
    trace_id = hashlib.blake2b(f"{trace.request_id} {trace.at}".encode(), digest_size=16).digest()
    begun_s = trace.at - trace.timing.total_s
    failed = trace.outcome not in FINISHED
    root = Span(
        trace_id=trace_id,
        span_id=trace_id[:8],
        name="request",
        kind=Span.SPAN_KIND_SERVER,
        start_time_unix_nano=_nanoseconds(begun_s),
        end_time_unix_nano=_nanoseconds(trace.at),
        attributes=_attributes(
            {
                "tidemill.request_id": trace.request_id,
                "tidemill.outcome": trace.outcome,
                "tidemill.slo_class": trace.slo_class,
                "tidemill.split": trace.split_reason,
                "tidemill.failures": trace.failures,
                "tidemill.ttft_s": trace.timing.ttft_s,
                "tidemill.tpot_s": trace.timing.tpot_s,
                "tidemill.drafted": trace.drafted,
                "tidemill.accepted": trace.accepted,
                "gen_ai.usage.input_tokens": trace.prompt_tokens,
                "gen_ai.usage.output_tokens": trace.output_tokens,
            }
        ),
        status=Status(code=Status.STATUS_CODE_ERROR if failed else Status.STATUS_CODE_OK),
    )
    stages = [
        Span(
            trace_id=trace_id,
            span_id=hashlib.blake2b(trace_id + index.to_bytes(4, "big"), digest_size=8).digest(),
            parent_span_id=root.span_id,
            name=each.stage,
            kind=Span.SPAN_KIND_INTERNAL,
            start_time_unix_nano=_nanoseconds(begun_s + each.start_s),
            end_time_unix_nano=_nanoseconds(begun_s + each.end_s),
            attributes=_attributes({"tidemill.worker": each.worker, "tidemill.note": each.note}),
        )
        for index, each in enumerate(trace.spans)
    ]
    return [root, *stages]


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)


def _attributes(values: dict[str, Value]) -> list[KeyValue]:
    """Empty texts say nothing and are left out."""
    return [KeyValue(key=key, value=_value(value)) for key, value in values.items() if value != ""]


def _value(value: Value) -> AnyValue:
    if isinstance(value, str):
        return AnyValue(string_value=value)
    return AnyValue(int_value=value) if isinstance(value, int) else AnyValue(double_value=value)


class TraceExport:
    """Belongs to the router's event loop. What a collector does not take in time is dropped."""

    def __init__(self, settings: TracesSettings, cluster: str) -> None:
        """Raises OSError for an authority that cannot be read."""
        assert settings.endpoint is not None
        self._endpoint = settings.endpoint
        self._resource = Resource(attributes=_attributes({"service.name": "tidemill", "tidemill.cluster": cluster}))
        if settings.ca is None:
            self._channel = grpc.aio.insecure_channel(settings.endpoint)
        else:
            credentials = grpc.ssl_channel_credentials(settings.ca.read_bytes())
            self._channel = grpc.aio.secure_channel(settings.endpoint, credentials)
        self._stub = TraceServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._waiting: deque[Trace] = deque(maxlen=MOST_WAITING)  # the oldest go first
        self._reached = True
        self._task = asyncio.create_task(self._run(), name="traces")

    def add(self, trace: Trace) -> None:
        self._waiting.append(trace)

    async def stop(self) -> None:
        """What waits is sent, if the collector takes it at once."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        if self._waiting and self._reached:
            await self._send()
        await self._channel.close(None)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(PERIOD_S)
            while self._waiting:
                await self._send()

    async def _send(self) -> None:
        batch = [self._waiting.popleft() for _ in range(min(BATCH, len(self._waiting)))]
        try:
            await self._stub.Export(self._request(batch), timeout=TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            if self._reached:  # said once, not for each batch
                log.warning("the collector at %s takes no traces: %s", self._endpoint, error.details())
            self._reached = False
        else:
            self._reached = True

    def _request(self, batch: Sequence[Trace]) -> ExportTraceServiceRequest:
        spans = [span for trace in batch for span in spans_of(trace)]
        scope = ScopeSpans(scope=InstrumentationScope(name="tidemill.router"), spans=spans)
        return ExportTraceServiceRequest(resource_spans=[ResourceSpans(resource=self._resource, scope_spans=[scope])])
