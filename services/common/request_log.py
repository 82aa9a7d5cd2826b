"""The line that a server logs for each request."""

from __future__ import annotations

import logging
import time
from typing import Any

import structlog

from mulligan.common.errors import DomainError, Reason, incident
from mulligan.common.logs import Throttle
from mulligan.common.metrics import MethodMetrics
from mulligan.common.status import CALL_ENDED
from mulligan.common.tracing import NO_SPAN, Span

log = structlog.get_logger()
PROBES = ("/grpc.health.v1.Health/", "/grpc.reflection.")
_REQUEST_KEYS = ("run_id", "episode_id", "request_id", "learner_id", "reflection_id", "sequence", "step_index")


_FROM_ANYBODY = (Reason.BAD_CREDENTIAL, Reason.CALLER_LIMIT)  # refused before anything else
_throttle = Throttle()


class RequestLog:
    """Logs one line per request: method, ids, duration, status. `log_level = "warning"` leaves out requests that
    succeed. Health probes are logged only after an internal error. Of requests that strangers can make at will, lines
    are left out where there are too many; the next line has their number, `left_out`."""

    def __init__(self, method: str, request: Any = None, metrics: MethodMetrics | None = None):
        self._method = method.rsplit("/", 1)[-1]
        self._is_probe = method.startswith(PROBES)
        self.request = request  # or None until it is read; its ids are logged
        self.span: Span = NO_SPAN  # of the call, once it is admitted
        self._metrics = metrics
        if metrics is not None:
            metrics.started()
        self._status = "OK"
        self._reason: Reason | None = None
        self._error: BaseException | None = None
        self._start = time.perf_counter()

    def failed(self, error: DomainError) -> None:
        self._status = error.code
        self._reason = error.reason

    def timed_out(self) -> None:
        self._status = "DEADLINE_EXCEEDED"

    def unimplemented(self) -> None:
        self._status = "UNIMPLEMENTED"

    def broke(self, error: Exception) -> None:
        self._status = "INTERNAL"
        self._error = error

    def __enter__(self) -> RequestLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, CALL_ENDED):
            self._status = "CANCELLED"
            self._reason = None
        seconds = time.perf_counter() - self._start
        if self._metrics is not None:
            self._metrics.ended(self._status, seconds)
        try:
            self._write(seconds)
        finally:
            if self.span is not NO_SPAN:
                self.span.set(**self._ids)
                self.span.end(self._status)

    @property
    def _ids(self) -> dict[str, Any]:
        return {key: value for key in _REQUEST_KEYS if (value := getattr(self.request, key, None)) not in (None, "")}

    def _write(self, seconds: float) -> None:
        level = logging.ERROR if self._status == "INTERNAL" else logging.INFO
        if not log.is_enabled_for(level) or (self._is_probe and level < logging.ERROR):
            return
        left_out: dict[str, int] = {}
        if self._reason in _FROM_ANYBODY:
            if not _throttle.admits():
                return
            left_out = _throttle.left_out()
        extra: dict[str, Any] = {"reason": self._reason} if self._reason else {}
        if self._error is not None:
            extra |= {"incident": incident(self._error), "exc_info": self._error}
        milliseconds = round(seconds * 1000, 2)
        log.log(
            level,
            "request",
            method=self._method,
            status=self._status,
            milliseconds=milliseconds,
            **self._ids,
            **extra,
            **left_out,
        )
