"""Traces, by OpenTelemetry: spans of this process, and the context of a trace on its way through calls.

Off unless the settings of a service, or a variable of OpenTelemetry, name a collector. While off, nothing of
OpenTelemetry is imported, and each function returns `NO_SPAN` or nothing. docs/observability.md lists the spans.

A span that begins a trace, such as a run's step, is the root of what belongs to it. Calls that carry the requests of
several spans (`Origin`) are children of their root, and are linked with each.

Attributes are ids and numbers. Prompts, texts and credentials are never among them, and of an error only its type is.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from contextvars import Context, copy_context
from types import TracebackType
from typing import Any, NamedTuple, Protocol

from mulligan.common.text import bounded

ID_LENGTH = 128  # characters of an attribute
_END_SECONDS = 3.0  # for what is not exported yet when a service ends
_ROOT = "mulligan-root"  # key of OpenTelemetry's context: the root's span context
_SERVER_FAULTS = ("UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS")
_CARRIED = ("traceparent", "tracestate")
_Metadata = tuple[tuple[str, str], ...]


class Origin(NamedTuple):
    """A span whose request goes along in a call with others, and the root of its trace."""

    span: Any
    root: Any


class Span(Protocol):
    """A span. As a context manager it is the current one during the block, and ends with it."""

    def __enter__(self) -> Span: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def set(self, **attributes: str | float) -> None:
        """Ids and numbers alone."""

    def carried(self, metadata: _Metadata | None) -> _Metadata | None:
        """The metadata of a call that is made in this span."""

    def begin(self) -> Span:
        """Makes it the current span of this task, until the task ends."""

    def end(self, status: str = "") -> None:
        """`status` is gRPC's, of a call."""


class _NoSpan:
    """Of a trace that is not recorded because tracing is off."""

    def __enter__(self) -> _NoSpan:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def set(self, **attributes: str | float) -> None:
        pass

    def carried(self, metadata: _Metadata | None) -> _Metadata | None:
        return metadata

    def begin(self) -> _NoSpan:
        return self

    def end(self, status: str = "") -> None:
        pass


NO_SPAN = _NoSpan()


class _Unrecorded(_NoSpan):
    """A call in a trace that is not recorded: nothing is done for it, but the next service hears so."""

    def __init__(self, carried: _Metadata):
        self._carried = carried

    def carried(self, metadata: _Metadata | None) -> _Metadata | None:
        return (*(metadata or ()), *self._carried)


class _Recorder:
    """What is imported while tracing is on."""

    def __init__(self, tracer: Any, close: Any):
        from opentelemetry import context, trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self.tracer = tracer
        self.close = close
        self.trace = trace
        self.context = context
        self.propagator = TraceContextTextMapPropagator()

    def start(
        self, name: str, kind: str, parent: Any, attributes: Mapping[str, str | float], links: Sequence[Any] = ()
    ) -> Any:
        return self.tracer.start_span(name, parent, self.trace.SpanKind[kind], attributes, links)

    def unrecorded(self, context: Any = None) -> Any:
        """The span of a context, if it has one whose trace is not recorded: nothing below it is, either."""
        found = self.trace.get_current_span(context)
        known = found.get_span_context()
        return found if known.is_valid and not known.trace_flags.sampled else None

    def carrier(self, context: Any) -> _Metadata:
        """What goes along with a call."""
        carrier: dict[str, str] = {}
        self.propagator.inject(carrier, context)
        return tuple(carrier.items())

    def parent_of(self, origins: Sequence[Origin]) -> Any:
        """The context in which a call with the requests of these spans is made: a new trace if they have no root in
        common."""
        if len(origins) == 1:
            return self.trace.set_span_in_context(origins[0].span, self.context.Context())
        roots = {origin.root.span_id: origin.root for origin in origins if origin.root is not None}
        if len(roots) != 1 or any(origin.root is None for origin in origins):
            return self.context.Context()
        (root,) = roots.values()
        return self.trace.set_span_in_context(self.trace.NonRecordingSpan(root), self.context.Context())


_recorder: _Recorder | None = None


class _OpenSpan:
    """Of OpenTelemetry, in this process."""

    __slots__ = ("_context", "_is_server", "_recorder", "_span", "_token")

    def __init__(self, recorder: _Recorder, span: Any, context: Any, *, is_server: bool = False):
        self._recorder = recorder
        self._span = span
        self._context = context  # in which it is the current span
        self._is_server = is_server
        self._token: Any = None

    def __enter__(self) -> _OpenSpan:
        self._token = self._recorder.context.attach(self._context)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._recorder.context.detach(self._token)
        if isinstance(error, Exception):  # a cancellation is no error
            self._fail(type(error).__name__)
        self._span.end()

    def set(self, **attributes: str | float) -> None:
        self._span.set_attributes(_named(attributes))

    def carried(self, metadata: _Metadata | None) -> _Metadata:
        return (*(metadata or ()), *self._recorder.carrier(self._context))

    def begin(self) -> _OpenSpan:
        self._recorder.context.attach(self._context)
        return self

    def end(self, status: str = "") -> None:
        if status and self._span.is_recording():
            self._span.set_attribute("rpc.response.status_code", status)
            if status in _SERVER_FAULTS or (status not in ("OK", "CANCELLED") and not self._is_server):
                self._fail(status)
        self._span.end()

    def _fail(self, kind: str) -> None:
        self._span.set_attribute("error.type", kind)
        self._span.set_status(self._recorder.trace.StatusCode.ERROR)


