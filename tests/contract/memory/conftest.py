"""Memory services for the tests of this folder."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import uuid4

import grpc
import pytest

from mulligan.common.channel import Endpoint
from mulligan.memory.client import MemoryClient
from mulligan.memory.v1 import memory_service_pb2_grpc as pb_grpc
from mulligan.testing.processes import ServiceProcess, ServiceProcesses
from tests.support.distribution import install


@pytest.fixture(scope="module")
def acme(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables of a process that has the store `notes`."""
    folder = install(tmp_path_factory.mktemp("installed"))
    return {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, sys.path)])}


@pytest.fixture(scope="module", params=["sqlite", "notes"])
def embedding(
    request: pytest.FixtureRequest,
    shared_services: ServiceProcesses,
    acme: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> ServiceProcess:
    """A server with an embedder, on each store."""
    file: Path = tmp_path_factory.mktemp("memory") / "memory.db"
    database = {"notes": "notes:desk", "sqlite": f"sqlite:{file}"}[request.param]
    return shared_services.start("memory", environment=acme, database=database, embedder="wordllama")


@pytest.fixture
async def client(embedding: ServiceProcess) -> AsyncIterator[MemoryClient]:
    client = MemoryClient(Endpoint(embedding.address))
    yield client
    await client.close()


@pytest.fixture
async def stub(embedding: ServiceProcess) -> AsyncIterator[pb_grpc.MemoryServiceStub]:
    async with grpc.aio.insecure_channel(embedding.address) as channel:
        yield pb_grpc.MemoryServiceStub(channel)


@pytest.fixture
def scope() -> str:
    return f"scope-{uuid4()}"
