"""Prometheus metrics of a service: one registry, a counter and a histogram of requests, and the HTTP endpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import structlog
from prometheus_client import (
    GC_COLLECTOR,
    CollectorRegistry,
    Counter,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    start_http_server,
)

from mulligan.common.config import ServiceSettings

log = structlog.get_logger()
REGISTRY = CollectorRegistry(auto_describe=True)
ProcessCollector(registry=REGISTRY)
PlatformCollector(registry=REGISTRY)
REGISTRY.register(GC_COLLECTOR)

_REQUESTS = Counter("mulligan_requests", "Calls that ended, by gRPC status.", ["method", "status"], registry=REGISTRY)
_SECONDS = Histogram(
    "mulligan_request_seconds",
    "Seconds from the arrival of a call to its end.",
    ["method"],
    buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000),
    registry=REGISTRY,
)


class MethodMetrics:
    """Metrics of one method, such as "mulligan.env.v1.EnvService/StepEpisode". Looks up labels once, not per call."""

    def __init__(self, method: str):
        self._method = method
        self._seconds = _SECONDS.labels(method)
        self._by_status: dict[str, Counter] = {}

    def ended(self, status: str, seconds: float) -> None:
        counter = self._by_status.get(status)
        if counter is None:
            counter = self._by_status[status] = _REQUESTS.labels(self._method, status)
        counter.inc()
        self._seconds.observe(seconds)


@contextmanager
def exported(settings: ServiceSettings) -> Iterator[None]:
    """Serves the registry over HTTP during the block, unless `metrics_port` is -1."""
    if settings.metrics_port < 0:
        yield
        return
    try:
        server, thread = start_http_server(settings.metrics_port, addr=settings.host, registry=REGISTRY)
    except OSError as error:
        address = f"{settings.host}:{settings.metrics_port}"
        raise OSError(f"metrics_port: cannot listen on {address}: {error}") from error
    log.info("metrics", address=f"{settings.host}:{server.server_port}")
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