class _Step(_OpenSpan):
    """A root that stays open between the blocks in which it is current."""

    __slots__ = ()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._recorder.context.detach(self._token)
        if isinstance(error, Exception):
            self._fail(type(error).__name__)


def is_on() -> bool:
    return _recorder is not None


def span(name: str, **attributes: str | float) -> Span:
    """A part of the current span. Attributes are ids and numbers, such as `run_id=…`."""
    if (recorder := _recorder) is None or recorder.unrecorded() is not None:
        return NO_SPAN
    found = recorder.start(name, "INTERNAL", None, _named(attributes))
    return _OpenSpan(recorder, found, recorder.trace.set_span_in_context(found))


def root_span(name: str, **attributes: str | float) -> Span:
    """The root of a trace of its own. It is the current span during each block that it is entered for, and ends with
    `end`."""
    if (recorder := _recorder) is None:
        return NO_SPAN
    empty = recorder.context.Context()
    found = recorder.start(name, "INTERNAL", empty, _named(attributes))
    return _Step(recorder, found, _rooted(recorder, found, empty))


def client_span(method: str, address: str, origins: Sequence[Origin] = ()) -> Span:
    """Of one call to a server, with all its tries. It is never the current span. `method` is "package.Service/Call"."""
    if (recorder := _recorder) is None:
        return NO_SPAN
    parent = recorder.parent_of(origins) if origins else None
    if recorder.unrecorded(parent) is not None:
        return _Unrecorded(recorder.carrier(parent))
    host, _, port = address.rpartition(":")
    attributes: dict[str, str | float] = {"rpc.system.name": "grpc", "rpc.method": method, "server.address": host}
    if port.isdecimal():
        attributes["server.port"] = int(port)
    links: list[Any] = []
    if len(origins) > 1:
        attributes["mulligan.batch_size"] = len(origins)
        links = [recorder.trace.Link(origin.span.get_span_context()) for origin in origins]
    found = recorder.start(method, "CLIENT", parent, attributes, links)
    return _OpenSpan(recorder, found, recorder.trace.set_span_in_context(found, parent))


def server_span(method: str, metadata: Iterable[tuple[str, Any]] | None) -> Span:
    """Of one call that was admitted, in the trace that its metadata name."""
    if (recorder := _recorder) is None:
        return NO_SPAN
    carrier = {key: value for key, value in metadata or () if key in _CARRIED and isinstance(value, str)}
    parent = recorder.propagator.extract(carrier, recorder.context.Context())
    if (unrecorded := recorder.unrecorded(parent)) is not None:
        return _OpenSpan(recorder, unrecorded, _rooted(recorder, unrecorded, parent), is_server=True)
    found = recorder.start(method, "SERVER", parent, {"rpc.system.name": "grpc", "rpc.method": method})
    return _OpenSpan(recorder, found, _rooted(recorder, found, parent), is_server=True)


def origin() -> Origin | None:
    """The current span, for a call that other spans' requests share; None while tracing is off or it has none."""
    if (recorder := _recorder) is None:
        return None
    found = recorder.trace.get_current_span()
    if not found.get_span_context().is_valid:
        return None
    return Origin(found, recorder.context.get_value(_ROOT))


def untraced() -> Context:
    """For a task that outlives the span it is started in: the context of now, without that span."""
    found = copy_context()
    if (recorder := _recorder) is not None:
        found.run(recorder.context.attach, recorder.context.Context())
    return found


def headers() -> dict[str, str]:
    """HTTP headers that carry the current span to another program; empty while tracing is off."""
    carrier: dict[str, str] = {}
    if (recorder := _recorder) is not None:
        recorder.propagator.inject(carrier)
    return carrier


def log_ids() -> dict[str, str]:
    """What a log line says of the current span; empty if there is none."""
    if (recorder := _recorder) is None:
        return {}
    found = recorder.trace.get_current_span().get_span_context()
    if not found.is_valid:
        return {}
    return {"trace_id": f"{found.trace_id:032x}", "span_id": f"{found.span_id:016x}"}


def start_tracing(tracer: Any, close: Any) -> None:
    """From now on spans are recorded by this tracer of OpenTelemetry. `close` exports the last ones."""
    global _recorder  # noqa: PLW0603 - one for the process, as its log
    _recorder = _Recorder(tracer, close)


def stop_tracing() -> None:
    """Exports what is left, for a few seconds at most."""
    global _recorder
    recorder, _recorder = _recorder, None
    if recorder is not None:
        closing = threading.Thread(target=_closed, args=(recorder.close,), daemon=True)
        closing.start()
        closing.join(_END_SECONDS)


def _closed(close: Any) -> None:
    with suppress(Exception):  # of the exporter: the process ends anyway
        close()


def _rooted(recorder: _Recorder, found: Any, context: Any) -> Any:
    rooted = recorder.context.set_value(_ROOT, found.get_span_context(), context)
    return recorder.trace.set_span_in_context(found, rooted)


def _named(attributes: Mapping[str, str | float]) -> dict[str, str | float]:
    return {
        f"mulligan.{name}": bounded(value, ID_LENGTH) if isinstance(value, str) else value
        for name, value in attributes.items()
    }
