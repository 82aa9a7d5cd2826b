"""Where the metrics of a service are read."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from typing import Any
from urllib.request import urlopen

import grpc
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
        return scraped(address)

    method = "mulligan.env.v1.EnvService/ListEnvironments"
    ended = "grpc_server_call_duration_seconds_count"
    for _ in range(100):  # the count follows the answer
        if sample(text(), ended, grpc_method=method, grpc_status="OK") == 2:
            break
        await asyncio.sleep(0.02)
    assert sample(text(), ended, grpc_method=method, grpc_status="OK") == 2
    assert sample(text(), "grpc_server_call_started_total", grpc_method=method) == 2
    assert sample(text(), "process_resident_memory_bytes") is not None
    assert server.stop() == 0


async def test_callers_make_no_series(services: ServiceProcesses) -> None:
    """Calls of unknown methods are one series, however they are called."""
    server = services.start("env", metrics_port=0)
    [address] = [line["address"] for line in server.log_lines if line["event"] == "metrics"]
    async with grpc.aio.insecure_channel(server.address) as channel:
        for number in range(20):
            call: Any = channel.unary_unary(f"/mulligan.env.v1.EnvService/Call{number}")
            with pytest.raises(grpc.aio.AioRpcError, match="UNIMPLEMENTED"):
                await call(b"")
    text = await asyncio.to_thread(scraped, address)
    assert "Call1" not in text
    assert sample(text, "grpc_server_call_started_total", grpc_method="other") == 20
    ended = "grpc_server_call_duration_seconds_count"
    assert sample(text, ended, grpc_method="other", grpc_status="UNIMPLEMENTED") == 20


def scraped(address: str) -> str:
    with urlopen(f"http://{address}/metrics", timeout=10) as response:
        return str(response.read().decode())


async def call_twice(address: str) -> None:
    client = EnvClient(Endpoint(address))
    await client.list_environments()
    await client.list_environments()
    await client.close()


def test_a_service_does_not_start_on_a_taken_port(services: ServiceProcesses, taken: int) -> None:
    with pytest.raises(ProcessFailed, match=r"status 2:(\s.*)*env: metrics_port: cannot listen on"):
        services.start("env", metrics_port=taken)
