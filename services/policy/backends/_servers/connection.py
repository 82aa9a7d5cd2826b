"""HTTP to one server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any, ClassVar

import aiohttp
import msgspec
from pydantic import SecretStr

from mulligan.common.foreign import is_redirect, kept, redirected
from mulligan.common.tls import HttpsContext
from mulligan.common.tracing import headers

CONTROL_SECONDS = 30.0  # for what needs no work in the model
_MESSAGE_LENGTH = 2000  # bytes of an answer that is no JSON
_END = b"[DONE]"
# For idle connections: servers close them after 5, and a request that meets the end of one looks like a dead server.
_KEEP_SECONDS = 3.0


class Unreachable(Exception):
    """The server does not answer, or answers as one that does not work."""


class RequestRefused(Exception):
    """The server refused the request (HTTP 4xx). The message is for callers. `said` are the server's words, for the
    backend's decisions."""

    def __init__(self, message: str, said: str = ""):
        super().__init__(message)
        self.said = said

    @classmethod
    def by(cls, server: str, said: str, *keys: str) -> RequestRefused:
        """The server with this address said so. The log gets that without these keys."""
        return cls(f"the server refuses it: {kept(server, said, *keys)}", said)


class HttpConnection:
    """`session` is shared by all servers; its creator closes it. Subclasses say where an engine has what."""

    engine: ClassVar[str]  # what messages call it
    keys: ClassVar[str]  # the settings with its keys
    generate_path: ClassVar[str]
    alive_path: ClassVar[str]  # answers when the server works

    def __init__(
        self,
        session: aiohttp.ClientSession,
        address: str,
        api_key: SecretStr | None = None,
        admin_api_key: SecretStr | None = None,
    ):
        self._session = session
        self.address = address.rstrip("/")
        self._headers = _headers(api_key)
        self._control_headers = _headers(admin_api_key or api_key)
        self._keys = [key.get_secret_value() for key in (api_key, admin_api_key) if key is not None]

    async def get(self, path: str, timeout: float = CONTROL_SECONDS) -> dict[str, Any]:
        answer = await self._call("GET", path, None, self._headers, timeout)
        return self._decoded(answer)

    async def control(
        self, path: str, body: Mapping[str, object] | None = None, timeout: float = CONTROL_SECONDS
    ) -> dict[str, Any]:
        """A call that changes the server. It sends the administrator's key, if there is one."""
        answer = await self._call("POST", path, msgspec.json.encode(body or {}), self._control_headers, timeout)
        return self._decoded(answer)

    async def generate(self, body: bytes, timeout: float) -> bytes:
        return await self._call("POST", self.generate_path, body, self._headers, timeout)

    async def generate_stream(self, body: bytes, timeout: float) -> AsyncIterator[bytes]:
        """The events, each the JSON of an answer, as they come."""
        try:
            async with self._session.post(
                f"{self.address}{self.generate_path}",
                data=body,
                headers={**self._headers, **headers()},
                timeout=_timeout(None, between=timeout),
                allow_redirects=False,
            ) as response:
                if response.status != 200:
                    raise self._failure(response, await response.read())
                buffer = b""
                async for chunk in response.content.iter_any():
                    *events, buffer = (buffer + chunk).split(b"\n\n")
                    for event in events:
                        data = event.strip().removeprefix(b"data:").strip()
                        if data == _END:
                            return
                        yield data
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Unreachable(f"{self.address} does not answer: {error or type(error).__name__}") from error
        raise Unreachable(f"{self.address} broke off")

    async def _call(self, method: str, path: str, body: bytes | None, own: Mapping[str, str], timeout: float) -> bytes:
        try:
            async with self._session.request(
                method,
                f"{self.address}{path}",
                data=body,
                headers={**own, **headers()},
                timeout=_timeout(timeout),
                allow_redirects=False,
            ) as response:
                answer = await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Unreachable(f"{self.address} does not answer: {error or type(error).__name__}") from error
        if response.status != 200:
            raise self._failure(response, answer)
        return answer

    def _decoded(self, answer: bytes) -> dict[str, Any]:
        try:
            found = msgspec.json.decode(answer) if answer else None
        except msgspec.DecodeError as error:
            raise Unreachable(f"not an answer of {self.engine}: {error}") from error
        return found if isinstance(found, dict) else {}

    def _failure(self, response: aiohttp.ClientResponse, answer: bytes) -> Exception:
        status = response.status
        if is_redirect(status):
            return Unreachable(redirected(self.address, status, response.headers.get("Location", "")))
        message = answer[:_MESSAGE_LENGTH].decode(errors="replace")
        try:
            found = msgspec.json.decode(answer)
            error = found.get("error", found) if isinstance(found, dict) else found
            if isinstance(error, dict):
                message = str(error.get("message") or error.get("error_message") or error.get("detail") or message)
            else:
                message = str(error)
        except msgspec.DecodeError:
            pass
        if status in (401, 403):
            return Unreachable(f"{self.address} refuses the credential (HTTP {status}): see {self.keys}")
        if self._refuses(status, message):
            return RequestRefused.by(self.address, message, *self._keys)
        return Unreachable(f"{self.address}: HTTP {status}, {kept(self.address, message, *self._keys)}")

    def _refuses(self, status: int, message: str) -> bool:
        """Whether it refuses the request, and works."""
        return status < 500 and status != 404


def new_session(https: HttpsContext | None = None) -> aiohttp.ClientSession:
    """A session without a limit on connections, since the servers queue requests themselves."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_SECONDS, ssl=https.context if https else True),
        cookie_jar=aiohttp.DummyCookieJar(),
        trace_configs=[_refreshing(https)] if https else None,
    )


def _refreshing(https: HttpsContext) -> aiohttp.TraceConfig:
    """Takes certificates that have changed before each connection."""
    config = aiohttp.TraceConfig()

    async def connects(*_: object) -> None:
        https.refresh()

    config.on_connection_create_start.append(connects)
    return config


def _headers(key: SecretStr | None) -> dict[str, str]:
    headers = {"Content-Type": "application/json"}
    if key is not None:
        headers["Authorization"] = f"Bearer {key.get_secret_value()}"
    return headers


def _timeout(total: float | None, between: float | None = None) -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(total=total, sock_connect=10.0, sock_read=between)


async def first_to_answer(connections: list[HttpConnection], seconds: float) -> None:
    """Waits until a server answers. Raises Unreachable if none does in time."""
    deadline = asyncio.get_running_loop().time() + seconds
    while True:
        results = await asyncio.gather(*(one.get(one.alive_path, 10.0) for one in connections), return_exceptions=True)
        failures = [result for result in results if isinstance(result, BaseException)]
        if len(failures) < len(results):
            return
        if asyncio.get_running_loop().time() >= deadline:
            raise Unreachable("; ".join(sorted({str(failure) for failure in failures})))
        await asyncio.sleep(0.5)
