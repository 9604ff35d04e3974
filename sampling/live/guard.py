"""Who may talk to the server."""

import ipaddress
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse

Scope = MutableMapping[str, Any]
App = Callable[[Scope, Callable[[], Awaitable[Any]], Callable[[Any], Awaitable[None]]], Awaitable[None]]
OPEN = ("/healthz", "/readyz", "/page.js")  # without a token: they say nothing about anybody
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'unsafe-inline'; "
    "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",  # the url may hold the token
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
}


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`, a name or an address."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


class Guard:
    """Lets in whoever holds the token. Without a token, who calls this machine by a name of its own: a page of others
    whose name was made to point here does not. A page of others is refused by its Origin in any case."""

    def __init__(self, app: App, token: str) -> None:
        self.app, self.token = app, token

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket") or not (fault := self._fault(HTTPConnection(scope))):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": fault})
        else:
            await PlainTextResponse(f"{fault}\n", 403)(scope, receive, send)

    def _fault(self, asked: HTTPConnection) -> str:
        """Why it is refused; empty if it is not."""
        host, origin = asked.headers.get("host", ""), asked.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != host:
            return "a page of another origin"
        if self.token:
            given = asked.query_params.get("token", "")
            wrong = not secrets.compare_digest(given.encode(), self.token.encode())
            return "the token of the url is missing" if wrong and asked.url.path not in OPEN else ""
        return "" if is_loopback(urlsplit(f"//{host}").hostname or "") else "called by another name than localhost"
