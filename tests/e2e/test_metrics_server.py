"""Where Prometheus asks: its connection is kept, strangers wait for nobody, and the end is an end."""

import datetime
import http.client
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.certificates import Authority
from tidemill.core.channels import NodeChannels
from tidemill.core.exposition import CONNECTIONS, MetricsServer

HOUR = datetime.timedelta(hours=1)


@pytest.fixture
def server() -> Iterator[MetricsServer]:
    made = MetricsServer(lambda: "depth 1.0\n", "127.0.0.1")
    yield made
    made.stop()


def get(connection: http.client.HTTPConnection, path: str = "/metrics") -> tuple[int, bytes]:
    connection.request("GET", path)
    answer = connection.getresponse()
    return answer.status, answer.read()


def test_one_connection_serves_many_scrapes(server: MetricsServer) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
    assert get(connection) == (200, b"depth 1.0\n")
    kept = connection.sock
    assert [get(connection)[0] for _ in range(3)] == [200] * 3
    assert connection.sock is kept
    assert get(connection, "/elsewhere")[0] == 404


def test_what_is_not_http_ends_nothing(server: MetricsServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as stranger:
        stranger.sendall(b"\x16\x03\x01 nonsense\r\n\r\n")
        assert b"400" in stranger.recv(4096)
    assert get(http.client.HTTPConnection("127.0.0.1", server.port, timeout=5))[0] == 200


def test_connections_are_bounded_and_come_back(server: MetricsServer) -> None:
    where = ("127.0.0.1", server.port)
    open_ones = [http.client.HTTPConnection(*where, timeout=5) for _ in range(CONNECTIONS)]
    assert {get(each)[0] for each in open_ones} == {200}
    with pytest.raises((http.client.RemoteDisconnected, ConnectionError)):
        get(http.client.HTTPConnection(*where, timeout=5))
    for each in open_ones:
        each.close()
    for _ in range(100):
        try:
            assert get(http.client.HTTPConnection(*where, timeout=5))[0] == 200
        except (http.client.RemoteDisconnected, ConnectionError):
            continue
        return
    pytest.fail("nobody is served any more")


def test_a_port_in_use_is_said() -> None:
    first = MetricsServer(str, "127.0.0.1")
    with pytest.raises(OSError, match="in use"):
        MetricsServer(str, "127.0.0.1", first.port)
    first.stop()


def test_stopping_hangs_up_and_frees_the_port() -> None:
    server = MetricsServer(str, "127.0.0.1")
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
    assert get(connection) == (200, b"")
    server.stop()
    assert connection.sock.recv(1) == b""
    again = MetricsServer(str, "127.0.0.1", server.port)
    again.stop()


def test_only_a_nodes_certificate_opens_it_and_a_silent_stranger_blocks_nobody(tmp_path: Path) -> None:
    authority = Authority.in_folder(tmp_path / "ours")
    ours = authority.node()
    server = MetricsServer(lambda: "depth 1.0\n", "127.0.0.1", context=NodeChannels(ours).metrics_context)

    def scrape(certificate: Path | None, key: Path | None) -> tuple[int, bytes]:
        context = ssl.create_default_context(cafile=str(authority.ca))
        context.check_hostname = False
        if certificate is not None:
            context.load_cert_chain(certificate, key)
        return get(http.client.HTTPSConnection("127.0.0.1", server.port, context=context, timeout=5))

    try:
        with socket.create_connection(("127.0.0.1", server.port)):
            assert scrape(ours.certificate, ours.key) == (200, b"depth 1.0\n")
        old = authority.node("old", valid_for=-HOUR)
        for certificate, key in ((None, None), (old.certificate, old.key)):
            with pytest.raises((ssl.SSLError, ConnectionError, http.client.RemoteDisconnected)):
                scrape(certificate, key)
        with pytest.raises((http.client.HTTPException, ConnectionError)):
            get(http.client.HTTPConnection("127.0.0.1", server.port, timeout=5))
    finally:
        server.stop()
