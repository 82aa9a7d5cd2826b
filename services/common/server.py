"""Start-up of a gRPC service: interceptor, health, reflection, limits, TLS, credential, and a drain on SIGTERM."""

from __future__ import annotations

import asyncio
import gc
import inspect
import signal
import sys
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, TypeAlias

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from mulligan.common.access import AccessRole, needed_role, role_of_names
from mulligan.common.config import ServiceSettings
from mulligan.common.errors import DomainError, Reason, invalid_field
from mulligan.common.logs import configure_logging, log_at_any_level
from mulligan.common.metrics import MethodMetrics, exported
from mulligan.common.request_log import PROBES, RequestLog
from mulligan.common.status import fault, to_status
from mulligan.common.tls import Pem, PemFiles
from mulligan.common.tokens import KnownTokens
from mulligan.common.validation import prepare, violations

if sys.platform != "win32":
    from uvloop import new_event_loop  # 10% more steps of environments per second than with asyncio's own loop
else:
    new_event_loop = None

log = structlog.get_logger()
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_Check: TypeAlias = Callable[[Any], Any]  # validates a request, or each request of a stream
_MAKE_HANDLER: dict[tuple[bool, bool], Any] = {  # key: (requests are a stream, answers are a stream)
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}
_PENDING_CALLS = 65_536
_HEALTH_SECONDS = 0.5  # between two looks at the health of a service's parts


class RequestInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every handler of a server.

    A call passes these steps: the caller's role is compared with the table of `access.py`, the request is read and
    validated against the field constraints, the handler runs under a deadline, and what it raises becomes a status. A
    DomainError keeps its code and reason; anything else becomes INTERNAL. Each call is a line of the log. Of a call
    whose caller identified itself in no way nothing is read.

    Without `tokens`, everybody may make every call. With `certificates`, callers have certificates that were verified,
    which may give them roles, too. With `metrics`, calls are counted and timed in the registry of `metrics.py`.
    """

    def __init__(
        self,
        tokens: KnownTokens | None = None,
        default_deadline: float = 3600.0,
        *,
        certificates: bool = False,
        metrics: bool = False,
    ):
        self._tokens = tokens
        self._certificates = certificates
        self._count = metrics
        self._default_deadline = default_deadline  # seconds
        self._handlers: dict[str, _Handler] = {}
        self._metrics: dict[str, MethodMetrics | None] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        method = handler_call_details.method
        if method not in self._handlers:
            handler = await continuation(handler_call_details)
            if handler is None:  # not cached: clients may ask for any number of unknown methods
                return None
            counted = self._count and not method.startswith(PROBES)
            self._metrics[method] = MethodMetrics(method.lstrip("/")) if counted else None
            self._handlers[method] = self._guard(method, handler)
        if self._certificates:  # only the handler's context knows them
            return self._handlers[method]
        refusal = self._refusal(method, handler_call_details.invocation_metadata)
        return self._handlers[method] if refusal is None else _refusing(method, refusal, self._metrics[method])

    def _guard(self, method: str, handler: _Handler) -> _Handler:
        metrics = self._metrics[method]
        call: Any = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        checked = _checked_stream if handler.request_streaming else _checked
        answers = self._stream if handler.response_streaming else self._unary
        guarded: _Handler = _MAKE_HANDLER[handler.request_streaming, handler.response_streaming](
            answers(method, call, checked, metrics), _reader(handler.request_deserializer), handler.response_serializer
        )
        return guarded

    def _refusal(self, method: str, metadata: Any, certified: AccessRole | None = None) -> DomainError | None:
        """Why the caller may not make the call; None if it may. `certified` is the role of its certificate."""
        needed = needed_role(method)
        if self._tokens is None or needed is None:
            return None
        role = self._tokens.role_of(str(dict(metadata or ()).get("authorization", "")))
        if role is None or (certified is not None and certified.includes(role)):
            role = certified
        call = method.lstrip("/")
        if role is None:
            return DomainError(
                Reason.BAD_CREDENTIAL, f"{call} needs a token of this server, as `authorization: Bearer TOKEN`"
            )
        if not role.includes(needed):
            return DomainError(
                Reason.INSUFFICIENT_ROLE,
                f"{call} needs the role {needed}; the caller's is {role}",
                role=role,
                needed_role=needed,
            )
        return None

    def _check_certificate(self, method: str, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """Where callers have certificates: raises the DomainError that refuses the call."""
        if not self._certificates or needed_role(method) is None:
            return
        names = context.auth_context().get("x509_subject_alternative_name", ())
        certified = role_of_names(name.decode(errors="replace") for name in names)
        refusal = self._refusal(method, context.invocation_metadata(), certified)
        if refusal is not None:
            raise refusal

    def _unary(
        self, method: str, call: Callable[..., Awaitable[Any]], checked: _Check, metrics: MethodMetrics | None
    ) -> Callable[..., Awaitable[Any]]:
        """A handler with one answer, to one request or a stream."""

        async def handle(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            async def answer() -> Any:
                self._check_certificate(method, context)
                return await call(checked(request), context)

            with RequestLog(method, request, metrics) as logged:
                return await self._answer(answer, context, logged)

        return handle

    async def _answer(
        self, answer: Callable[[], Awaitable[Any]], context: grpc.aio.ServicerContext[Any, Any], logged: RequestLog
    ) -> Any:
        try:
            # gRPC cancels a call whose caller's deadline has passed.
            own = None if context.time_remaining() is not None else self._default_deadline
            async with asyncio.timeout(own) as limit:
                return await answer()
        except DomainError as error:
            logged.failed(error)
            await context.abort_with_status(to_status(error))
        except grpc.aio.AbortError:  # from the health service: it has no such part
            raise
        except Exception as error:  # noqa: BLE001 - not declared: INTERNAL
            if isinstance(error, TimeoutError) and limit.expired():
                logged.timed_out()
                await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "the server's default deadline passed")
            if context.code() is grpc.StatusCode.UNIMPLEMENTED:  # set by a generated base class, which then raises
                logged.unimplemented()
                await context.abort(grpc.StatusCode.UNIMPLEMENTED, context.details())
            logged.broke(error)
            await context.abort(grpc.StatusCode.INTERNAL, fault(error))

    def _stream(
        self, method: str, call: Callable[..., Any], checked: _Check, metrics: MethodMetrics | None
    ) -> Callable[..., AsyncIterator[Any]]:
        async def handle(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            with RequestLog(method, request, metrics) as logged:
                try:
                    self._check_certificate(method, context)
                    responses = call(checked(request), context)
                    if inspect.isawaitable(responses):  # the health service writes its answers itself
                        await responses
                        return
                    async with aclosing(responses):
                        async for response in responses:
                            yield response
                except DomainError as error:
                    logged.failed(error)
                    await context.abort_with_status(to_status(error))
                except grpc.aio.AbortError:
                    raise
                except Exception as error:  # noqa: BLE001 - not declared: INTERNAL
                    logged.broke(error)
                    await context.abort(grpc.StatusCode.INTERNAL, fault(error))

        return handle


def _refusing(method: str, refusal: DomainError, metrics: MethodMetrics | None) -> _Handler:
    """Answers any kind of call, and reads no request."""

    async def refuse(requests: AsyncIterable[Any], context: grpc.aio.ServicerContext[Any, Any]) -> None:
        with RequestLog(method, None, metrics) as logged:
            logged.failed(refusal)
            await context.abort_with_status(to_status(refusal))

    handler: _Handler = _MAKE_HANDLER[True, True](refuse)
    return handler


class _Malformed:
    """Stands for a request that cannot be parsed. `cause` is the parser's message. Without it, gRPC would answer
    UNKNOWN, or end the handler."""

    def __init__(self, cause: str):
        self.cause = cause


def _reader(deserialize: Any) -> Callable[[bytes], Any]:
    def read(serialized: bytes) -> Any:
        try:
            return deserialize(serialized)
        except Exception as error:  # noqa: BLE001 - protobuf's implementations raise different ones
            return _Malformed(str(error))

    return read


def _checked(request: Any) -> Any:
    if isinstance(request, _Malformed):
        raise DomainError(
            Reason.MALFORMED_MESSAGE, f"the bytes cannot be parsed as a message of this call: {request.cause}"
        )
    for violation in violations(request):
        raise invalid_field(violation.field, violation.expected)
    return request


async def _checked_stream(requests: AsyncIterable[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _checked(request)


class _Health(health.aio.HealthServicer):
    """The standard health service. `observe` returns whether each service or part serves, by name. It is called for
    each check, and periodically for watchers."""

    def __init__(self, observe: Callable[[], Mapping[str, bool]]):
        super().__init__()
        self._observe = observe
        self._reported: dict[str, bool] = {}

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802 - as in the contract
        await self.refresh()
        return await super().Check(request, context)

    async def refresh(self) -> None:
        present = dict(self._observe())
        status = health_pb2.HealthCheckResponse
        for name in self._reported.keys() - present.keys():
            await self.set(name, status.SERVICE_UNKNOWN)
        for name, serving in present.items():
            if self._reported.get(name) != serving:
                await self.set(name, status.SERVING if serving else status.NOT_SERVING)
        self._reported = present

    async def watch(self) -> None:
        while True:
            await self.refresh()
            await asyncio.sleep(_HEALTH_SECONDS)


def add_standard_services(
    server: grpc.aio.Server, names: Sequence[str], health_of_parts: Callable[[], Mapping[str, bool]] = dict
) -> _Health:
    """Those that every server has: health, and reflection of the services with these full names."""
    health_servicer = _Health(health_of_parts)
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
    return health_servicer


async def serve(
    settings: ServiceSettings,
    register: Callable[[grpc.aio.Server], Sequence[str]],
    *,
    health_of_parts: Callable[[], Mapping[str, bool]] = dict,
    on_drain: Callable[[], Awaitable[None]] | None = None,
    on_started: Callable[[str], Awaitable[None]] | None = None,
    own_address: str = "",
) -> None:
    """Serves until SIGTERM or SIGINT, then lets calls in flight finish.

    `register` adds servicers and returns their full names. `on_started` gets the bound address once calls are served.
    `on_drain` runs when the drain begins, before calls in flight are waited for. `health_of_parts` returns whether each
    part serves, by name; it must be cheap. `own_address` is a further one, without TLS, for calls of this process.
    Raises OSError when an address is taken, and BadTls for bad certificates.
    """
    server = _server(settings)
    names = list(register(server))
    prepare(names)
    health_servicer = add_standard_services(server, names, health_of_parts)
    names.append(health.SERVICE_NAME)
    address = f"{settings.host}:{settings.port}"
    try:
        port = _bind(server, address, settings)
        if own_address:
            server.add_insecure_port(own_address)
    except RuntimeError as error:
        raise OSError(f"port: cannot listen on {address}: {error}") from error
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    with exported(settings):
        await server.start()
        # "" always is SERVING: liveness probes ask for it, and restarting this service would not repair an engine that
        # runs elsewhere.
        for name in ["", *names]:
            await health_servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
        watching = asyncio.create_task(health_servicer.watch())
        try:
            bound = f"{settings.host}:{port}"
            log_at_any_level("serving", address=bound)  # the only place that shows the chosen port
            if on_started is not None:
                await on_started(bound)
            await stopping.wait()
            log.info("draining", seconds=settings.drain_seconds)
            await health_servicer.enter_graceful_shutdown()
            if on_drain is not None:
                await on_drain()
            await server.stop(settings.drain_seconds)
        finally:
            watching.cancel()
            await server.stop(None)
    log.info("stopped")


def _server(settings: ServiceSettings) -> grpc.aio.Server:
    interceptor = RequestInterceptor(
        settings.tokens,
        settings.default_deadline_seconds,
        certificates=settings.tls_client_ca is not None,
        metrics=settings.metrics_port >= 0,
    )
    return grpc.aio.server(
        interceptors=[interceptor],
        options=[
            ("grpc.max_send_message_length", settings.max_message_bytes),
            ("grpc.max_receive_message_length", settings.max_message_bytes),
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),  # for the keep-alive pings of clients
            ("grpc.so_reuseport", 0),  # a port that is taken raises an error; two servers never share one
            # Calls that wait for the event loop. By default gRPC cancels random ones above 1,000.
            ("grpc.server.max_pending_requests", _PENDING_CALLS),
            ("grpc.server.max_pending_requests_hard_limit", _PENDING_CALLS),
        ],
    )


def _bind(server: grpc.aio.Server, address: str, settings: ServiceSettings) -> int:
    if settings.tls_certificate is None:
        return server.add_insecure_port(address)
    return server.add_secure_port(address, _credentials(settings))


def _credentials(settings: ServiceSettings) -> grpc.ServerCredentials:
    """Each new connection gets the certificate that the files hold then. With `tls_client_ca` it has to have one, too.

    https://grpc.github.io/grpc/python/grpc.html#grpc.dynamic_ssl_server_credentials
    """
    files = PemFiles(settings.tls_client_ca, settings.tls_certificate, settings.tls_key)
    used = files.content

    def configuration(pem: Pem) -> grpc.ServerCertificateConfiguration:
        assert pem.key is not None and pem.cert is not None, "the settings have both"
        return grpc.ssl_server_certificate_configuration([(pem.key, pem.cert)], pem.ca)

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        """None: as before."""
        nonlocal used
        now = files.content
        if now is used:
            return None
        used = now
        return configuration(now)

    return grpc.dynamic_ssl_server_credentials(
        configuration(used),
        fetch,  # type: ignore[arg-type]  # its type leaves None out
        require_client_authentication=settings.tls_client_ca is not None,
    )


def run(settings: ServiceSettings, main: Callable[[], Awaitable[None]]) -> None:
    """Runs the main coroutine of a service. On an OSError, such as a taken port, it prints one line and exits with
    status 2."""
    configure_logging(settings)
    # The garbage collector would scan what is kept and all loaded modules again and again: a quarter of the cost of an
    # environment's step.
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
    try:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(_as_coroutine(main))
    except OSError as error:
        print(f"{settings.service}: {error}", file=sys.stderr)
        sys.exit(2)


async def _as_coroutine(main: Callable[[], Awaitable[None]]) -> None:
    await main()
