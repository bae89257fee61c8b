"""What the router shows the outside: TLS, bearer token, health, reflection, metrics, ports, statuses."""

import asyncio
import datetime
import socket
import urllib.request
from collections.abc import AsyncIterator, Iterator
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from router.server import RouterServer
from tests.support.scripted_worker import ScriptedWorker, obliging_verify, router_settings
from tests.support.stage import started
from tidemill import (
    AsyncClient,
    Client,
    InvalidRequest,
    Message,
    MessageTooLarge,
    ModelNotFound,
    Tls,
    Unauthenticated,
    Unavailable,
)
from tidemill.core import metrics
from tidemill.core.messages import Submit
from tidemill.core.model import Role
from tidemill.core.settings import MetricsSettings, SettingsError
from tidemill.proto import inference_pb2 as pb
from tidemill.proto.inference_pb2_grpc import InferenceStub

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
async def worker() -> AsyncIterator[ScriptedWorker]:
    worker = ScriptedWorker("verify-0", Role.VERIFY)
    worker.on = obliging_verify(worker)
    await worker.start()
    yield worker
    await worker.stop()


@pytest.fixture
async def router(worker: ScriptedWorker) -> AsyncIterator[RouterServer]:
    """With small messages; must be empty and still serve after each test."""
    router = await started(router_settings(router={"max_message_bytes": 50_000}), worker)
    yield router
    async with AsyncClient(router.address, retries=0, timeout=5.0) as client:
        assert (await client.generate("x", max_tokens=2)).summary.output_tokens == 2
    assert not router._servicer._active
    assert router.describe()["active"] == 0
    await router.stop(0.0)


@pytest.fixture
async def channel(router: RouterServer) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(router.address) as channel:
        yield channel


# --- TLS and token ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A self-signed certificate for 127.0.0.1, its key, and a token."""
    folder = tmp_path_factory.mktemp("pem")
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "tidemill test")])
    now = datetime.datetime.now(datetime.UTC)
    tomorrow = now + datetime.timedelta(days=1)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, tomorrow)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(IPv4Address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    paths = {"certificate": folder / "cert.pem", "key": folder / "key.pem", "token": folder / "token"}
    paths["certificate"].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    encoding, no_password = serialization.Encoding.PEM, serialization.NoEncryption()
    paths["key"].write_bytes(key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, no_password))
    paths["token"].write_text("s3cret\n")
    return paths


async def test_tls_and_token(worker: ScriptedWorker, pem: dict[str, Path]) -> None:
    tls = {"certificate": pem["certificate"], "key": pem["key"]}
    router = await started(router_settings(router={"tls": tls, "token_file": pem["token"]}), worker)
    trusted = Tls(ca=pem["certificate"])
    async with AsyncClient(router.address, token="s3cret", tls=trusted, retries=0) as client:
        assert (await client.generate("x", max_tokens=2)).summary.output_tokens == 2
        await asyncio.sleep(0.3)  # health is looked at four times a second
    assert await asyncio.to_thread(_generate_blocking, router.address, trusted) == 2
    for token in ("wrong", "s3cret2", "", None):
        async with AsyncClient(router.address, token=token, tls=trusted, retries=0) as client:
            with pytest.raises(Unauthenticated, match="authorization: Bearer"):
                await client.generate("x", max_tokens=2)
            with pytest.raises(Unauthenticated):
                await anext(aiter(client.stream("x", max_tokens=2)))
            assert await client.health(), "health stays open"
    async with AsyncClient(router.address, token="s3cret", retries=0, timeout=2.0) as plain:
        with pytest.raises(Unavailable):
            await plain.generate("x", max_tokens=2)
    async with AsyncClient(router.address, token="s3cret", tls=Tls(), retries=0, timeout=2.0) as distrustful:
        with pytest.raises(Unavailable):
            await distrustful.generate("x", max_tokens=2)
    await router.stop(0.0)


def _generate_blocking(address: str, tls: Tls) -> int:
    with Client(address, token="s3cret", tls=tls) as client:
        return client.generate("x", max_tokens=2).summary.output_tokens


