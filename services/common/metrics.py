"""Prometheus metrics of a service: one registry, those of gRPC calls, and the HTTP endpoint.

docs/observability.md lists all metrics of the four services.
"""

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
    disable_created_metrics,
)
from prometheus_client.registry import Collector

from mulligan.common.config import ServiceSettings
from mulligan.common.metrics_server import MetricsServer

log = structlog.get_logger()
disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each, with the time of its first count
REGISTRY = CollectorRegistry(auto_describe=True)
ProcessCollector(registry=REGISTRY)
PlatformCollector(registry=REGISTRY)
REGISTRY.register(GC_COLLECTOR)

OTHER = "other"  # the label of what is not among the known names

# The names, labels and bounds of gRPC's own metrics: https://github.com/grpc/proposal/blob/master/A66-otel-stats.md
_STARTED = Counter(
    "grpc_server_call_started",
    "Calls that arrived.",
    ["grpc_method"],
    registry=REGISTRY,
)
_DURATION = Histogram(
    "grpc_server_call_duration_seconds",
    "From the arrival of a call to its end, by its status.",
    ["grpc_method", "grpc_status"],
    buckets=(
        *(0, 0.00001, 0.00005, 0.0001, 0.0003, 0.0006, 0.0008, 0.001, 0.002, 0.003, 0.004, 0.005, 0.006, 0.008),
        *(0.01, 0.013, 0.016, 0.02, 0.025, 0.03, 0.04, 0.05, 0.065, 0.08, 0.1, 0.13, 0.16, 0.2, 0.25, 0.3, 0.4, 0.5),
        *(0.65, 0.8, 1, 2, 5, 10, 20, 50, 100),
    ),
    registry=REGISTRY,
)


class MethodMetrics:
    """Metrics of one method, such as "mulligan.env.v1.EnvService/StepEpisode", or of all unknown ones (`OTHER`). Looks
    up labels once, not per call."""

    def __init__(self, method: str):
        self._method = method
        self._started = _STARTED.labels(method)
        self._by_status: dict[str, Histogram] = {}

    def started(self) -> None:
        self._started.inc()

    def ended(self, status: str, seconds: float) -> None:
        duration = self._by_status.get(status)
        if duration is None:
            duration = self._by_status[status] = _DURATION.labels(self._method, status)
        duration.observe(seconds)


class BoundedNames:
    """Labels of names that callers choose. The first `most` names of a process are labels; all others are `OTHER`, so
    that no caller makes series without end."""

    def __init__(self, most: int = 100):
        self._most = most
        self._known: set[str] = set()

    def label(self, name: str) -> str:
        if name not in self._known:
            if len(self._known) >= self._most:
                return OTHER
            self._known.add(name)
        return name


@contextmanager
def collected(collector: Collector) -> Iterator[None]:
    """Its gauges are in the service's metrics while the block runs."""
    REGISTRY.register(collector)
    try:
        yield
    finally:
        REGISTRY.unregister(collector)


@contextmanager
def exported(settings: ServiceSettings) -> Iterator[None]:
    """Serves the registry over HTTP during the block, unless `metrics_port` is -1."""
    if settings.metrics_port < 0:
        yield
        return
    try:
        server = MetricsServer(settings.host, settings.metrics_port, REGISTRY)
    except OSError as error:
        address = f"{settings.host}:{settings.metrics_port}"
        raise OSError(f"metrics_port: cannot listen on {address}: {error}") from error
    log.info("metrics", address=f"{settings.host}:{server.server_port}")
    try:
        yield
    finally:
        server.close()
