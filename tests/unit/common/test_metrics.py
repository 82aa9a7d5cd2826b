"""What a service counts, and where it is read."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from prometheus_client import generate_latest

from mulligan.common.config import ServiceSettings
from mulligan.common.metrics import REGISTRY, MethodMetrics, exported
from tests.support.metrics import sample


class Settings(ServiceSettings):
    service = "test"


def test_calls_are_counted_by_status_and_timed() -> None:
    method = "test.v1.Service/Counted"
    metrics = MethodMetrics(method)
    metrics.ended("OK", 0.002)
    metrics.ended("OK", 0.02)
    metrics.ended("NOT_FOUND", 2.0)
    text = generate_latest(REGISTRY).decode()
    assert sample(text, "mulligan_requests_total", method=method, status="OK") == 2
    assert sample(text, "mulligan_requests_total", method=method, status="NOT_FOUND") == 1
    assert sample(text, "mulligan_request_seconds_count", method=method) == 3
    assert sample(text, "mulligan_request_seconds_sum", method=method) == pytest.approx(2.022)
    assert sample(text, "mulligan_request_seconds_bucket", method=method, le="0.003") == 1
    again = MethodMetrics(method)  # another server in the same process
    again.ended("OK", 0.0)
    assert sample(generate_latest(REGISTRY).decode(), "mulligan_requests_total", method=method, status="OK") == 3


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
