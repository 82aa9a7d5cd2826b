"""Start-up of a gRPC service: interceptor, health, reflection, limits, TLS, credential, and a drain on SIGTERM."""

from __future__ import annotations

import asyncio
import gc
import signal
import sys
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast

import grpc
import structlog
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from mulligan.common.access import AccessRole, needed_role, role_of_names
from mulligan.common.callers import (
    CHECK_LIMITS,
    WATCH_LIMITS,
    CallerLimits,
    Callers,
    Visit,
    by_address,
    by_certificate,
    by_token,
    current_caller,
)
from mulligan.common.config import ServiceSettings, refuse
from mulligan.common.connections import allowed, kept_free
from mulligan.common.errors import DomainError, Reason, fault, invalid_field
from mulligan.common.extras import how_to_install
from mulligan.common.grpc_server import Server, options
from mulligan.common.health import HealthService
from mulligan.common.logs import configure_logging, log_at_any_level
from mulligan.common.metrics import OTHER, MethodMetrics, exported
from mulligan.common.request_log import PROBES, RequestLog
from mulligan.common.status import to_status
from mulligan.common.tasks import TimeLimit, TooLong
from mulligan.common.tls import Pem, PemFiles
from mulligan.common.tokens import KnownTokens
from mulligan.common.tracing import server_span, stop_tracing
from mulligan.common.validation import FieldViolation, prepare, violations
from mulligan.common.work_threads import WorkThreads

if sys.platform != "win32":
    from uvloop import new_event_loop  # 10% more steps of environments per second than with asyncio's own loop
else:
    new_event_loop = None

log = structlog.get_logger()
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_Answer = TypeVar("_Answer")
_QUICKLY_CHECKED = 2**20  # bytes; a message of many items takes up to 0.4 s per MiB
_CHECKING = WorkThreads(1, "check")
_MOST_PEERS = 16_384  # whose last call is remembered
_MAKE_HANDLER: dict[bool, Any] = {  # key: whether answers are a stream
    False: grpc.stream_unary_rpc_method_handler,
    True: grpc.stream_stream_rpc_method_handler,
}


class _Guarded(NamedTuple):
    """A method as its servicer has it."""

    method: str  # "/package.Service/Call"
    call: Callable[..., Any]
    streams_requests: bool
    streams_answers: bool
    serialize: Callable[[Any], bytes]
    metrics: MethodMetrics | None
    is_traced: bool


class _Received(NamedTuple):
    """A request, or why the bytes are none. (Without this, gRPC would answer UNKNOWN, or end the handler.)"""

    message: Any
    size: int  # bytes
    fault: str = ""


class RequestInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every handler of a server.

    A call passes these steps: the caller's role is compared with the table of `access.py`; the call is counted with
    what its caller uses (`callers.py`); the request is read and validated against the field constraints; the handler
    runs under a deadline, and what it raises becomes a status. A DomainError keeps its code and reason; anything else
    becomes INTERNAL. Each call is a line of the log. Of a call that is refused nothing is read.

    Without `tokens`, everybody may make every call. With `certificates`, callers have certificates that were verified,
    which may give them roles, too. With `metrics`, calls are counted and timed in the registry of `metrics.py`. A
    stream whose caller does not read a message for `write_seconds` is ended.

    For gRPC all handlers stream requests: so it reads them when the handler asks for them.
    """

    def __init__(
        self,
        tokens: KnownTokens | None = None,
        default_deadline: float = 3600.0,
        *,
        certificates: bool = False,
        metrics: bool = False,
        limits: CallerLimits | None = None,
        write_seconds: float = 60.0,
    ):
        self._tokens = tokens
        self._certificates = certificates
        self._count = metrics
        self._own_deadline = TimeLimit(default_deadline)
        self._writing = TimeLimit(write_seconds)
        self.callers = Callers(limits or CallerLimits())
        # The calls that need no credential. What one kind of call uses is not missing to another, such as a container's
        # health check.
        self._open: dict[str, Callers] = {
            "/grpc.health.v1.Health/Check": Callers(CHECK_LIMITS),
            "/grpc.health.v1.Health/Watch": Callers(WATCH_LIMITS),
        }
        self._handlers: dict[str, _Handler] = {}
        self._peers: dict[str, None] = {}  # connections with calls that were admitted; the last one at the end

    def is_used(self, peer: str) -> bool:
        """Whether a caller uses this connection: it made a call that needs a credential, where there are any."""
        return peer in self._peers

    def _use(self, peer: str) -> None:
        self._peers.pop(peer, None)
        self._peers[peer] = None
        if len(self._peers) > _MOST_PEERS:
            del self._peers[next(iter(self._peers))]

    @property
    def open_calls(self) -> set[str]:
        """Those that need no credential."""
        return set(self._open)

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
            self._handlers[method] = self._guard(method, handler)
        return self._handlers[method]

    def _guard(self, method: str, handler: _Handler) -> _Handler:
        counted = self._count and not method.startswith(PROBES)
        call: Any = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        serialize: Any = handler.response_serializer
        guarded = _Guarded(
            method,
            call,
            handler.request_streaming,
            handler.response_streaming,
            serialize,
            MethodMetrics(method.lstrip("/")) if counted else None,
            not method.startswith(PROBES),
        )
        answers = self._stream if handler.response_streaming else self._unary
        made: _Handler = _MAKE_HANDLER[handler.response_streaming](
            answers(guarded), _reader(handler.request_deserializer), None
        )
        return made

    def _admit(self, guarded: _Guarded, context: _Context) -> Visit:
        """Raises the DomainError that refuses the call."""
        needed = needed_role(guarded.method)
        if needed is None:
            visit = Visit(self._open[guarded.method], by_address(context.peer()), guarded.streams_requests)
        else:
            key = self._identify(guarded.method, needed, context)
            self._use(context.peer())
            current_caller.set(key)
            visit = Visit(self.callers, key, guarded.streams_requests)
        context.add_done_callback(lambda _: visit.end())  # type: ignore[arg-type]  # its type is a protocol with a name
        return visit

    def _identify(self, method: str, needed: AccessRole, context: _Context) -> str:
        """The caller's key, if it may make the call."""
        if self._tokens is None:
            return by_address(context.peer())
        certified = None
        key = ""
        if self._certificates:
            certificate = context.auth_context()
            names = certificate.get("x509_subject_alternative_name", ())
            certified = role_of_names(name.decode(errors="replace") for name in names)
            key = by_certificate(b"".join(certificate.get("x509_pem_cert", ())))
        authorization = str(dict(context.invocation_metadata() or ()).get("authorization", ""))
        role = self._tokens.role_of(authorization)
        if role is None or (certified is not None and certified.includes(role)):
            role = certified
        else:
            key = by_token(authorization)
        call = method.lstrip("/")
        if role is None:
            raise DomainError(
                Reason.BAD_CREDENTIAL, f"{call} needs a token of this server, as `authorization: Bearer TOKEN`"
            )
        if not role.includes(needed):
            raise DomainError(
                Reason.INSUFFICIENT_ROLE,
                f"{call} needs the role {needed}; the caller's is {role}",
                role=role,
                needed_role=needed,
            )
        return key

    def _unary(self, guarded: _Guarded) -> Callable[..., Awaitable[bytes]]:
        """A handler with one answer, to one request or a stream."""

        async def handle(requests: AsyncIterable[_Received], context: _Context) -> bytes:
            async def answer(visit: Visit) -> bytes:
                request = await self._request(guarded, requests, context, visit, logged)
                response = await guarded.call(request, context)
                serialized = guarded.serialize(response)
                visit.hold(len(serialized))
                return serialized

            with RequestLog(guarded.method, metrics=guarded.metrics) as logged:
                return await self._answer(guarded, answer, context, logged)

        return handle

    def _stream(self, guarded: _Guarded) -> Callable[..., Awaitable[None]]:
        async def handle(requests: AsyncIterable[_Received], context: _Context) -> None:
            async def answer(visit: Visit) -> None:
                request = await self._request(guarded, requests, context, visit, logged)
                begun = False
                async with aclosing(guarded.call(request, context)) as responses:
                    async for response in responses:
                        if not begun:  # without it no status could follow a write that fails
                            begun = True
                            await context.send_initial_metadata(())
                        await self._write(guarded.serialize(response), context)

            with RequestLog(guarded.method, metrics=guarded.metrics) as logged:
                await self._answer(guarded, answer, context, logged)

        return handle

    async def _request(
        self, guarded: _Guarded, requests: AsyncIterable[_Received], context: _Context, visit: Visit, logged: RequestLog
    ) -> Any:
        """The checked request, or the stream of them."""
        if guarded.streams_requests:
            return _checked_stream(visit.receive_stream(requests))
        received = await visit.receive(context.read)
        if received is grpc.aio.EOF:
            raise DomainError(Reason.MALFORMED_MESSAGE, "the call has no request")
        visit.take(received.size)
        logged.request = received.message
        return await _checked(received)

    async def _write(self, serialized: bytes, context: _Context) -> None:
        try:
            await self._writing.within(context.write(serialized))
        except TooLong:
            message = f"the caller did not read the answer for {self._writing.seconds:g} s"
            raise DomainError(Reason.CALLER_LIMIT, message, limit="write_seconds") from None

    async def _answer(
        self,
        guarded: _Guarded,
        answer: Callable[[Visit], Awaitable[_Answer]],
        context: _Context,
        logged: RequestLog,
    ) -> _Answer:
        try:
            visit = self._admit(guarded, context)
            if guarded.is_traced:
                logged.span = server_span(guarded.method.lstrip("/"), context.invocation_metadata()).begin()
            if guarded.streams_answers or context.time_remaining() is not None:
                return await answer(visit)  # gRPC cancels a call whose caller's deadline has passed
            return await self._own_deadline.within(answer(visit))
        except DomainError as error:
            logged.failed(error)
            await context.abort_with_status(to_status(error))
        except (
            grpc.aio.AbortError,
            grpc.aio.InternalError,
        ):  # the health service has no such part; the caller has gone
            raise
        except TooLong:
            logged.timed_out()
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "the server's default deadline passed")
        except Exception as error:  # noqa: BLE001 - not declared: INTERNAL
            if context.code() is grpc.StatusCode.UNIMPLEMENTED:  # set by a generated base class, which then raises
                logged.unimplemented()
                await context.abort(grpc.StatusCode.UNIMPLEMENTED, context.details())
            logged.broke(error)
            await context.abort(grpc.StatusCode.INTERNAL, fault(error))
        raise AssertionError("abort raises")


