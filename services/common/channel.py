"""Client side of a gRPC connection: deadlines, bounded retries, domain errors as exceptions."""

from __future__ import annotations

import asyncio
import copy
import random
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Hashable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, cast

import grpc
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mulligan.common import proxies
from mulligan.common.addresses import Addresses
from mulligan.common.errors import CallFailed, Code, DomainError, ServiceUnavailable
from mulligan.common.status import from_rpc_error
from mulligan.common.tls import ClientTls, PemFiles
from mulligan.common.tokens import RUN_CREDENTIAL, TokenFile, bearer
from mulligan.common.tracing import NO_SPAN, Origin, Span, client_span, is_on
from mulligan.common.waits import Wait, Waits

log = structlog.get_logger()
R = TypeVar("R")
T = TypeVar("T")
# CANCELLED comes from a server that shuts down and cancels the calls that outlast its drain. A call that this side
# cancels raises asyncio.CancelledError instead.
_GONE = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
_LATER = (Code.RESOURCE_EXHAUSTED, Code.UNAVAILABLE)
_FIRST_DELAY_SECONDS = 0.05
_MAX_DELAY_SECONDS = 2.0
_SHOWN = 100  # characters of a bad value in a message


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Address of a service and how to call it.

    Calls carry `token`, or the first token of `token_file`. Files of `mulligan up` are `runs/local/tokens/trainer` and,
    for the env service, `runs/local/env-tokens/actor`. With `tls` calls are encrypted. Files are read again when they
    change. A token goes to another machine over TLS alone, unless `insecure` is set. `run_credential` goes with each
    call, too, or what it returns then (docs/security.md).

    A call is retried for at most `outage_seconds` while the service is unreachable, or answers RESOURCE_EXHAUSTED or
    UNAVAILABLE with a RetryInfo. Every call of the contracts is safe to repeat.
    """

    address: str
    token: str | None = field(default=None, repr=False)
    token_file: Path | None = None
    tls: ClientTls | None = None
    run_credential: str | Callable[[], str] | None = field(default=None, repr=False)
    insecure: bool = False
    outage_seconds: float = 120.0
    max_message_bytes: int = 64 * 2**20


def check_protection(endpoint: Endpoint) -> None:
    """Raises UnprotectedToken if others could read the endpoint's token on its way."""
    has_token = endpoint.token or endpoint.token_file is not None or endpoint.run_credential
    if has_token and endpoint.tls is None and not endpoint.insecure and not Addresses.parse(endpoint.address).loopback:
        raise UnprotectedToken(endpoint.address)


class UnprotectedToken(ValueError):
    def __init__(self, address: str):
        super().__init__(
            f"the token for {address} would cross the network without TLS: name the authority of its certificate, or "
            "allow it with `insecure`"
        )


def for_servers(endpoint: Endpoint, addresses: Addresses) -> Endpoint:
    """The endpoint, with the name that its servers' certificates have. Servers of a DNS name are called by their
    numbers, so the name of the certificates is that one, unless it is set. Raises ValueError if it must be set."""
    if endpoint.tls is None or endpoint.tls.name or not addresses.names:
        return endpoint
    if len(addresses.names) > 1 or addresses.fixed:
        raise ValueError(f"{addresses.text!r}: with TLS, several names need one in all certificates: set the TLS name")
    return replace(endpoint, tls=replace(endpoint.tls, name=addresses.names[0].name))


