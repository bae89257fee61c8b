"""Metrics as Prometheus reads them: the lines of a sample, and the server that hands a process's lines out.

Scrapes come every few seconds to every process of the cluster, so they have to be cheap: what of a line never changes
is made once, and a scraper keeps its connection, with no thread and no TLS hand-shake for each time it asks.
"""

import logging
import socket
import socketserver
import ssl
import threading
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler
from typing import Any

from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.utils import floatToGoString

log = logging.getLogger(__name__)

HEAD = "HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\nContent-Length: {length}\r\n\r\n"
CONNECTIONS = 32  # scrapers at a time; who comes beyond that is not answered
IDLE_S = 90.0  # a connection that is silent for so long is closed, one that never shows a certificate too
Lines = Callable[[], str]  # one labelled child's samples as they are now


def heading(name: str, kind: str, help: str) -> str:
    return f"# HELP {name} {_escaped(help)}\n# TYPE {name} {kind}\n"


def lines_of(name: str, labels: Iterable[tuple[str, str]], child: Counter | Gauge | Histogram) -> Lines:
    """Reads the library's own values: its public way makes an object of every sample, and costs ten times as much."""
    pairs = [f'{label}="{_quoted(value)}"' for label, value in sorted(labels)]
    if not isinstance(child, Histogram):
        scalar, head = child._value, _head(name, pairs)
        return lambda: f"{head}{scalar.get()!r}\n"
    bounds = [f'le="{floatToGoString(bound)}"' for bound in child._upper_bounds]  # type: ignore[no-untyped-call]
    buckets = list(zip([_head(f"{name}_bucket", [*pairs, bound]) for bound in bounds], child._buckets, strict=True))
    count_head, sum_head, total = _head(f"{name}_count", pairs), _head(f"{name}_sum", pairs), child._sum

    def lines() -> str:
        made, count = [], 0.0
        for head, bucket in buckets:
            count += bucket.get()
            made.append(f"{head}{count!r}\n")
        return f"{''.join(made)}{count_head}{count!r}\n{sum_head}{total.get()!r}\n"

    return lines


def _head(name: str, pairs: list[str]) -> str:
    return f"{name}{{{','.join(pairs)}}} " if pairs else f"{name} "


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace("\n", r"\n")


def _quoted(text: str) -> str:
    return _escaped(text).replace('"', r"\"")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = IDLE_S
    server: "_Server"

    def do_GET(self) -> None:
        if self.path.partition("?")[0] not in ("/", "/metrics"):
            self.send_error(404, "only /metrics is here")
            return
        body = self.server.text().encode()
        self.wfile.write(HEAD.format(length=len(body)).encode() + body)  # one packet, where it fits in one

    def log_message(self, *_: object) -> None:
        """Nothing: a line a scrape would be all there is in the log."""


class _Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """A thread for each scraper, for as long as it stays connected."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, host: str, port: int, text: Callable[[], str], context: ssl.SSLContext | None) -> None:
        self.text = text
        self._context = context
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self.address_family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        super().__init__((host, port), _Handler)

    def get_request(self) -> tuple[socket.socket, Any]:
        """The hand-shake is left to the connection's own thread: nobody waits for a stranger who says nothing."""
        connection, where = super().get_request()
        if self._context is not None:
            connection = self._context.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return connection, where

    def verify_request(self, request: Any, client_address: Any) -> bool:
        with self._lock:
            room = len(self._open) < CONNECTIONS
            if room:
                self._open.add(request)
        return room

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A scraper that went, or that has no certificate of ours."""
        log.debug("a scraper at %s was not served", client_address, exc_info=True)

    def hang_up(self) -> None:
        with self._lock:
            left = list(self._open)
        for connection in left:
            super().shutdown_request(connection)


class MetricsServer:
    """Serves `text()` at /metrics from threads of its own until `stop`."""

    def __init__(
        self, text: Callable[[], str], host: str, port: int = 0, context: ssl.SSLContext | None = None
    ) -> None:
        """`context`: as `NodeChannels.metrics_context` says. Raises OSError if the port cannot be had."""
        self._server = _Server(host, port, text, context)
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Blocks for up to half a second, until the serving thread has noticed."""
        self._server.shutdown()
        self._server.server_close()
        self._server.hang_up()
        self._thread.join()