async def test_client_certificates(worker: ScriptedWorker, pem: dict[str, Path]) -> None:
    tls = {"certificate": pem["certificate"], "key": pem["key"], "client_ca": pem["certificate"]}
    router = await started(router_settings(router={"tls": tls}), worker)
    known = Tls(ca=pem["certificate"], certificate=pem["certificate"], key=pem["key"])
    async with AsyncClient(router.address, tls=known, retries=0) as client:
        assert (await client.generate("x", max_tokens=2)).summary.output_tokens == 2
    async with AsyncClient(router.address, tls=Tls(ca=pem["certificate"]), retries=0, timeout=2.0) as unknown:
        with pytest.raises(Unavailable):
            await unknown.generate("x", max_tokens=2)
    await router.stop(0.0)


async def test_secrets_that_cannot_be_used(pem: dict[str, Path], tmp_path: Path) -> None:
    nonsense, empty = tmp_path / "nonsense", tmp_path / "empty"
    nonsense.write_text("nonsense")
    empty.write_text("\n")
    for options, said in (
        ({"tls": {"certificate": nonsense, "key": pem["key"]}}, "not a PEM certificate and its key"),
        ({"tls": {"certificate": tmp_path / "gone", "key": pem["key"]}}, "gone: cannot be read"),
        ({"token_file": empty}, "the token file is empty"),
        ({"token_file": tmp_path / "gone"}, "gone: the token file cannot be read"),
    ):
        with pytest.raises(SettingsError, match=said):
            await RouterServer(router_settings(router=options)).start()  # type: ignore[arg-type]


# --- ports ------------------------------------------------------------------------------------------------------


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        yield holder.getsockname()[1]


async def test_a_port_in_use(taken_port: int) -> None:
    with pytest.raises(
        OSError, match=rf"cannot listen on 127.0.0.1:{taken_port}: is the port in use\? set router.port"
    ):
        await RouterServer(router_settings(router={"port": taken_port})).start()


