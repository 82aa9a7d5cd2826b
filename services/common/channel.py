"""The client's side of a connection: a deadline on every call, bounded retries, domain errors back as exceptions."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mulligan.common import proxies
from mulligan.common.errors import CallFailed, Code, DomainError, ServiceUnavailable
from mulligan.common.status import from_rpc_error

log = structlog.get_logger()
R = TypeVar("R")
T = TypeVar("T")
# A server that shuts down cancels what is left when its time to drain is over. A call that this side gives up raises
# asyncio.CancelledError instead.
_GONE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
_LATER = (Code.RESOURCE_EXHAUSTED, Code.UNAVAILABLE)
_FIRST_DELAY_SECONDS = 0.05
_MAX_DELAY_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a service is and how to call it.

    `outage_seconds` bounds how long one call keeps retrying while the service is unreachable, or asks for a later call:
    RESOURCE_EXHAUSTED or UNAVAILABLE with a RetryInfo. Every call must be safe to repeat: the contracts see to that.
    """

    address: str
    token: str | None = None
    tls_ca: Path | None = None
    tls: bool = False
    outage_seconds: float = 120.0
    max_message_bytes: int = 64 * 2**20


class Connection:
    """One HTTP/2 channel. `call` and `stream` are the ways in."""

    def __init__(self, endpoint: Endpoint, on_outage: Callable[[str], None] | None = None):
        self.endpoint = endpoint
        self._on_outage = on_outage
        self._is_down = False
        self.metadata = (("authorization", f"Bearer {endpoint.token}"),) if endpoint.token else None
        options = [
            ("grpc.max_send_message_length", endpoint.max_message_bytes),
            ("grpc.max_receive_message_length", endpoint.max_message_bytes),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 2000),
            ("grpc.keepalive_time_ms", 30_000),  # a machine that vanished is noticed within a minute
            ("grpc.keepalive_timeout_ms", 20_000),
            ("grpc.use_local_subchannel_pool", 1),  # a channel of its own: no state shared between clients
            *proxies.grpc_options(endpoint.address),
        ]
        if endpoint.tls or endpoint.tls_ca is not None:
            roots = endpoint.tls_ca.read_bytes() if endpoint.tls_ca else None
            self.channel = grpc.aio.secure_channel(endpoint.address, grpc.ssl_channel_credentials(roots), options)
        else:
            self.channel = grpc.aio.insecure_channel(endpoint.address, options)

    async def call(self, method: Callable[..., Awaitable[R]], request: Any, *, timeout: float) -> R:
        """Makes one unary call, repeating it while the service is unreachable or full.

        Raises DomainError, CallFailed (with `timed_out` when the deadline of `timeout` seconds passed, and with
        INTERNAL when the answer is no message of the call), or ServiceUnavailable after `outage_seconds` without an
        answer.
        """
        waits = Waits(self.endpoint.address, self.endpoint.outage_seconds)
        while True:
            try:
                response = await method(request, timeout=timeout, metadata=self.metadata)
                self._is_down = False
                return self._readable(response, _method(request))
            except grpc.aio.AioRpcError as error:
                cause, refusal = self._retryable(error, _method(request))
            self._report(cause)
            await waits.wait(cause, refusal)

    @asynccontextmanager
    async def stream(
        self, method: Callable[..., AsyncIterable[R]], request: Any, *, timeout: float
    ) -> AsyncIterator[AsyncIterator[R]]:
        """`async with connection.stream(…) as parts:` makes one call whose answer comes in parts, and cancels it at the
        end of the block. Until the first part it repeats the call, and raises, as `call` does; afterwards it raises
        DomainError or CallFailed."""
        async with aclosing(self._parts(method, request, timeout)) as parts:
            yield parts

    async def _parts(
        self, method: Callable[..., AsyncIterable[R]], request: Any, timeout: float
    ) -> AsyncGenerator[R, None]:
        waits = Waits(self.endpoint.address, self.endpoint.outage_seconds)
        while True:
            call: Any = method(request, timeout=timeout, metadata=self.metadata)
            begun = False
            try:
                async for response in call:
                    begun = True
                    self._is_down = False
                    yield self._readable(response, _method(request))
                return
            except grpc.aio.AioRpcError as error:
                if begun:
                    raise self._failure(error, _method(request)) from error
                cause, refusal = self._retryable(error, _method(request))
            finally:
                call.cancel()
            self._report(cause)
            await waits.wait(cause, refusal)

    def _retryable(self, error: grpc.aio.AioRpcError, method: str) -> tuple[str, DomainError | None]:
        """The cause, and what the service said, if anything, when the call should be repeated; raises otherwise."""
        failure = self._failure(error, method)
        if isinstance(failure, DomainError):
            if failure.code in _LATER and failure.retry_after is not None:
                return str(failure), failure
            raise failure from None
        if error.code() in _GONE:
            return f"{error.details() or 'unavailable'}{proxies.hint(self.endpoint.address)}", None
        raise failure from error

    def read(self, convert: Callable[[R], T], response: R) -> T:
        """`convert(response)`. Raises CallFailed with INTERNAL for what a server of another make may answer: an unknown
        enum value, a time that is none, a number of items that nobody asked for, …"""
        try:
            return convert(response)
        except (LookupError, ValueError, TypeError, OverflowError) as error:
            raise self._unreadable(_method(response), f"{type(error).__name__}: {error}") from error

    def _readable(self, response: R, method: str) -> R:
        """grpc.aio gives None for bytes that it cannot read."""
        if response is None:
            raise self._unreadable(method, "the bytes are no message of this call")
        return response

    def _unreadable(self, method: str, cause: str) -> CallFailed:
        return CallFailed(self.endpoint.address, method, "INTERNAL", f"the answer is not of the contract: {cause}")

    def _failure(self, error: grpc.aio.AioRpcError, method: str) -> DomainError | CallFailed:
        found = from_rpc_error(error)
        return found or CallFailed(self.endpoint.address, method, error.code().name, error.details() or "")

    def _report(self, cause: str) -> None:
        """Once per outage, however many calls wait. One that does not wait tells its caller alone."""
        if self._is_down or not self.endpoint.outage_seconds:
            return
        self._is_down = True
        log.warning("waiting for a service", endpoint=self.endpoint.address, cause=cause)
        if self._on_outage is not None:
            self._on_outage(f"waiting for {self.endpoint.address}: {cause}")

    async def close(self) -> None:
        await self.channel.close()


