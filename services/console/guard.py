"""Refuses requests without the console's key, and those that other web sites send through a browser of somebody who has
the console open.

The console reads with the tokens of its user, and other users of the machine reach its port: so they need the key.

A page of another site can make the browser ask 127.0.0.1 (DNS rebinding, forged forms). So the header Host must be one
of the console's own, and requests that change something must come from its own pages (Origin).
https://owasp.org/www-community/attacks/csrf
"""

from __future__ import annotations

from urllib.parse import quote, urlencode

from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mulligan.console.access import Access
from mulligan.console.templating import templates

_HEADERS = (
    (b"content-security-policy", b"default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),
)


class Guard:
    """Sets `may_act` in the scope of requests that have the key."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access
        self._hosts = {host.lower().encode("latin-1") for host in access.hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = self._refusal(scope) or self._with_key(Request(scope))
        await (answer or self._app)(scope, receive, _with_headers(send))

    def _refusal(self, scope: Scope) -> Response | None:
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").lower()
        origin = headers.get(b"origin")
        if host not in self._hosts:
            names = ", ".join(self._access.hosts)
            return _refused(f"The header Host is not one of this console: {names}. `mulligan ui --name` adds one.")
        is_own = origin is not None and origin.lower() in {b"http://" + host, b"https://" + host}
        if not is_own and (origin is not None or scope["method"] == "POST"):
            return _refused("The request comes from a page of another site.")
        return None

    def _with_key(self, request: Request) -> Response | None:
        """What to answer instead of the page, if not the page."""
        access = self._access
        if given := request.query_params.get("key"):
            if not access.is_key(given):
                return self._asked(request, "This is not the key of this console.")
            others = [(name, value) for name, value in request.query_params.multi_items() if name != "key"]
            answer = RedirectResponse(f"{quote(request.url.path)}?{urlencode(others)}".removesuffix("?"), 303)
            secure = request.url.scheme == "https"
            answer.set_cookie(access.cookie, access.key, httponly=True, secure=secure, samesite="strict")
            return answer
        request.scope["may_act"] = access.is_key(request.cookies.get(access.cookie, ""))
        if request.scope["may_act"] or request.url.path.startswith("/static/"):
            return None
        if access.is_open and request.method != "POST":
            return None
        return self._asked(request, "This needs the key of the console.")

    def _asked(self, request: Request, message: str) -> Response:
        path = "/" if request.method == "POST" else request.url.path
        text = templates().get_template("key.html").render(message=message, path=path)
        return HTMLResponse(text, 401, {"Cache-Control": "no-store"})


def _refused(message: str) -> Response:
    return PlainTextResponse(message + "\n", 403)


def _with_headers(send: Send) -> Send:
    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], *_HEADERS]
        await send(message)

    return sending
