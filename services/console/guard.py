"""Refuses requests that other web sites send through a browser of somebody who has the console open.

A page of another site can make the browser ask 127.0.0.1 (DNS rebinding, forged forms). So the header Host must be one
of the console's own, and requests that change something must come from its own pages (Origin).
https://owasp.org/www-community/attacks/csrf
"""

from __future__ import annotations

from collections.abc import Sequence

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_HEADERS = (
    (b"content-security-policy", b"default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),
)


class Guard:
    """`hosts`: HOST:PORT, as browsers send it; and HOST alone where the port is 80."""

    def __init__(self, app: ASGIApp, hosts: Sequence[str]) -> None:
        self._app = app
        self._hosts = {host.lower().encode("latin-1") for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").lower()
        origin = headers.get(b"origin")
        if host not in self._hosts:
            await _refuse(scope, receive, send, "The header Host is not one of this console.")
        elif origin is not None and origin.lower() not in {b"http://" + host, b"https://" + host}:
            await _refuse(scope, receive, send, "The request comes from a page of another site.")
        else:
            await self._app(scope, receive, _with_headers(send))


async def _refuse(scope: Scope, receive: Receive, send: Send, message: str) -> None:
    await PlainTextResponse(message + "\n", 403)(scope, receive, send)


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], *_HEADERS]
        await send(message)

    return sending
