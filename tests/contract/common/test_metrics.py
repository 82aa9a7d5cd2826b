"""Where the metrics of a service are read."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from urllib.request import urlopen

import pytest

from mulligan.common.channel import Endpoint
from mulligan.env.client import EnvClient
from mulligan.testing.processes import ProcessFailed, ServiceProcesses
from tests.support.metrics import sample


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        yield int(held.getsockname()[1])


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
