"""Traces at an OpenTelemetry collector: what it is told, and that a missing one does no harm."""

import asyncio
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from tests.support.local import local_cluster, settings_for
from tidemill import AsyncClient
from tidemill.core.settings import Settings, TracesSettings


class Collector(TraceServiceServicer):
    def __init__(self) -> None:
        self.spans: list[Any] = []

    async def Export(self, request: Any, context: Any) -> ExportTraceServiceResponse:
        for resource in request.resource_spans:
            self.spans += [span for scope in resource.scope_spans for span in scope.spans]
        return ExportTraceServiceResponse()


def with_endpoint(endpoint: str) -> Settings:
    return settings_for().model_copy(update={"traces": TracesSettings(endpoint=endpoint)})


async def test_a_request_and_its_stages_arrive() -> None:
    collector, server = Collector(), grpc.aio.server()
    add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with local_cluster(with_endpoint(f"127.0.0.1:{port}")) as cluster:
            async with AsyncClient(cluster.address) as client:
                summary = (await client.generate("def fib(n):" * 20, max_tokens=8)).summary
        # The router has stopped: what waited was sent.
        root, *stages = collector.spans
        told = {each.key: each.value for each in root.attributes}
        assert told["tidemill.request_id"].string_value == summary.request_id
        assert told["gen_ai.usage.output_tokens"].int_value == 8
        assert root.status.code == Status.STATUS_CODE_OK
        assert [each.name for each in stages] == ["queue", "reserve", "prefill", "first token", "decode"]
        assert {each.parent_span_id for each in stages} == {root.span_id}
        assert {each.trace_id for each in stages} == {root.trace_id}
        assert len({each.span_id for each in (root, *stages)}) == 6
        assert stages[0].start_time_unix_nano == root.start_time_unix_nano
        assert stages[-1].end_time_unix_nano <= root.end_time_unix_nano + 1000
    finally:
        await server.stop(0)


async def test_requests_are_served_without_the_collector() -> None:
    async with local_cluster(with_endpoint("127.0.0.1:1")) as cluster, AsyncClient(cluster.address) as client:
        answers = await asyncio.gather(*(client.generate("import os", max_tokens=4) for _ in range(8)))
        assert all(answer.summary.output_tokens == 4 for answer in answers)
