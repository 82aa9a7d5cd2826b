"""What strangers send to a port with TLS adds no line to the log, by gRPC either: `services/common/config.py`."""

from __future__ import annotations

import asyncio
import random
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from mulligan.common.certificates import Certificates
from mulligan.common.channel import is_healthy
from mulligan.common.config import SERVICES
from mulligan.common.tls import ClientTls
from mulligan.testing.processes import ServiceProcess, ServiceProcesses
from tests.support.raw_http2 import PREFACE

CONNECTIONS = 200


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificates")
    Certificates(folder).update()
    return folder


def start(services: ServiceProcesses, certificates: Path, **options: Any) -> ServiceProcess:
    own = certificates / "services" / "env"
    return services.start("env", tls_certificate=own / "tls.crt", tls_key=own / "tls.key", **options)


def client_hello(name: str) -> bytes:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.create_default_context()
    context.set_alpn_protocols(["h2"])
    with suppress(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname=name).do_handshake()
    return outgoing.read()


def torn(chance: random.Random) -> Iterator[bytes]:
    """Plain HTTP, nothing sensible, and a greeting of TLS that is damaged, cut, followed by something else, or asks for
    a server whose name has control characters."""
    hello = client_hello("a-name-of-nobody")
    damaged = bytearray(hello)
    damaged[chance.randrange(len(damaged))] = chance.randrange(256)
    yield b"GET / HTTP/1.1\r\n\r\n"
    yield PREFACE + chance.randbytes(30)
    yield chance.randbytes(200)
    yield bytes(damaged)
    yield hello[: chance.randrange(len(hello))]
    yield hello + chance.randbytes(100)
    yield hello.replace(b"a-name-of-nobody", b"\x1b[2Jplanted\nline")


async def send(address: str, content: bytes) -> None:
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(content)
        with suppress(ConnectionError, TimeoutError):
            async with asyncio.timeout(0.1):
                while await reader.read(1_000):
                    pass
    finally:
        writer.transport.abort()


async def send_all(address: str) -> None:
    chance = random.Random(0)
    contents = [content for _ in range(CONNECTIONS // 7 + 1) for content in torn(chance)]
    for first in range(0, len(contents), 20):
        await asyncio.gather(*(send(address, content) for content in contents[first : first + 20]))


async def test_the_log_does_not_grow(services: ServiceProcesses, certificates: Path) -> None:
    server = start(services, certificates)
    before = server.log
    await send_all(server.address)
    tls = ClientTls(certificates / "services" / "env" / "ca.crt")
    assert await is_healthy(server.address, 10, tls)
    assert server.log == before


async def test_who_asks_for_the_lines_of_grpcs_core_gets_them(services: ServiceProcesses, certificates: Path) -> None:
    """And the test above sends what would have caused some."""
    server = start(services, certificates, environment={"GRPC_VERBOSITY": "INFO"})
    await send_all(server.address)
    assert server.log.count("Handshake failed") > CONNECTIONS / 3 and "planted\nline" in server.log


# Whether the variable is set when gRPC is imported.
IMPORTED = """
import importlib, os, sys
class Finder:
    def find_spec(name, path, target=None):
        if name == "grpc._cython.cygrpc":
            print(os.environ.get("GRPC_VERBOSITY"))
sys.meta_path.insert(0, Finder)
importlib.import_module(sys.argv[1])
"""
MAIN = """
sys.argv = ["mulligan", "--help"]
try:
    sys.modules["mulligan.cli.__main__"].main()
finally:
    import grpc
"""


@pytest.mark.parametrize("service", SERVICES)
def test_each_service_sets_it_before_grpc_is_there(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRPC_VERBOSITY", raising=False)
    monkeypatch.setenv("PYTHONPATH", ":".join(filter(None, sys.path)))
    command = [sys.executable, "-c", IMPORTED, f"mulligan.{service}.__main__"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.split()[:1] == ["NONE"]


def test_the_command_line_does_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it stays, as the console does, its connections become idle, and its user would see lines of that."""
    monkeypatch.delenv("GRPC_VERBOSITY", raising=False)
    monkeypatch.setenv("PYTHONPATH", ":".join(filter(None, sys.path)))
    command = [sys.executable, "-c", IMPORTED + MAIN, "mulligan.cli.__main__"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "NONE" in result.stdout.splitlines() and "None" not in result.stdout.splitlines()
