"""Start-up of a gRPC service: interceptor, health, reflection, limits, TLS, credential, and a drain on SIGTERM."""

from __future__ import annotations

import asyncio
import hmac
import logging
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeAlias, cast

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from pydantic import SecretStr

from services.common.config import ServiceSettings
from services.common.errors import DomainError, Reason, invalid_field
from services.common.status import to_status
from services.common.validation import prepare, violations

log = structlog.get_logger()
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_OPEN_SERVICES = ("/grpc.health.v1.Health/", "/grpc.reflection.")  # probes carry no credential
_REQUEST_KEYS = ("run_id", "episode_id", "request_id", "learner_id", "reflection_id", "sequence", "step_index")


def configure_logging(settings: ServiceSettings) -> None:
    renderer: Any = (
        structlog.processors.JSONRenderer()
        if settings.log_format == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, settings.log_level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(service=settings.service)


class RequestInterceptor(grpc.aio.ServerInterceptor):
    """What every call goes through: credential, field constraints, deadline, error translation, log line.

    `credentials` maps a gRPC service's full name to the token that its calls need; "" is for all others.
    """

    def __init__(self, credentials: Mapping[str, SecretStr | None], default_deadline: float = 3600.0):
        self._credentials = credentials
        self._default_deadline = default_deadline  # seconds
        self._handlers: dict[str, _Handler | None] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        method = handler_call_details.method
        if method in self._handlers:
            return self._handlers[method]
        handler = await continuation(handler_call_details)
        if handler is None:  # not remembered: anyone can ask for methods that don't exist, without end
            return None
        return self._handlers.setdefault(method, self._guard(method, handler))

    def _guard(self, method: str, handler: _Handler) -> _Handler:
        if method.startswith(_OPEN_SERVICES):
            return handler
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(
                self._unary(method, handler.unary_unary), handler.request_deserializer, handler.response_serializer
            )
        if handler.unary_stream is not None:
            return grpc.unary_stream_rpc_method_handler(
                self._stream(method, cast(Any, handler.unary_stream)),
                handler.request_deserializer,
                handler.response_serializer,
            )
        raise TypeError(f"{method} streams its requests, which nothing here checks yet")

    def _check(self, method: str, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        service = method.rsplit("/", 1)[0].lstrip("/")
        secret = self._credentials.get(service, self._credentials.get(""))
        if secret is not None:
            given = dict(context.invocation_metadata() or ()).get("authorization", "")
            if not hmac.compare_digest(str(given).encode(), f"Bearer {secret.get_secret_value()}".encode()):
                raise DomainError(Reason.BAD_CREDENTIAL, f"{service} needs `authorization: Bearer TOKEN`")
        for violation in violations(request):
            raise invalid_field(violation.field, violation.expected)

    def _unary(self, method: str, call: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def handle(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            with _Logged(method, request) as logged:
                try:
                    self._check(method, request, context)
                    # gRPC itself cancels a call whose caller's deadline has passed.
                    own = None if context.time_remaining() is not None else self._default_deadline
                    async with asyncio.timeout(own) as limit:
                        return await call(request, context)
                except DomainError as error:
                    logged.failed(error)
                    await context.abort_with_status(to_status(error))
                except Exception as error:  # noqa: BLE001 - not a declared error: a fault of ours
                    if isinstance(error, TimeoutError) and limit.expired():
                        logged.timed_out()
                        await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "the server's default deadline passed")
                    logged.broke(error)
                    await context.abort(grpc.StatusCode.INTERNAL, f"{type(error).__name__}: {error}")

        return handle

    def _stream(self, method: str, call: Callable[..., AsyncIterator[Any]]) -> Callable[..., AsyncIterator[Any]]:
        async def handle(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            with _Logged(method, request) as logged:
                try:
                    self._check(method, request, context)
                    async for response in call(request, context):
                        yield response
                except DomainError as error:
                    logged.failed(error)
                    await context.abort_with_status(to_status(error))
                except Exception as error:  # noqa: BLE001 - not a declared error: a fault of ours
                    logged.broke(error)
                    await context.abort(grpc.StatusCode.INTERNAL, f"{type(error).__name__}: {error}")

        return handle


class _Logged:
    """One line per request: method, ids, duration, status. `log_level = "warning"` leaves out those that went well."""

    def __init__(self, method: str, request: Any):
        self._method = method.rsplit("/", 1)[-1]
        self._request = request
        self._status = "OK"
        self._reason: str | None = None
        self._error: BaseException | None = None
        self._start = time.perf_counter()

    def failed(self, error: DomainError) -> None:
        self._status, self._reason = error.code, error.reason

    def timed_out(self) -> None:
        self._status = "DEADLINE_EXCEEDED"

    def broke(self, error: Exception) -> None:
        self._status, self._error = "INTERNAL", error

    def __enter__(self) -> _Logged:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is asyncio.CancelledError:
            self._status = "CANCELLED"
        level = logging.ERROR if self._status == "INTERNAL" else logging.INFO
        if not log.is_enabled_for(level):
            return
        ids = {key: value for key in _REQUEST_KEYS if (value := getattr(self._request, key, None)) not in (None, "")}
        extra: dict[str, Any] = {"reason": self._reason} if self._reason else {}
        if self._error is not None:
            extra["exc_info"] = self._error
        milliseconds = round((time.perf_counter() - self._start) * 1000, 2)
        log.log(level, "request", method=self._method, status=self._status, milliseconds=milliseconds, **ids, **extra)


async def serve(
    settings: ServiceSettings,
    register: Callable[[grpc.aio.Server], Sequence[str]],
    *,
    credentials: Mapping[str, SecretStr | None] | None = None,
    on_drain: Callable[[], Awaitable[None]] | None = None,
    on_started: Callable[[str], Awaitable[None]] | None = None,
) -> None:
    """Serves until SIGTERM or SIGINT, then finishes what is in flight.

    `register` adds servicers and returns their full names. `on_started` gets the bound address once calls are served.
    `on_drain` runs when the drain begins, before calls in flight are waited for. Raises OSError when the address is
    taken.
    """
    server = grpc.aio.server(
        interceptors=[
            RequestInterceptor({"": settings.token, **(credentials or {})}, settings.default_deadline_seconds)
        ],
        options=[
            ("grpc.max_send_message_length", settings.max_message_bytes),
            ("grpc.max_receive_message_length", settings.max_message_bytes),
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),  # clients send keep-alive pings
            ("grpc.so_reuseport", 0),  # a taken port is an error, not a second server
        ],
    )
    names = list(register(server))
    prepare(names)
    health_servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    names.append(health.SERVICE_NAME)
    reflection.enable_server_reflection([*names, reflection.SERVICE_NAME], server)
    address = f"{settings.host}:{settings.port}"
    try:
        port = _bind(server, address, settings)
    except RuntimeError as error:
        raise OSError(f"port: cannot listen on {address}: {error}") from error
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    await server.start()
    for name in ["", *names]:
        await health_servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
    bound = f"{settings.host}:{port}"
    log.info("serving", address=bound)
    if on_started is not None:
        await on_started(bound)
    await stopping.wait()
    log.info("draining", seconds=settings.drain_seconds)
    await health_servicer.enter_graceful_shutdown()
    if on_drain is not None:
        await on_drain()
    await server.stop(settings.drain_seconds)
    log.info("stopped")


def _bind(server: grpc.aio.Server, address: str, settings: ServiceSettings) -> int:
    if settings.tls_certificate is None or settings.tls_key is None:
        return server.add_insecure_port(address)
    pair = (settings.tls_key.read_bytes(), settings.tls_certificate.read_bytes())
    return server.add_secure_port(address, grpc.ssl_server_credentials([pair]))


def run(settings: ServiceSettings, main: Callable[[], Awaitable[None]]) -> None:
    """Runs a service's main coroutine; a bad address or file ends it with status 2 and one line."""
    configure_logging(settings)
    try:
        asyncio.run(_as_coroutine(main))
    except OSError as error:
        print(f"{settings.service}: {error}", file=sys.stderr)
        sys.exit(2)


async def _as_coroutine(main: Callable[[], Awaitable[None]]) -> None:
    await main()