class Connection:
    """One HTTP/2 channel to one server.

    `call` and `stream` send a request with the credential and a deadline. While the server is unreachable or asks for a
    later call, `Backoff` sleeps and the call is repeated. Every other failure is raised: as the DomainError that the
    status carries, or else as CallFailed. `read` converts an answer and raises CallFailed when it violates the
    contract. `on_outage` gets a text when calls begin to wait for the server, and one when it answers again;
    `waiting_for` says whether they do. Raises BadTokens for a bad token file, BadTls for bad certificates and
    UnprotectedToken.
    """

    def __init__(self, endpoint: Endpoint, on_outage: Callable[[str], None] | None = None):
        check_protection(endpoint)
        self.endpoint = endpoint
        self._waits = Waits(endpoint.address, on_outage or _unheard)
        self._token_file = TokenFile(endpoint.token_file) if endpoint.token_file is not None else None
        options = [
            ("grpc.max_send_message_length", endpoint.max_message_bytes),
            ("grpc.max_receive_message_length", endpoint.max_message_bytes),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 2000),
            ("grpc.keepalive_time_ms", 30_000),  # detects within a minute that a machine vanished
            ("grpc.keepalive_timeout_ms", 20_000),
            ("grpc.use_local_subchannel_pool", 1),  # clients share no connection
            *proxies.grpc_options(endpoint.address),
        ]
        self.channel = open_channel(endpoint.address, endpoint.tls, options)

    @property
    def metadata(self) -> tuple[tuple[str, str], ...] | None:
        """The credential of a call that is made now."""
        token = self._token_file.tokens[0] if self._token_file is not None else self.endpoint.token
        given = self.endpoint.run_credential
        credential = given() if callable(given) else given
        found = (*(bearer(token) if token else ()), *(((RUN_CREDENTIAL, credential),) if credential else ()))
        return found or None

    def with_run_credential(self, credential: str | Callable[[], str]) -> Connection:
        """The same connection, whose calls carry this credential. Raises UnprotectedToken."""
        found = copy.copy(self)
        found.endpoint = replace(self.endpoint, run_credential=credential)
        check_protection(found.endpoint)
        return found

    async def call(
        self, method: Callable[..., Awaitable[R]], request: Any, *, timeout: float, origins: Sequence[Origin] = ()
    ) -> R:
        """Makes one unary call. Repeats it while the service is unreachable or full. `origins` are the spans whose
        requests it carries, where those are several.

        Raises DomainError; CallFailed, with `timed_out` after `timeout` seconds and with INTERNAL for an answer that
        cannot be parsed; ServiceUnavailable after `outage_seconds` without an answer.
        """
        backoff = Backoff(self.endpoint.address, self.endpoint.outage_seconds)
        with self._span(request, origins) as span, self._waits.call() as wait:
            while True:
                try:
                    response = await method(request, timeout=timeout, metadata=span.carried(self.metadata))
                    wait.answered()
                    return self._readable(response, _method(request))
                except grpc.aio.AioRpcError as error:
                    cause, refusal = self._retryable(error, _method(request))
                self._begin(wait, cause)
                await backoff.wait(cause, refusal)
                span.set(retries=backoff.waits)

    @contextmanager
    def _span(self, request: Any, origins: Sequence[Origin]) -> Iterator[Span]:
        """Around one call, with all its tries."""
        if not is_on():
            yield NO_SPAN
            return
        kind: Any = type(request)
        span = client_span(_full_name(kind), self.endpoint.address, origins)
        status = "OK"
        try:
            yield span
        except BaseException as error:
            status = _status_of(error)
            raise
        finally:
            span.end(status)

    async def list_items(
        self,
        method: Callable[..., Awaitable[R]],
        request: Any,
        convert: Callable[[R], list[T]],
        *,
        timeout: float,
        limit: int = 0,
    ) -> list[T]:
        """Returns the items of a listing: the first `limit`, or all if that is 0. It asks for pages of at most
        `request.page_size` items and changes the request. `convert` returns the items of a page.

        Raises as `call` and `read` do, and CallFailed with INTERNAL if a page token comes twice: that list has no end.
        """
        largest = request.page_size
        found: list[T] = []
        seen: set[str] = set()
        while True:
            if limit:
                request.page_size = min(largest, limit - len(found))
            page: Any = await self.call(method, request, timeout=timeout)
            found += self.read(convert, page)
            token: str = page.next_page_token
            if not token or 0 < limit <= len(found):
                return found
            if token in seen:
                raise self._unreadable(_method(request), f"next_page_token {token[:_SHOWN]!r} comes again")
            seen.add(token)
            request.page_token = token

    @asynccontextmanager
    async def stream(
        self, method: Callable[..., AsyncIterable[R]], request: Any, *, timeout: float, origins: Sequence[Origin] = ()
    ) -> AsyncIterator[AsyncIterator[R]]:
        """Makes one call with a streamed answer: `async with connection.stream(…) as parts:`. The end of the block
        cancels it.

        Before the first part it retries and raises as `call` does; after it, it raises DomainError or CallFailed.
        """
        with self._span(request, origins) as span, self._waits.call() as wait:
            async with aclosing(self._parts(method, request, timeout, span, wait)) as parts:
                yield parts

    async def _parts(
        self, method: Callable[..., AsyncIterable[R]], request: Any, timeout: float, span: Span, wait: Wait
    ) -> AsyncGenerator[R, None]:
        backoff = Backoff(self.endpoint.address, self.endpoint.outage_seconds)
        while True:
            call: Any = method(request, timeout=timeout, metadata=span.carried(self.metadata))
            begun = False
            try:
                async for response in call:
                    begun = True
                    wait.answered()
                    yield self._readable(response, _method(request))
                return
            except grpc.aio.AioRpcError as error:
                if begun:
                    raise self._failure(error, _method(request)) from error
                cause, refusal = self._retryable(error, _method(request))
            finally:
                call.cancel()
            self._begin(wait, cause)
            await backoff.wait(cause, refusal)
            span.set(retries=backoff.waits)

    def _retryable(self, error: grpc.aio.AioRpcError, method: str) -> tuple[str, DomainError | None]:
        """Returns the cause, and the refusal of the service if it sent one, of a call that may be repeated. Raises
        otherwise."""
        failure = self._failure(error, method)
        if isinstance(failure, DomainError):
            if is_for_later(failure):
                return str(failure), failure
            raise failure from None
        if error.code() in _GONE:
            return f"{error.details() or 'unavailable'}{proxies.hint(self.endpoint.address)}", None
        raise failure from error

    def read(self, convert: Callable[[R], T], response: R) -> T:
        """Returns `convert(response)`. Raises CallFailed with INTERNAL when the conversion fails: an unknown enum
        value, an invalid time, a wrong number of items, …"""
        try:
            return convert(response)
        except (LookupError, ValueError, TypeError, OverflowError) as error:
            raise self._unreadable(_method(response), f"{type(error).__name__}: {error}") from error

    def _readable(self, response: R, method: str) -> R:
        """grpc.aio returns None for bytes that it cannot parse."""
        if response is None:
            raise self._unreadable(method, "the bytes cannot be parsed")
        return response

    def _unreadable(self, method: str, cause: str) -> CallFailed:
        return CallFailed(self.endpoint.address, method, "INTERNAL", f"the answer violates the contract: {cause}")

    def _failure(self, error: grpc.aio.AioRpcError, method: str) -> DomainError | CallFailed:
        found = from_rpc_error(error)
        details = error.details() or ""
        if found is None and error.code() is grpc.StatusCode.UNIMPLEMENTED:
            details = f"the server does not have this call: it is of an earlier release, or another service ({details})"
        return found or CallFailed(self.endpoint.address, method, error.code().name, details)

    def _begin(self, wait: Wait, cause: str) -> None:
        """A call without retries only raises."""
        if self.endpoint.outage_seconds:
            wait.begin(cause)

    @property
    def waiting_for(self) -> str:
        """What calls wait for now; "" if none does."""
        return self._waits.text

    async def close(self) -> None:
        await self.channel.close()


