"""The status page over HTTP: the page itself, and the picture it draws each second. Reads only."""

import base64
import binascii
import hmac
import json
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from pathlib import Path

from aiohttp import web

from tidemill.core.picture import Picture
from tidemill.core.settings import RouterSettings, is_loopback

PAGE = Path(__file__).with_name("status_page.html")
HEADERS = {
    # The page is one file: nothing it shows may make a browser ask for anything else.
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class StatusPage:
    """Runs on the router's event loop."""

    def __init__(self, picture: Callable[[], Picture], token: str | None) -> None:
        """`token`: what callers must know; None if anybody on this machine may look."""
        self._picture = picture
        self._token = token
        page = PAGE.read_text(encoding="utf-8")

        async def get_page(_: web.Request) -> web.Response:
            return web.Response(text=page, content_type="text/html")

        app = web.Application(middlewares=[self._guard], client_max_size=0)
        app.router.add_get("/", get_page)
        app.router.add_get("/status.json", self._get_picture)
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=0.1)

    async def start(self, host: str, port: int, context: ssl.SSLContext | None) -> int:
        """Listen; returns the port. Raises OSError."""
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, host, port, ssl_context=context).start()
        except OSError:
            await self._runner.cleanup()
            raise
        bound: int = self._runner.addresses[0][1]
        return bound

    async def stop(self) -> None:
        await self._runner.cleanup()

    async def _get_picture(self, _: web.Request) -> web.Response:
        return web.json_response(asdict(self._picture()), dumps=lambda each: json.dumps(each, allow_nan=False))

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            answer = self._refusal(request) or await handler(request)
        except web.HTTPException as error:  # no such page, no such method
            answer = web.Response(status=error.status, text=error.reason)
        answer.headers.update(HEADERS)
        return answer

    def _refusal(self, request: web.Request) -> web.Response | None:
        if self._token is None:
            # A page from elsewhere may have its own name resolve to this machine; its requests carry that name.
            foreign = not is_loopback(request.url.host or "")
            return web.Response(status=421, text="ask for it at 127.0.0.1") if foreign else None
        if knows_token(request.headers.get("Authorization", ""), self._token):
            return None
        challenge = {"WWW-Authenticate": 'Basic realm="tidemill: any name, the token as password", charset="UTF-8"'}
        return web.Response(status=401, text="missing or wrong token", headers=challenge)


def knows_token(authorization: str, token: str) -> bool:
    """Scripts send `Bearer TOKEN`; browsers ask their user for a name, which does not matter, and a password."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "basic":
        try:
            value = base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return False
    elif scheme.lower() != "bearer":
        return False
    return hmac.compare_digest(value.encode(), token.encode())


def tls_context(settings: RouterSettings) -> ssl.SSLContext | None:
    """The router's own certificate, and its demand for clients'. None without TLS."""
    if settings.tls is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(settings.tls.certificate, settings.tls.key)
    if settings.tls.client_ca:
        context.load_verify_locations(settings.tls.client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return context
