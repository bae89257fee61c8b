"""Requests that are no protobuf of their type get INVALID_ARGUMENT instead of gRPC's UNKNOWN."""

import inspect
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from tidemill.errors import KIND_METADATA_KEY, InvalidRequest


class WellFormed(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Answers a request that cannot be parsed (invalid UTF-8 in a text, say) before the service sees it."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming:
            return handler

        def parse(data: bytes) -> Any:
            try:
                return handler.request_deserializer(data)
            except DecodeError as error:
                return error

        async def unary(request: Any, context: Any) -> Any:
            await _check(request, context)
            return await handler.unary_unary(request, context)

        async def stream(request: Any, context: Any) -> None:
            await _check(request, context)
            answer = handler.unary_stream(request, context)
            if inspect.isawaitable(answer):  # it writes to the call itself
                await answer
                return
            async for message in answer:
                await context.write(message)

        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(stream, parse, handler.response_serializer)
        return grpc.unary_unary_rpc_method_handler(unary, parse, handler.response_serializer)


async def _check(request: Any, context: Any) -> None:
    if isinstance(request, DecodeError):
        await context.abort(
            grpc.StatusCode.INVALID_ARGUMENT,
            f"the request cannot be read: {request}; texts must be valid UTF-8",
            ((KIND_METADATA_KEY, InvalidRequest.kind),),
        )
