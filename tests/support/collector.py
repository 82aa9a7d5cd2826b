"""A collector of traces: OTLP over gRPC, which keeps the spans that it gets."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as pb_grpc

WAIT_SECONDS = 60.0


@dataclass(frozen=True)
class Received:
    """A span. `service` is the resource's name, ids are in hex; `links` are ids of spans."""

    service: str
    name: str
    kind: int
    trace_id: str
    span_id: str
    parent_id: str
    attributes: dict[str, Any]
    links: tuple[str, ...]
    is_error: bool


@dataclass
class Collector(pb_grpc.TraceServiceServicer):
    address: str = ""
    spans: list[Received] = field(default_factory=list)
    raw: list[bytes] = field(default_factory=list)  # all that arrived
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def Export(self, request: Any, context: Any) -> Any:
        with self._lock:
            self.raw.append(request.SerializeToString())
            for resource in request.resource_spans:
                service = _attributes(resource.resource.attributes)["service.name"]
                self.spans += [_read(service, one) for scope in resource.scope_spans for one in scope.spans]
        return pb.ExportTraceServiceResponse()

    def wait(self, enough: Callable[[list[Received]], bool], seconds: float = WAIT_SECONDS) -> list[Received]:
        """The spans, once they are enough."""
        deadline = time.monotonic() + seconds
        while not enough(found := list(self.spans)):
            assert time.monotonic() < deadline, sorted({(span.service, span.name) for span in found})
            time.sleep(0.05)
        return found


@contextmanager
def collector(address: str = "127.0.0.1:0", tls: Path | None = None) -> Iterator[Collector]:
    """`tls` is a folder with tls.key and tls.crt."""
    found = Collector()
    server = grpc.server(ThreadPoolExecutor(2), options=[("grpc.so_reuseport", 0)])
    pb_grpc.add_TraceServiceServicer_to_server(found, server)  # type: ignore[no-untyped-call]
    if tls is None:
        port = server.add_insecure_port(address)
    else:
        pair = [((tls / "tls.key").read_bytes(), (tls / "tls.crt").read_bytes())]
        port = server.add_secure_port(address, grpc.ssl_server_credentials(pair))
    found.address = f"127.0.0.1:{port}"
    server.start()
    try:
        yield found
    finally:
        server.stop(None).wait()


def _read(service: str, span: Any) -> Received:
    return Received(
        service,
        span.name,
        span.kind,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        _attributes(span.attributes),
        tuple(link.span_id.hex() for link in span.links),
        span.status.code == span.status.STATUS_CODE_ERROR,
    )


def _attributes(found: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in found}
