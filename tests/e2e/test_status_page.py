"""The status page over HTTP: what it serves, and whom it turns away."""

import asyncio
import base64
import json
import ssl
from pathlib import Path

import aiohttp
import pytest

from router.server import RouterServer
from tests.support.certificates import Authority
from tests.support.local import local_cluster, settings_for
from tidemill import AsyncClient
from tidemill.core.settings import Settings, StatusPageSettings


def test_the_picture_follows_the_requests() -> None:
    async def run() -> None:
        async with (
            local_cluster(settings_for()) as cluster,
            aiohttp.ClientSession(cluster.router.page_address) as http,
            AsyncClient(cluster.address) as client,
        ):
            answer = await client.generate("def fib(n):", max_tokens=16)
            async with http.get("/") as page:
                assert page.status == 200
                assert "<title>Tidemill" in await page.text()
                assert "default-src 'none'" in page.headers["Content-Security-Policy"]
            async with http.get("/status.json") as status:
                picture = json.loads(await status.text())
            assert [each["role"] for each in picture["workers"]] == ["prefill", "draft", "verify", "verify"]
            assert {each["state"] for each in picture["workers"]} == {"serving"}
            assert [(each["name"], each["finished"]) for each in picture["classes"]] == [("default", 1)]
            trace = cluster.router.trace(answer.summary.request_id)
            assert trace is not None
            assert (trace.output_tokens, trace.outcome) == (16, "length")
            assert trace.spans[-1].end_s == pytest.approx(trace.timing.total_s)
            for path, expected in (("/other", 404), ("/../etc/passwd", 404)):
                async with http.get(path) as refused:
                    assert refused.status == expected
            async with http.post("/status.json") as refused:
                assert refused.status == 405

    asyncio.run(run())


async def _status_of(router: RouterServer, context: ssl.SSLContext | None = None, **headers: str) -> int:
    async with (
        aiohttp.ClientSession() as http,
        http.get(f"{router.page_address}status.json", headers=headers, ssl=context or True) as answer,
    ):
        return answer.status


def test_a_foreign_page_that_resolves_to_this_machine_is_turned_away() -> None:
    async def run() -> None:
        router = RouterServer(settings_for())
        await router.start()
        try:
            assert await _status_of(router) == 200
            assert await _status_of(router, Host="elsewhere.example") == 421
        finally:
            await router.stop(0.0)

    asyncio.run(run())


def test_it_asks_for_what_clients_are_asked_for(tmp_path: Path) -> None:
    authority = Authority.in_folder(tmp_path / "ca")
    made = authority.node("router", "127.0.0.1")
    (tmp_path / "token").write_text("secret")
    settings = settings_for(
        router={
            "tls": {"certificate": made.certificate, "key": made.key},
            "token_file": tmp_path / "token",
        }
    )

    def basic(password: str) -> str:
        return "Basic " + base64.b64encode(f"anyone:{password}".encode()).decode()

    async def run() -> None:
        router = RouterServer(settings)
        await router.start()
        trusting = ssl.create_default_context(cafile=str(authority.ca))
        try:
            assert router.page_address.startswith("https://")
            for authorization in ("", "Bearer wrong", "Bearer ", basic("wrong"), "Basic ???", "Digest secret"):
                assert await _status_of(router, trusting, Authorization=authorization) == 401, authorization
            assert await _status_of(router, trusting, Authorization="Bearer secret") == 200
            assert await _status_of(router, trusting, Authorization=basic("secret")) == 200
            with pytest.raises(aiohttp.ClientConnectorCertificateError):
                await _status_of(router)
        finally:
            await router.stop(0.0)

    asyncio.run(run())


def test_off_means_no_port() -> None:
    async def run() -> None:
        settings: Settings = settings_for().model_copy(update={"status_page": StatusPageSettings(enabled=False)})
        router = RouterServer(settings)
        await router.start()
        try:
            assert router.page_address == ""
        finally:
            await router.stop(0.0)

    asyncio.run(run())


def test_a_port_that_is_taken_is_said_plainly() -> None:
    async def run() -> None:
        first = RouterServer(settings_for())
        await first.start()
        port = int(first.page_address.rstrip("/").rpartition(":")[2])
        second = RouterServer(settings_for().model_copy(update={"status_page": StatusPageSettings(port=port)}))
        try:
            with pytest.raises(OSError, match=r"set status_page\.port to another"):
                await second.start()
        finally:
            await first.stop(0.0)

    asyncio.run(run())
