"""The contract of the memory service, over gRPC against a real process."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest

from mulligan.common.channel import Endpoint
from mulligan.common.errors import DomainError, Reason
from mulligan.common.reflections import Provenance, ReflectionQuery, RetrievalStrategy
from mulligan.memory.client import MemoryClient
from mulligan.memory.v1 import memory_service_pb2 as pb
from mulligan.memory.v1 import memory_service_pb2_grpc as pb_grpc
from mulligan.testing.processes import ProcessFailed, ServiceProcess, ServiceProcesses

LATEST = RetrievalStrategy.LATEST_SUCCESS
TOP_GAIN = RetrievalStrategy.TOP_GAIN


def origin(before: float = 0.0, after: float = 1.0, *, success: bool = True, environment: str = "lake") -> Provenance:
    return Provenance("run", "experience", environment, "train/00001", 3, before, after, success)


async def texts(
    client: MemoryClient,
    scope: str,
    environment: str,
    strategy: RetrievalStrategy,
    limit: int,
    version: int | None = None,
) -> list[str]:
    found = await client.query(ReflectionQuery(scope, environment, strategy, limit, version))
    return [one.text for one in found.reflections]


@pytest.fixture(scope="module")
def server(shared_services: ServiceProcesses, tmp_path_factory: pytest.TempPathFactory) -> ServiceProcess:
    return shared_services.start("memory", database=tmp_path_factory.mktemp("memory") / "memory.db")


@pytest.fixture
async def client(server: ServiceProcess) -> AsyncIterator[MemoryClient]:
    client = MemoryClient(Endpoint(server.address))
    yield client
    await client.close()


@pytest.fixture
async def stub(server: ServiceProcess) -> AsyncIterator[pb_grpc.MemoryServiceStub]:
    async with grpc.aio.insecure_channel(server.address) as channel:
        yield pb_grpc.MemoryServiceStub(channel)


async def test_what_is_added_is_read_back_whole(client: MemoryClient, scope: str) -> None:
    text = "Symbols: A is you; √ ends it.\n\x00\t" + "x" * 1000
    provenance = origin(0.25, 0.75)
    added = await client.add("request", scope, text, provenance)
    stored = await client.get(added)
    assert (stored.reflection_id, stored.scope, stored.text) == (added, scope, text)
    assert (stored.provenance, stored.version, stored.deleted_version) == (provenance, 1, None)
    assert abs(datetime.now(UTC) - stored.created_at) < timedelta(minutes=1)


async def test_the_latest_success_is_retrieved(client: MemoryClient, scope: str) -> None:
    assert await texts(client, scope, "lake", LATEST, 1) == []
    await client.add("1", scope, "first", origin())
    await client.add("2", scope, "second", origin())
    await client.add("3", scope, "failed", origin(0.0, 0.0, success=False))
    await client.add("4", scope, "elsewhere", origin(environment="maze"))
    assert await texts(client, scope, "lake", LATEST, 1) == ["second"]
    assert await texts(client, scope, "lake", LATEST, 9) == ["second", "first"]
    assert await texts(client, scope, "maze", LATEST, 9) == ["elsewhere"]


async def test_the_greatest_gain_is_retrieved(client: MemoryClient, scope: str) -> None:
    for index, before in enumerate([0.5, 0.0, 0.25, 0.0]):
        await client.add(str(index), scope, f"{index}", origin(before, 1.0))
    assert await texts(client, scope, "lake", TOP_GAIN, 3) == ["3", "1", "2"]


async def test_a_read_as_of_a_version_ignores_what_came_later(client: MemoryClient, scope: str) -> None:
    old = await client.add("1", scope, "old", origin())
    version = await client.snapshot(scope)
    await client.add("2", scope, "new", origin())
    assert await client.delete(old) == 3
    assert await texts(client, scope, "lake", LATEST, 9, version) == ["old"]
    assert await texts(client, scope, "lake", LATEST, 9) == ["new"]
    assert await texts(client, scope, "lake", LATEST, 9, 0) == []
    with pytest.raises(DomainError) as caught:
        await texts(client, scope, "lake", LATEST, 9, 4)
    assert (caught.value.reason, caught.value.metadata) == (Reason.UNKNOWN_VERSION, {"version": "3"})


async def test_adding_again_changes_nothing(client: MemoryClient, scope: str) -> None:
    added = await client.add("request", scope, "text", origin())
    again = await asyncio.gather(*(client.add("request", scope, "text", origin()) for _ in range(20)))
    assert set(again) == {added}
    assert await client.snapshot(scope) == 1
    for text, provenance in (("other text", origin()), ("text", origin(0.5))):
        with pytest.raises(DomainError) as caught:
            await client.add("request", scope, text, provenance)
        assert caught.value.reason is Reason.REQUEST_CONFLICT
    await client.delete(added)
    assert await client.add("request", scope, "text", origin()) == added
    assert await texts(client, scope, "lake", LATEST, 1) == []


async def test_forgetting_twice_is_forgetting_once(client: MemoryClient, scope: str) -> None:
    added = await client.add("request", scope, "text", origin())
    assert [await client.delete(added), await client.delete(added)] == [2, 2]
    assert (await client.get(added)).deleted_version == 2
    assert await client.list(scope) == []
    assert [found.reflection_id for found in await client.list(scope, include_deleted=True)] == [added]


async def test_lists_are_paged_in_order(client: MemoryClient, stub: pb_grpc.MemoryServiceStub, scope: str) -> None:
    await asyncio.gather(*(client.add(f"{n}", scope, f"{n}", origin()) for n in range(7)))
    found: list[int] = []
    token = ""
    pages = 0
    while pages == 0 or token:
        page = await stub.ListReflections(pb.ListReflectionsRequest(scope=scope, page_size=3, page_token=token))
        found += [reflection.version for reflection in page.reflections]
        token = page.next_page_token
        pages = pages + 1
    assert (found, pages) == (list(range(1, 8)), 3)
    assert len(await client.list(scope, 5)) == 5


@pytest.mark.parametrize("token", ["nonsense", "bnVsbA==", "WzEsIjEiXQ==", "é", "W10="])
async def test_a_page_token_of_another_listing_is_refused(
    stub: pb_grpc.MemoryServiceStub, client: MemoryClient, scope: str, token: str
) -> None:
    for n in range(2):
        await client.add(str(n), scope, "text", origin())
    page = await stub.ListReflections(pb.ListReflectionsRequest(scope=scope, page_size=1))
    for bad in (token, page.next_page_token):
        with pytest.raises(grpc.aio.AioRpcError, match="page_token") as caught:
            await stub.ListReflections(pb.ListReflectionsRequest(scope="another", page_token=bad))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_unknown_reflections_are_not_found(client: MemoryClient) -> None:
    for call in (client.get("nothing"), client.delete("nothing")):
        with pytest.raises(DomainError) as caught:
            await call
        assert caught.value.reason is Reason.UNKNOWN_REFLECTION


async def test_acknowledged_writes_survive_sigkill(services: ServiceProcesses, tmp_path: Path) -> None:
    server = services.start("memory", database=tmp_path / "memory.db")
    client = MemoryClient(Endpoint(server.address))
    acknowledged: dict[str, str] = {}
    enough = asyncio.Event()

    async def write(worker: int) -> None:
        for n in range(1000):
            request = f"{worker}/{n}"
            acknowledged[request] = await client.add(request, "scope", request, origin())
            if len(acknowledged) >= 100:
                enough.set()

    writers = [asyncio.create_task(write(worker)) for worker in range(4)]
    await enough.wait()
    server.kill()
    for writer in writers:
        writer.cancel()
    await asyncio.gather(*writers, return_exceptions=True)
    server.restart()
    stored = {found.text: found.reflection_id for found in await client.list("scope")}
    assert acknowledged.items() <= stored.items()
    assert len(stored) <= len(acknowledged) + 4  # committed, but killed before the answer
    assert await client.snapshot("scope") == len(stored)
    for request in list(stored)[-3:]:
        assert await client.add(request, "scope", request, origin()) == stored[request]
    await client.close()


def test_a_second_server_on_one_database_is_refused(services: ServiceProcesses, tmp_path: Path) -> None:
    services.start("memory", database=tmp_path / "memory.db")
    with pytest.raises(ProcessFailed, match=r"ended with status 2:\s[^$]*is in use by another process"):
        services.start("memory", database=tmp_path / "memory.db")


def test_a_newer_schema_is_refused(services: ServiceProcesses, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "memory.db") as db:
        db.execute("CREATE TABLE schema_version AS SELECT 7 AS version")
    db.close()
    with pytest.raises(ProcessFailed, match="schema 7, and this program knows schemas up to 5"):
        services.start("memory", database=tmp_path / "memory.db")


def test_an_unknown_kind_of_store_is_refused(services: ServiceProcesses) -> None:
    with pytest.raises(ProcessFailed, match="database: there is no store 'granite'; there are postgres, sqlite"):
        services.start("memory", database="granite:tablet")
