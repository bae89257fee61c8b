"""Between machines: router and workers speak to those who show a node's certificate, and to nobody else."""

import asyncio
import datetime
import ssl
import urllib.error
import urllib.request
from pathlib import Path

import grpc
import pytest

from tests.support.certificates import Authority
from tests.support.local import local_cluster, settings_for
from tidemill import AsyncClient
from tidemill.core import control_pb2 as pb
from tidemill.core import wire
from tidemill.core.channels import NodeChannels
from tidemill.core.control_pb2_grpc import WorkerStub
from tidemill.core.settings import NetworkSettings, NodeTlsSettings, SettingsError

HOUR = datetime.timedelta(hours=1)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.in_folder(tmp_path / "ours")


async def describe(address: str, tls: NodeTlsSettings | None) -> str:
    """The worker's name, or the status that says no."""
    async with NodeChannels(tls).open(address) as channel:
        try:
            reply = await WorkerStub(channel).Describe(pb.DescribeRequest(), timeout=5.0)
        except grpc.aio.AioRpcError as error:
            return error.code().name
        return wire.peer_from_pb(reply.peer).id.name


async def test_requests_pass_and_strangers_do_not(authority: Authority, tmp_path: Path) -> None:
    """Prefill, hand-over, drafts and decoding all cross the encrypted channels."""
    ours = authority.node()
    strangers = Authority.in_folder(tmp_path / "theirs")
    settings = settings_for().model_copy(update={"network": NetworkSettings(tls=ours)})
    async with local_cluster(settings) as cluster:
        async with AsyncClient(cluster.address) as client:
            answer = await client.generate("def fib(n):" * 20, max_tokens=8)
        assert answer.summary.output_tokens == 8
        assert answer.summary.route.prefill_worker
        worker = cluster.workers[0]
        address = worker.peer.address
        assert await describe(address, ours) == worker.peer.id.name
        foreign = strangers.node()
        refused = {
            "plain text": await describe(address, None),
            "another authority": await describe(address, foreign),
            "signed by others, trusts us": await describe(address, foreign.model_copy(update={"ca": authority.ca})),
            "expired": await describe(address, authority.node("old", valid_for=-HOUR)),
        }
        assert set(refused.values()) == {"UNAVAILABLE"}, refused
        await asyncio.to_thread(scrape_metrics, worker.metrics_address, ours, authority)


def scrape_metrics(address: str, ours: NodeTlsSettings, authority: Authority) -> None:
    def read(context: ssl.SSLContext | None, scheme: str = "https") -> bytes:
        with urllib.request.urlopen(f"{scheme}://{address}/metrics", context=context, timeout=5.0) as answer:
            text: bytes = answer.read()
            return text

    node = ssl.create_default_context(cafile=str(authority.ca))
    node.check_hostname = False
    without_certificate = ssl.create_default_context(cafile=str(authority.ca))
    without_certificate.check_hostname = False
    node.load_cert_chain(ours.certificate, ours.key)
    assert b"tidemill_worker_role" in read(node)
    with pytest.raises((urllib.error.URLError, ssl.SSLError, ConnectionError)):
        read(without_certificate)
    with pytest.raises((urllib.error.URLError, OSError)):
        read(None, "http")


async def test_a_worker_with_an_expired_certificate_is_not_spoken_to(authority: Authority) -> None:
    server = grpc.aio.server()
    port = NodeChannels(authority.node("old", valid_for=-HOUR)).listen(server, "127.0.0.1")
    await server.start()
    assert await describe(f"127.0.0.1:{port}", authority.node()) == "UNAVAILABLE"
    await server.stop(0)


async def test_a_certificate_for_another_name_is_no_nodes(authority: Authority) -> None:
    server = grpc.aio.server()
    port = NodeChannels(authority.node("router", "router.example")).listen(server, "127.0.0.1")
    await server.start()
    assert await describe(f"127.0.0.1:{port}", authority.node()) == "UNAVAILABLE"
    await server.stop(0)


def test_files_that_cannot_be_used(authority: Authority, tmp_path: Path) -> None:
    ours = authority.node()
    with pytest.raises(SettingsError, match=r"nowhere\.pem: cannot be read"):
        NodeChannels(ours.model_copy(update={"ca": tmp_path / "nowhere.pem"}))
    with pytest.raises(SettingsError, match="not a PEM certificate, its key and its authority"):
        NodeChannels(ours.model_copy(update={"key": ours.certificate}))