def _unheard(text: str) -> None:
    """Of a connection whose outages only the log tells of."""


def is_for_later(error: DomainError) -> bool:
    """Whether the service asks to repeat the call, after a time that it says."""
    return error.code in _LATER and error.retry_after is not None


class Backoff:
    """Exponential backoff between the tries of one call at `endpoint`, for at most `seconds` in all."""

    def __init__(self, endpoint: str, seconds: float):
        self._endpoint = endpoint
        self._seconds = seconds
        self._since: float | None = None
        self._delay = _FIRST_DELAY_SECONDS
        self.waits = 0

    async def wait(self, cause: str, refusal: DomainError | None = None) -> None:
        """Sleeps, as long as the `refusal` asks for if so much time is left. Raises ServiceUnavailable when no time is
        left."""
        now = time.monotonic()
        self._since = self._since or now
        if now - self._since >= self._seconds:
            raise ServiceUnavailable(self._endpoint, now - self._since, cause, refusal)
        later = refusal.retry_after.total_seconds() if refusal is not None and refusal.retry_after is not None else 0.0
        left = self._seconds - (now - self._since)
        await asyncio.sleep(min(max(self._delay, later) * random.uniform(1.0, 1.5), left))
        self._delay = min(self._delay * 2, _MAX_DELAY_SECONDS)
        self.waits += 1


def open_channel(address: str, tls: ClientTls | None, options: Sequence[tuple[str, str | int]]) -> grpc.aio.Channel:
    """Raises BadTls."""
    if tls is None:
        return grpc.aio.insecure_channel(address, options)
    return cast(grpc.aio.Channel, _TlsChannel(address, tls, options))


@dataclass(eq=False)
class _Opened:
    """A channel, its methods by kind and name, and how many of its calls have not ended."""

    channel: grpc.aio.Channel
    methods: dict[tuple[str, str], Callable[..., Any]] = field(default_factory=dict)
    calls: int = 0