async def test_a_metrics_port_in_use_leaves_nothing_behind(taken_port: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = router_settings(router={"port": port})
    router = RouterServer(settings.model_copy(update={"metrics": MetricsSettings(router_port=taken_port)}))
    with pytest.raises(OSError, match=rf"cannot serve metrics on 127.0.0.1:{taken_port}.*set metrics.router_port"):
        await router.start()
    await router.stop()  # harmless: it never started
    again = RouterServer(settings)
    assert await again.start() == f"127.0.0.1:{port}", "the port is free again"
    await again.stop(0.0)


# --- other services ---------------------------------------------------------------------------------------------


async def test_health_follows_the_workers(worker: ScriptedWorker) -> None:
    router = await started(router_settings())
    async with grpc.aio.insecure_channel(router.address) as channel, AsyncClient(router.address) as client:
        stub = health_pb2_grpc.HealthStub(channel)
        watch = aiter(stub.Watch(health_pb2.HealthCheckRequest(service="tidemill.v1.Inference")))
        assert (await anext(watch)).status == NOT_SERVING
        assert not await client.health()
        await router.set_members([worker.member])
        assert (await asyncio.wait_for(anext(watch), 3.0)).status == SERVING
        assert (await stub.Check(health_pb2.HealthCheckRequest())).status == SERVING
        assert await client.health()
        assert await asyncio.to_thread(_health_blocking, router.address)
        await worker.stop()
        assert (await asyncio.wait_for(anext(watch), 5.0)).status == NOT_SERVING
        await router.stop(0.0)
        assert not await client.health(), "no router, no service; and no exception"


def _health_blocking(address: str) -> bool:
    with Client(address) as client:
        return client.health()


async def test_reflection_lists_the_services(router: RouterServer, channel: grpc.aio.Channel) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    answers = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    names = {service.name async for each in answers for service in each.list_services_response.service}
    assert {"tidemill.v1.Inference", "grpc.health.v1.Health"} <= names


async def test_metrics_are_served(router: RouterServer) -> None:
    async with AsyncClient(router.address) as client:
        await client.generate("x", max_tokens=3)
    url = f"http://{router.metrics_address}/metrics"
    page = await asyncio.to_thread(lambda: urllib.request.urlopen(url).read().decode())
    for series in metrics.ROUTER_SERIES:
        assert series.name.removesuffix("_total") in page
    assert 'tidemill_requests_total{outcome="length"} 1.0' in page
    assert 'tidemill_time_to_first_token_seconds_count{slo_class="default"} 1.0' in page


# --- bytes and sizes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["Generate", "GenerateStream", "Chat", "ChatStream", "Tokenize"])
@pytest.mark.parametrize("data", [b"\x12\x02\xff\xfe", b"\x0a\xff", b"\xff" * 40], ids=["utf-8", "cut off", "noise"])
async def test_bytes_that_are_no_request(channel: grpc.aio.Channel, method: str, data: bytes) -> None:
    path = f"/tidemill.v1.Inference/{method}"
    call: Any = channel.unary_stream(path)(data) if "Stream" in method else channel.unary_unary(path)(data)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (call.read() if "Stream" in method else call)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert ("tidemill-error", "invalid_request") in tuple(caught.value.trailing_metadata() or ())
    assert "cannot be read" in (caught.value.details() or "")


async def test_messages_over_the_limit(router: RouterServer) -> None:
    async with AsyncClient(router.address, retries=0) as client:
        for call in (
            client.generate("x" * 60_000),
            anext(aiter(client.stream("x" * 60_000))),
            client.chat([Message("user", "x" * 60_000)]),
            client.tokenize("x" * 60_000),
        ):
            with pytest.raises(MessageTooLarge, match=r"50000.*router\.max_message_bytes"):
                await call  # type: ignore[misc]


async def test_what_is_repeated_in_errors_is_short(router: RouterServer) -> None:
    """Status messages travel in headers: a long one would break the connection instead of telling anything."""
    async with AsyncClient(router.address, retries=0) as client:
        long = "n" * 20_000
        with pytest.raises(ModelNotFound, match=r"'n{64}\.\.\.' is not served here; 'tiny' is"):
            await client.generate("x", model=long)
        with pytest.raises(InvalidRequest, match=r"slo_class 'n{64}\.\.\.'"):
            await client.generate("x", slo=long)
        with pytest.raises(InvalidRequest, match=r"message role 'n{64}\.\.\.'"):
            await client.chat([Message(long, "x")])


async def test_an_unknown_method_is_said_to_be_unknown(channel: grpc.aio.Channel) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary("/tidemill.v1.Inference/Nonsense")(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_max_tokens_is_cut_to_the_context_before_any_worker_sees_it(
    router: RouterServer, worker: ScriptedWorker
) -> None:
    async with AsyncClient(router.address, retries=0) as client:
        done = await client.generate([5] * 2040, max_tokens=2**32 - 1)
    assert done.summary.output_tokens == 8
    assert (await worker.heard(Submit)).request.sampling.max_tokens == 8


async def test_a_drawn_seed_is_reported_and_gives_the_same_again(router: RouterServer, worker: ScriptedWorker) -> None:
    async with AsyncClient(router.address, retries=0) as client:
        drawn = await client.generate("x", temperature=1.0, max_tokens=4)
        assert (await worker.heard(Submit)).request.sampling.seed == drawn.summary.seed > 0
        again = await client.generate("x", temperature=1.0, max_tokens=4, seed=drawn.summary.seed)
        assert again.tokens == drawn.tokens
        assert (await client.generate("x", max_tokens=4)).summary.seed == 0


async def test_a_long_prompt_holds_nobody_up(worker: ScriptedWorker) -> None:
    """Tokenizing 3 MB takes a second; the event loop goes on meanwhile."""
    router = await started(router_settings(), worker)
    async with AsyncClient(router.address, retries=0) as client:
        longest_s, done = 0.0, asyncio.Event()

        async def watch() -> None:
            nonlocal longest_s
            loop = asyncio.get_running_loop()
            while not done.is_set():
                before = loop.time()
                await asyncio.sleep(0.005)
                longest_s = max(longest_s, loop.time() - before)

        watcher = asyncio.create_task(watch())
        with pytest.raises(InvalidRequest, match="leaves no room in the context of 2048"):
            await client.generate("return compute(argument) + 1\n" * 100_000)
        done.set()
        await watcher
    await router.stop(0.0)
    assert longest_s < 0.5, f"the router's loop stood still for {longest_s:.2f} s"


async def test_the_example_of_the_stub(router: RouterServer, channel: grpc.aio.Channel) -> None:
    """The protocol itself, without the client library: what another language's client sees."""
    stub: Any = InferenceStub(channel)
    request = pb.GenerateRequest(text="x", sampling=pb.SamplingParams(max_tokens=3), request_id="mine")
    chunks = [chunk async for chunk in stub.GenerateStream(request)]
    assert chunks[-1].summary.request_id == "mine"
    assert chunks[-1].summary.finish_reason == pb.FINISH_REASON_LENGTH
    answer = await stub.Generate(request)
    assert list(answer.tokens) == [token for chunk in chunks for token in chunk.tokens]
    assert answer.text == "".join(chunk.text for chunk in chunks)
