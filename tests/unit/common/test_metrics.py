"""What a service counts, and where it is read."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from prometheus_client import generate_latest

from mulligan.common.config import ServiceSettings
from mulligan.common.metrics import REGISTRY, BoundedNames, MethodMetrics, exported
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