class _TlsChannel:
    """Stands for the channel of a stub. gRPC's channels keep the certificates that they were opened with, so after a
    change of the files this one opens another. The old one is closed when its calls have ended."""

    def __init__(self, address: str, tls: ClientTls, options: Sequence[tuple[str, str | int]]):
        self._address = address
        self._options = [*options, *([("grpc.ssl_target_name_override", tls.name)] if tls.name else [])]
        self._files = PemFiles(tls.ca, tls.cert, tls.key)
        self._used = self._files.content
        self._opened = self._open()
        self._closing: set[asyncio.Task[None]] = set()

    def _open(self) -> _Opened:
        credentials = grpc.ssl_channel_credentials(self._used.ca, self._used.key, self._used.cert)
        return _Opened(grpc.aio.secure_channel(self._address, credentials, self._options))

    def _now(self) -> _Opened:
        content = self._files.content
        if content is not self._used:
            self._used = content
            old = self._opened
            self._opened = self._open()
            self._close_unused(old)
        return self._opened

    def _close_unused(self, opened: _Opened) -> None:
        if opened is not self._opened and not opened.calls:
            task = asyncio.get_running_loop().create_task(opened.channel.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    def _method(self, kind: str, name: str, options: Mapping[str, Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            opened = self._now()
            method = opened.methods.get((kind, name))
            if method is None:
                method = opened.methods[kind, name] = getattr(opened.channel, kind)(name, **options)
            started = method(*arguments, **keywords)
            opened.calls += 1
            started.add_done_callback(lambda _: ended(opened))
            return started

        def ended(opened: _Opened) -> None:
            opened.calls -= 1
            self._close_unused(opened)

        return call

    def unary_unary(self, method: str, **options: Any) -> Callable[..., Any]:
        return self._method("unary_unary", method, options)

    def unary_stream(self, method: str, **options: Any) -> Callable[..., Any]:
        return self._method("unary_stream", method, options)

    def stream_unary(self, method: str, **options: Any) -> Callable[..., Any]:
        return self._method("stream_unary", method, options)

    def stream_stream(self, method: str, **options: Any) -> Callable[..., Any]:
        return self._method("stream_stream", method, options)

    async def close(self) -> None:
        await self._opened.channel.close()
        await asyncio.gather(*self._closing)

    async def __aenter__(self) -> _TlsChannel:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


@lru_cache(256)
def _full_name(kind: Hashable) -> str:
    """Of the call that takes these requests: "mulligan.env.v1.EnvService/StepEpisode"."""
    described: Any = getattr(kind, "DESCRIPTOR", None)
    if described is None:
        return str(getattr(kind, "__name__", kind))
    request = described.containing_type or described  # an upload is named by its header
    for service in request.file.services_by_name.values():
        for method in service.methods:
            if method.input_type.full_name == request.full_name:
                return f"{service.full_name}/{method.name}"
    return str(request.full_name)


def _status_of(error: BaseException) -> str:
    if isinstance(error, DomainError | CallFailed):
        return str(error.code)
    if isinstance(error, ServiceUnavailable):
        return "UNAVAILABLE"
    return "INTERNAL" if isinstance(error, Exception) else "CANCELLED"


def _method(message: Any) -> str:
    return type(message).__name__.removesuffix("Request").removesuffix("Response")


@dataclass(frozen=True, slots=True)
class HealthAnswer:
    """What came of a health check: the status of the health protocol, such as SERVING or NOT_SERVING, or of gRPC, such
    as UNAVAILABLE; `details` are gRPC's words then."""

    status: str
    details: str = ""


async def ask_health(
    address: str, timeout: float = 2.0, tls: ClientTls | None = None, service: str = ""
) -> HealthAnswer:
    """Asks a server whether one of its gRPC services, or itself, serves. Raises BadTls."""
    async with open_channel(address, tls, [*proxies.grpc_options(address)]) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)  # typed for synchronous channels only
        try:
            answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=timeout)
        except grpc.aio.AioRpcError as error:
            return HealthAnswer(error.code().name, error.details() or "")
        if answer is None:
            return HealthAnswer("INTERNAL", "the answer cannot be parsed")
        known = health_pb2.HealthCheckResponse.ServingStatus
        found = answer.status
        return HealthAnswer(known.Name(found) if found in known.values() else str(found))


async def is_healthy(address: str, timeout: float = 2.0, tls: ClientTls | None = None, service: str = "") -> bool:
    """Whether a server answers SERVING to a health check of a gRPC service, or of itself. Raises BadTls."""
    return (await ask_health(address, timeout, tls, service)).status == "SERVING"