def _reader(deserialize: Any) -> Callable[[bytes], _Received]:
    def read(serialized: bytes) -> _Received:
        try:
            return _Received(deserialize(serialized), len(serialized))
        except Exception as error:  # noqa: BLE001 - protobuf's implementations raise different ones
            return _Received(None, len(serialized), str(error) or type(error).__name__)

    return read


async def _checked(received: _Received) -> Any:
    """The message. Large ones are checked on a thread, one at a time: many items take seconds, and others go on."""
    message = _parsed(received)
    if received.size <= _QUICKLY_CHECKED:
        return _valid(message, violations(message))
    return _valid(message, await _CHECKING.run(partial(violations, message)))


async def _checked_stream(requests: AsyncIterable[_Received]) -> AsyncIterator[Any]:
    """Each is checked at once: the messages of uploads have few items, and must not wait behind others."""
    async for received in requests:
        message = _parsed(received)
        yield _valid(message, violations(message))


def _parsed(received: _Received) -> Any:
    if received.fault:
        raise DomainError(
            Reason.MALFORMED_MESSAGE, f"the bytes cannot be parsed as a message of this call: {received.fault}"
        )
    return received.message


def _valid(message: Any, found: Sequence[FieldViolation]) -> Any:
    for violation in found:
        raise invalid_field(violation.field, violation.expected)
    return message


def add_standard_services(
    server: grpc.aio.Server, names: Sequence[str], health_of_parts: Callable[[], Mapping[str, bool]] = dict
) -> HealthService:
    """Those that every server has: health, and reflection of the services with these full names."""
    health_servicer = HealthService(health_of_parts)
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
    server, interceptor = _server(settings)
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
    with exported(settings), kept_free(port, allowed(settings.max_connections), interceptor.is_used):
        await server.start()
        # "" always is SERVING: liveness probes ask for it, and restarting this service would not repair an engine that
        # runs elsewhere.
        health_servicer.serves("", *names)
        watching = asyncio.create_task(health_servicer.watch())
        try:
            bound = f"{settings.host}:{port}"
            log_at_any_level("serving", address=bound)  # the only place that shows the chosen port
            if on_started is not None:
                await on_started(bound)
            await stopping.wait()
            log.info("draining", seconds=settings.drain_seconds)
            health_servicer.stop()
            if on_drain is not None:
                await on_drain()
            await server.stop(settings.drain_seconds)
        finally:
            watching.cancel()
            await server.stop(None)
    log.info("stopped")


def _server(settings: ServiceSettings) -> tuple[grpc.aio.Server, RequestInterceptor]:
    interceptor = RequestInterceptor(
        settings.tokens,
        settings.default_deadline_seconds,
        certificates=settings.tls_client_ca is not None,
        metrics=settings.metrics_port >= 0,
        limits=settings.caller_limits,
        write_seconds=settings.write_seconds,
    )
    unknown = MethodMetrics(OTHER) if settings.metrics_port >= 0 else None
    return cast(grpc.aio.Server, Server([interceptor], options(settings), unknown)), interceptor


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
    _configure_tracing(settings)
    for text in settings.warnings:
        log.warning(text)
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
    finally:
        stop_tracing()


def _configure_tracing(settings: ServiceSettings) -> None:
    """Without the packages, a setting is refused; a variable, which may be meant for other programs, is not."""
    if not settings.traces_to:
        return
    try:
        from mulligan.common.otlp import export_traces
    except ImportError as error:
        problem = f"traces need the extra 'otel' ({error}): {how_to_install('otel')}"
        if settings.otlp_endpoint:
            refuse(settings.service, f"otlp_endpoint: {problem}")
        log.warning("no traces", cause=problem)
        return
    try:
        export_traces(settings)
    except ValueError as error:
        refuse(settings.service, f"variables of OpenTelemetry, OTEL_…: {error}")


async def _as_coroutine(main: Callable[[], Awaitable[None]]) -> None:
    await main()
