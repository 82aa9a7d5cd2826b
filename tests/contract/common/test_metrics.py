"""Where the metrics of a service are read."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import grpc
import pytest

from mulligan.common.channel import Endpoint
from mulligan.common.metrics_server import CONNECTIONS, SECONDS
from mulligan.env.client import EnvClient
from mulligan.testing.processes import ProcessFailed, ServiceProcess, ServiceProcesses
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


def used(server: ServiceProcess) -> tuple[int, int]:
    """Its threads and descriptors."""
    process = Path(f"/proc/{server.pid}")
    return len([*(process / "task").iterdir()]), len([*(process / "fd").iterdir()])


def connected(address: str, source: str, sent: bytes) -> socket.socket:
    host, _, port = address.rpartition(":")
    made = socket.create_connection((host, int(port)), timeout=10, source_address=(source, 0))
    with suppress(ConnectionError):  # it may have been ended already
        made.sendall(sent)
    return made


def test_half_sent_requests_take_few_threads_and_descriptors(services: ServiceProcesses) -> None:
    """Of 300 from three addresses. Who asks meanwhile is answered, and none of them lasts."""
    server = services.start("env", metrics_port=0)
    [address] = [line["address"] for line in server.log_lines if line["event"] == "metrics"]
    scraped(address)
    threads, files = used(server)
    log = server.log
    with ExitStack() as stack:
        made = [
            stack.enter_context(connected(address, f"127.0.0.{2 + number % 3}", b"GET /metrics HTTP/1.1\r\nX: "))
            for number in range(300)
        ]
        for _ in range(5):
            assert "process_open_fds" in scraped(address)
        more_threads, more_files = used(server)
        assert more_threads <= threads + CONNECTIONS and more_files <= files + 2 * CONNECTIONS
        for one in made:
            one.settimeout(SECONDS + 10)
            with suppress(ConnectionError):
                assert one.recv(1_000) == b"", "it ends by itself"
    assert server.is_healthy() and server.log == log


def test_strange_requests_of_metrics_write_no_log(services: ServiceProcesses) -> None:
    server = services.start("env", metrics_port=0)
    [address] = [line["address"] for line in server.log_lines if line["event"] == "metrics"]
    scraped(address)
    log = server.log
    for sent in (b"", b"\xff\n", b"GET\r\n\r\n", b"GET / HTTP/9\r\n\r\n", b"GET /\x1b[2J HTTP/1.1\r\n\r\n"):
        for _ in range(20):
            with connected(address, "127.0.0.1", sent):
                pass
    for sent in (b"x" * 100_000, b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 1_000 + b"\r\n", b"PUT / HTTP/1.1\r\n\r\n"):
        with connected(address, "127.0.0.1", sent) as one, suppress(ConnectionError):
            assert one.recv(12).startswith((b"HTTP/1.0 4", b"<!DOCTYPE"))
    assert "process_open_fds" in scraped(address)
    assert server.log == log


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
