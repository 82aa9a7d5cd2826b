"""What a service counts, and where it is read."""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Iterator
from urllib.request import urlopen

import pytest
from prometheus_client import generate_latest

from mulligan.common.channel import Endpoint
from mulligan.common.config import ServiceSettings
from mulligan.common.metrics import REGISTRY, MethodMetrics, exported
from mulligan.env.client import EnvClient
from mulligan.testing.processes import ProcessFailed, ServiceProcesses


class Settings(ServiceSettings):
    service = "test"


def sample(text: str, name: str, **labels: str) -> float | None:
    """The value of one time series in the exposition format."""
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    for line in text.splitlines():
        found = re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)", line)
        if found and found[1] == name and all(label in (found[2] or "") for label in wanted):
            return float(found[3])
    return None


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


async def test_every_service_has_them(services: ServiceProcesses) -> None:
    server = services.start("env", metrics_port=0)
    [address] = [line["address"] for line in server.log_lines if line["event"] == "metrics"]
    assert address.startswith("127.0.0.1:")
    await call_twice(server.address)

    def text() -> str:
        with urlopen(f"http://{address}/metrics", timeout=10) as response:
            return str(response.read().decode())

    method = "mulligan.env.v1.EnvService/ListEnvironments"
    for _ in range(100):  # the count follows the answer
        if sample(text(), "mulligan_requests_total", method=method, status="OK") == 2:
            break
        await asyncio.sleep(0.02)
    assert sample(text(), "mulligan_requests_total", method=method, status="OK") == 2
    assert sample(text(), "mulligan_request_seconds_count", method=method) == 2
    assert sample(text(), "process_resident_memory_bytes") is not None
    assert server.stop() == 0


async def call_twice(address: str) -> None:
    client = EnvClient(Endpoint(address))
    await client.list_environments()
    await client.list_environments()
    await client.close()


def test_a_service_does_not_start_on_a_taken_port(services: ServiceProcesses, taken: int) -> None:
    with pytest.raises(ProcessFailed, match=r"status 2:(\s.*)*env: metrics_port: cannot listen on"):
        services.start("env", metrics_port=taken)
