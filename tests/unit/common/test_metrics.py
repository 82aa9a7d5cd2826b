"""What a service counts, and where it is read."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Iterator
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from prometheus_client import CollectorRegistry, Gauge, Metric, generate_latest
from prometheus_client.registry import Collector

from mulligan.common.config import ServiceSettings
from mulligan.common.metrics import REGISTRY, BoundedNames, MethodMetrics, exported
from mulligan.common.metrics_server import SECONDS, MetricsServer
from tests.support.metrics import sample


class Settings(ServiceSettings):
    service = "test"


def test_calls_are_counted_by_status_and_timed() -> None:
    method = "test.v1.Service/Counted"
    metrics = MethodMetrics(method)
    for _ in range(4):
        metrics.started()
    metrics.ended("OK", 0.002)
    metrics.ended("OK", 0.02)
    metrics.ended("NOT_FOUND", 2.0)
    text = generate_latest(REGISTRY).decode()
    duration = "grpc_server_call_duration_seconds"
    assert sample(text, "grpc_server_call_started_total", grpc_method=method) == 4
    assert sample(text, f"{duration}_count", grpc_method=method, grpc_status="OK") == 2
    assert sample(text, f"{duration}_count", grpc_method=method, grpc_status="NOT_FOUND") == 1
    assert sample(text, f"{duration}_sum", grpc_method=method, grpc_status="OK") == pytest.approx(0.022)
    assert sample(text, f"{duration}_bucket", grpc_method=method, grpc_status="OK", le="0.003") == 1
    again = MethodMetrics(method)  # another server in the same process
    again.ended("OK", 0.0)
    text = generate_latest(REGISTRY).decode()
    assert sample(text, f"{duration}_count", grpc_method=method, grpc_status="OK") == 3


def test_the_bounds_are_grpcs() -> None:
    """https://github.com/grpc/proposal/blob/master/A66-otel-stats.md#metrics-schema"""
    method = "test.v1.Service/Bounds"
    MethodMetrics(method).ended("OK", 0.0)
    text = generate_latest(REGISTRY).decode()
    start = f'grpc_server_call_duration_seconds_bucket{{grpc_method="{method}"'
    bounds = [line.split('le="')[1].split('"')[0] for line in text.splitlines() if line.startswith(start)]
    assert len(bounds) == 42 and bounds[-1] == "+Inf"
    assert [float(bound) for bound in bounds[:5]] == [0, 0.00001, 0.00005, 0.0001, 0.0003]
    assert [float(bound) for bound in bounds[-6:-1]] == [5, 10, 20, 50, 100]


def test_names_beyond_the_limit_share_a_label() -> None:
    names = BoundedNames(most=2)
    assert [names.label(name) for name in ("a", "b", "c", "d", "a")] == ["a", "b", "other", "other", "a"]


class Broken(Collector):
    def collect(self) -> Iterator[Metric]:
        raise RuntimeError("planted")
        yield


def test_a_collector_that_fails_is_an_error_of_the_request() -> None:
    registry = CollectorRegistry()
    registry.register(Broken())
    server = MetricsServer("127.0.0.1", 0, registry)
    try:
        for _ in range(2):
            with pytest.raises(HTTPError, match="500"):
                urlopen(f"http://127.0.0.1:{server.server_port}/metrics", timeout=10)
    finally:
        server.close()


@pytest.mark.parametrize("host", ["::1", "[::1]", "localhost"])
def test_it_listens_at_other_addresses(host: str) -> None:
    server = MetricsServer(host, 0, REGISTRY)
    try:
        written = f"[{host.strip('[]')}]" if ":" in host else host
        with urlopen(f"http://{written}:{server.server_port}/metrics", timeout=10) as response:
            assert b"process_open_fds" in response.read()
    finally:
        server.close()


def test_a_caller_that_does_not_read_ends() -> None:
    registry = CollectorRegistry()
    gauge = Gauge("large", "Many series.", ["name"], registry=registry)
    for number in range(50_000):
        gauge.labels("x" * 100 + str(number)).set(number)
    server = MetricsServer("127.0.0.1", 0, registry)
    begun = time.monotonic()
    with socket.create_connection(("127.0.0.1", server.server_port)) as one:
        one.sendall(b"GET / HTTP/1.1\r\n\r\n")
        while one not in select.select([one], [], [], 0.1)[0]:
            pass
        while server.connections:
            assert time.monotonic() < begun + SECONDS + 30
            time.sleep(0.05)
    assert time.monotonic() > begun + SECONDS - 1
    server.close()


def test_no_port_no_server() -> None:
    with exported(Settings()):
        pass


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        yield int(held.getsockname()[1])


def test_a_taken_port_is_named(taken: int) -> None:
    with (
        pytest.raises(OSError, match=rf"metrics_port: cannot listen on 127\.0\.0\.1:{taken}"),
        exported(Settings(metrics_port=taken)),
    ):
        pass
