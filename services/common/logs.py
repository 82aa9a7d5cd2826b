"""The log of a service: one line on stderr per event. Logging never raises, and lines have a maximum length. What
libraries log through Python's `logging`, from WARNING on, is a part of it.

A value is cut at VALUE_LIMIT characters, a traceback at TRACEBACK_LIMIT, counted in their JSON form. A line may fail to
be written: the disk is full, nobody reads the pipe, a value cannot be formatted. `mulligan_log_lines_lost_total` counts
such lines, and the next line that can be written is followed by one with their number.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from collections.abc import MutableMapping
from typing import Any

import structlog
from prometheus_client import Counter

from mulligan.common.config import ServiceSettings
from mulligan.common.metrics import REGISTRY
from mulligan.common.rate import TokenBucket
from mulligan.common.status import CALL_ENDED
from mulligan.common.text import bounded, one_line, safe
from mulligan.common.tracing import log_ids

VALUE_LIMIT = 1_000
TRACEBACK_LIMIT = 8_000
LINE_LIMIT = 32_768
_LEVELS = (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL)
_LINES_LOST = Counter("mulligan_log_lines_lost", "Log lines that could not be written.", registry=REGISTRY)


def configure_logging(settings: ServiceSettings) -> None:
    if sys.stderr is None:  # closed at start; reserve its descriptor, or another file would get it
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - open for the life of the process
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
            _add_trace,
            _cut_values,
            *([] if settings.log_format == "json" else [_escape_values]),
            renderer,
        ],
        wrapper_class=_from_level(settings.log_level),
        logger_factory=_Stderr,
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(service=settings.service)
    logging.basicConfig(handlers=[_FromLibraries()], level=logging.WARNING, force=True)


class Throttle:
    """Bounds lines that anybody can cause: `burst` at once, and after them so many per second."""

    def __init__(self, per_second: float = 10.0, burst: int = 100):
        self._lines = TokenBucket(per_second, burst)
        self._left_out = 0

    def admits(self) -> bool:
        """Whether a line may be written; counts it if not."""
        admitted = self._lines.take()
        self._left_out += not admitted
        return admitted

    def left_out(self) -> dict[str, int]:
        """For the next line: how many were left out before it, if any."""
        found, self._left_out = self._left_out, 0
        return {"left_out": found} if found else {}


class _FromLibraries(logging.Handler):
    """Writes what libraries log through Python's `logging`, such as gRPC and asyncio, as events of this log.

    A call that ended with its server or its caller is written at level debug: gRPC logs an error. Of what gRPC says of
    callers' bytes, lines are left out where there are too many.
    """

    def __init__(self) -> None:
        super().__init__()
        self._throttle = Throttle()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            event = record.getMessage()
        except Exception as error:  # noqa: BLE001 - the arguments are foreign
            event = f"a line that cannot be formatted: {type(error).__name__}"
        level = max((level for level in _LEVELS if level <= record.levelno), default=logging.DEBUG)
        if record.exc_info is not None and isinstance(record.exc_info[1], CALL_ENDED):
            level = logging.DEBUG
        log = structlog.get_logger()
        if log.is_enabled_for(level) and (not record.name.startswith("grpc") or self._throttle.admits()):
            left_out = self._throttle.left_out()
            log.log(level, event, logger=record.name, exc_info=record.exc_info or None, **left_out)


def log_at_any_level(event: str, **values: Any) -> None:
    """Logs an event regardless of `log_level`."""
    structlog.wrap_logger(_Stderr(), wrapper_class=_from_level("debug")).info(event, **values)


class _Lost:
    """Number and cause of the lines lost since the last line that was written."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lines = 0
        self._cause = ""

    def add(self, lines: int, cause: str) -> None:
        with self._lock:
            self._lines = self._lines + lines
            self._cause = cause

    def take(self) -> tuple[int, str]:
        with self._lock:
            found = self._lines
            self._lines = 0
            return found, self._cause


_lost = _Lost()


class _Unfailing(structlog.BoundLoggerBase):
    """Mixin of loggers: all their methods call `_proxy_to_logger`, which here never raises."""

    def _proxy_to_logger(self, method_name: str, event: str | None = None, **event_kw: Any) -> None:
        try:
            super()._proxy_to_logger(method_name, event, **event_kw)
        except Exception as error:  # noqa: BLE001 - the caller must not fail because of its log
            _LINES_LOST.inc()
            _lost.add(1, f"{type(error).__name__}: {error}")
            return
        lines, cause = _lost.take()
        if lines:
            try:
                super()._proxy_to_logger("warning", "log lines were lost", lines=lines, cause=cause)
            except Exception:  # noqa: BLE001 - reported after a later line
                _lost.add(lines, cause)


def _from_level(name: str) -> Any:
    """A logger class that drops events below the level."""
    filtering = structlog.make_filtering_bound_logger(getattr(logging, name.upper()))
    return type("UnfailingLogger", (_Unfailing, filtering), {})


class _Stderr:
    """Writes each line with one system call, because processes may share stderr. Bypasses Python's buffer, which would
    keep a line that failed and send a part of it later."""

    _torn = False  # whether the last line is incomplete; shared by all loggers

    def __init__(self, *_: object) -> None:
        pass

    def msg(self, line: str) -> None:
        rest = line[:LINE_LIMIT].encode("utf-8", "backslashreplace") + b"\n"
        if _Stderr._torn:
            rest = b"\n" + rest
        number = sys.stderr.fileno()
        while rest:
            written = os.write(number, rest)
            rest = rest[written:]
            _Stderr._torn = bool(rest)

    debug = info = warning = error = critical = exception = fatal = log = msg


def _add_trace(_: object, __: str, values: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    values.update(log_ids())
    return values


def _cut_values(_: object, __: str, values: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for name, value in values.items():
        if not isinstance(value, bool | int | float | None):
            values[name] = _cut(value, TRACEBACK_LIMIT if name == "exception" else VALUE_LIMIT)
    return values


def _escape_values(_: object, __: str, values: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """No value sends control characters to a terminal, or writes a line of its own."""
    for name, value in values.items():
        if not isinstance(value, bool | int | float | None):
            values[name] = safe(value) if name == "exception" else one_line(value)
    return values


def _cut(value: object, limit: int) -> object:
    """A string within the limit, or another value unchanged if its JSON form is within it."""
    if isinstance(value, str):
        return bounded(value, limit)
    try:
        written = json.dumps(value, default=repr)
    except Exception as error:  # noqa: BLE001 - foreign objects raise anything
        return f"a {type(value).__name__} that cannot be shown: {type(error).__name__}"
    return value if len(written) <= limit else bounded(written, limit)