class Waits:
    """Between the attempts of one call, at `endpoint`: longer each time, and no longer than `seconds` in all."""

    def __init__(self, endpoint: str, seconds: float):
        self._endpoint = endpoint
        self._seconds = seconds
        self._since: float | None = None
        self._delay = _FIRST_DELAY_SECONDS

    async def wait(self, cause: str, refusal: DomainError | None = None) -> None:
        """At least as long as the service asked for in its `refusal`, where so much time is left. Raises
        ServiceUnavailable when it is up."""
        now = time.monotonic()
        self._since = self._since or now
        if now - self._since >= self._seconds:
            raise ServiceUnavailable(self._endpoint, now - self._since, cause, refusal)
        later = refusal.retry_after.total_seconds() if refusal is not None and refusal.retry_after is not None else 0.0
        left = self._seconds - (now - self._since)
        await asyncio.sleep(min(max(self._delay, later) * random.uniform(1.0, 1.5), left))
        self._delay = min(self._delay * 2, _MAX_DELAY_SECONDS)


def _method(message: Any) -> str:
    return type(message).__name__.removesuffix("Request").removesuffix("Response")


async def is_healthy(address: str, timeout: float = 2.0, *, tls_ca: bytes | None = None, tls_name: str = "") -> bool:
    """Whether a service answers SERVING to a health check. With `tls_ca`, a PEM file's content, over TLS; `tls_name` is
    then the name in the service's certificate, where that is not the host of `address`."""
    options: list[tuple[str, str | int]] = [*proxies.grpc_options(address)]
    if tls_ca is None:
        opened = grpc.aio.insecure_channel(address, options)
    else:
        options += [("grpc.ssl_target_name_override", tls_name)] if tls_name else []
        opened = grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(tls_ca), options)
    async with opened as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)  # its types know only the synchronous one
        try:
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout)
        except grpc.aio.AioRpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
