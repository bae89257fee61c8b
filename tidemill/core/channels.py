"""The channels between router and workers: plain on loopback, mutual TLS between machines.

All nodes of a cluster share one certificate, made for `NODE_NAME`: addresses of nodes that come and go cannot be in it.
Whoever shows a certificate of the cluster's own authority is a node; nobody else gets through the handshake.
"""

import ssl
from dataclasses import dataclass
from typing import Any

import grpc

from tidemill.core.settings import NodeTlsSettings, SettingsError

NODE_NAME = "tidemill-node"  # a subject alternative name of the nodes' certificate
MAX_MESSAGE_BYTES = 64 * 1024 * 1024
OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # A peer that is stopped, or behind a cut cable, is given up after 15 s; what waits for it waits far less.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
)


@dataclass(frozen=True, slots=True)
class _Pem:
    certificate: bytes
    key: bytes
    authority: bytes


class NodeChannels:
    """Opens them on both sides. The files are read once."""

    def __init__(self, tls: NodeTlsSettings | None) -> None:
        """Without `tls` everything is plain. Raises SettingsError for files that cannot be used."""
        self._tls = tls
        self._pem = None if tls is None else _read(tls)

    def open(self, address: str) -> grpc.aio.Channel:
        if self._pem is None:
            return grpc.aio.insecure_channel(address, options=OPTIONS)
        return grpc.aio.secure_channel(address, self._client_credentials(self._pem), options=_named())

    def open_blocking(self, address: str) -> grpc.Channel:
        if self._pem is None:
            return grpc.insecure_channel(address, options=OPTIONS)
        return grpc.secure_channel(address, self._client_credentials(self._pem), options=_named())

    def listen(self, server: grpc.aio.Server, host: str) -> int:
        """Any free port of `host`. Raises OSError if there is none."""
        try:
            if self._pem is None:
                return server.add_insecure_port(f"{host}:0")
            pair = [(self._pem.key, self._pem.certificate)]
            credentials = grpc.ssl_server_credentials(pair, self._pem.authority, require_client_auth=True)
            return server.add_secure_port(f"{host}:0", credentials)
        except RuntimeError as error:
            raise OSError(f"no port to listen on at {host}: {error}") from error

    @property
    def metrics_context(self) -> ssl.SSLContext | None:
        """For `MetricsServer`: scrapers show a node's certificate too."""
        if self._tls is None:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self._tls.certificate, self._tls.key)
        context.load_verify_locations(self._tls.ca)
        context.verify_mode = ssl.CERT_REQUIRED
        return context

    @staticmethod
    def _client_credentials(pem: _Pem) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(pem.authority, pem.key, pem.certificate)


def _named() -> tuple[tuple[str, Any], ...]:
    return (*OPTIONS, ("grpc.ssl_target_name_override", NODE_NAME))


def _read(tls: NodeTlsSettings) -> _Pem:
    try:
        pem = _Pem(tls.certificate.read_bytes(), tls.key.read_bytes(), tls.ca.read_bytes())
        # gRPC would only say that it cannot listen.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tls.certificate, tls.key)
        context.load_verify_locations(tls.ca)
    except ssl.SSLError as error:
        raise SettingsError(f"network.tls: not a PEM certificate, its key and its authority: {error.reason}") from error
    except OSError as error:
        raise SettingsError(f"network.tls: {error.filename}: cannot be read: {error.strerror}") from error
    return pem
