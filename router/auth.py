"""Who may call: TLS for the channel, a bearer token for the caller."""

import hmac
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc

from tidemill.core.settings import RouterSettings, SettingsError
from tidemill.errors import KIND_METADATA_KEY, Unauthenticated

OPEN_SERVICES = ("/grpc.health.v1.Health/",)


def read_secret(path: Path) -> str:
    """A token from its file. Raises SettingsError."""
    try:
        token = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise SettingsError(f"{path}: the token file cannot be read: {error.strerror}") from error
    if not token:
        raise SettingsError(f"{path}: the token file is empty")
    return token


def server_credentials(settings: RouterSettings) -> grpc.ServerCredentials | None:
    """None without TLS. Raises SettingsError."""
    if settings.tls is None:
        return None
    try:
        pair = (settings.tls.key.read_bytes(), settings.tls.certificate.read_bytes())
        ca = settings.tls.client_ca.read_bytes() if settings.tls.client_ca else None
        # gRPC would only say that it cannot listen.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(settings.tls.certificate, settings.tls.key)
    except ssl.SSLError as error:
        raise SettingsError(
            f"{settings.tls.certificate} and {settings.tls.key}: not a PEM certificate and its key: {error.reason}"
        ) from error
    except OSError as error:
        raise SettingsError(f"{error.filename}: cannot be read: {error.strerror}") from error
    return grpc.ssl_server_credentials([pair], ca, require_client_auth=ca is not None)


class BearerToken(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Turns away calls without `authorization: Bearer <token>`; health checks are open."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method.startswith(OPEN_SERVICES):
            return handler
        metadata = dict(handler_call_details.invocation_metadata)
        if hmac.compare_digest(str(metadata.get("authorization", "")).encode(), self._expected):
            return handler
        return _refusal(handler)


async def _refuse(context: Any) -> None:
    await context.abort(
        grpc.StatusCode.UNAUTHENTICATED,
        "missing or wrong bearer token; send metadata `authorization: Bearer <token>`",
        ((KIND_METADATA_KEY, Unauthenticated.kind),),
    )


def _refusal(handler: Any) -> Any:
    """A handler of the same kind that refuses."""

    async def unary(request: Any, context: Any) -> None:
        await _refuse(context)

    async def stream(request: Any, context: Any) -> Any:
        await _refuse(context)
        yield

    make = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[handler.request_streaming, handler.response_streaming]
    behaviour = stream if handler.response_streaming else unary
    return make(behaviour, handler.request_deserializer, handler.response_serializer)
