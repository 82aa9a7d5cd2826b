"""Sends the spans of `tracing.py` to a collector, by OTLP over gRPC. Imported only while tracing is on.

A collector that is away costs spans, and nothing else: they wait in a queue with an end, and another thread sends them.
The log says once that it is away, and once that it is back.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Sequence
from importlib.metadata import version
from urllib.parse import urlsplit

import structlog
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from prometheus_client import Counter

from mulligan.common.config import ServiceSettings
from mulligan.common.metrics import REGISTRY
from mulligan.common.proxies import grpc_options
from mulligan.common.text import bounded
from mulligan.common.tracing import start_tracing

log = structlog.get_logger()
_CAUSE_LENGTH = 300
_ENDED = Counter("mulligan_spans_ended", "Spans of traces that are recorded.", registry=REGISTRY)
_EXPORTED = Counter("mulligan_spans_exported", "Spans that the collector took.", registry=REGISTRY)


def export_traces(settings: ServiceSettings) -> None:
    """From now on, spans go to the collector of the settings, or of OpenTelemetry's variables."""
    ratio = settings.trace_ratio
    provider = TracerProvider(
        sampler=None if ratio is None else ParentBased(TraceIdRatioBased(ratio)),  # None: as the variables say
        resource=_resource(settings.service),
        shutdown_on_exit=False,
    )
    options: tuple[tuple[str, int], ...] = (*grpc_options(urlsplit(settings.traces_to).netloc or settings.traces_to),)
    exporter = OTLPSpanExporter(settings.otlp_endpoint or None, channel_options=options or None)  # type: ignore[arg-type]
    provider.add_span_processor(_Processor(_Told(exporter, settings.traces_to)))
    start_tracing(provider.get_tracer("mulligan", version("mulligan")), provider.shutdown)
    log.info("traces", collector=settings.traces_to)


def _resource(service: str) -> Resource:
    own: dict[str, str | int] = {
        "service.name": f"mulligan-{service}",
        "service.namespace": "mulligan",
        "service.version": version("mulligan"),
        "service.instance.id": str(uuid.uuid4()),
        "process.pid": os.getpid(),
    }
    return Resource(own).merge(OTELResourceDetector().detect())


class _Processor(BatchSpanProcessor):
    def on_end(self, span: ReadableSpan) -> None:
        if span.context is not None and span.context.trace_flags.sampled:
            _ENDED.inc()
        super().on_end(span)


class _Told(SpanExporter):
    """Says once what does not work, where the library says it again and again."""

    def __init__(self, exporter: SpanExporter, collector: str):
        self._exporter = exporter
        self._collector = collector
        self._is_away = False
        self._said = _Said()
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        for name in ("exporter", "trace_exporter"):
            library = logging.getLogger(f"opentelemetry.exporter.otlp.proto.grpc.{name}")
            library.setLevel(logging.ERROR)
            library.addFilter(self._said)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        try:
            result = self._exporter.export(spans)
        except Exception as error:  # noqa: BLE001 - whatever it is, the service goes on
            self._said.text = f"{type(error).__name__}: {error}"
            result = SpanExportResult.FAILURE
        if result is SpanExportResult.SUCCESS:
            _EXPORTED.inc(len(spans))
        self._tell(result is not SpanExportResult.SUCCESS)
        return result

    def _tell(self, is_away: bool) -> None:
        if is_away and not self._is_away:
            cause = bounded(self._said.text, _CAUSE_LENGTH)
            log.warning("the collector takes no spans; they are lost", collector=self._collector, cause=cause)
        elif self._is_away and not is_away:
            log.info("the collector takes spans again", collector=self._collector)
        self._is_away = is_away

    def shutdown(self) -> None:
        self._exporter.shutdown()


class _Said(logging.Filter):
    """Keeps what the library said last, and keeps it out of the log."""

    text = ""

    def filter(self, record: logging.LogRecord) -> bool:
        self.text = record.getMessage()
        return False
