"""Calls that wait for a service: what is told, and what is known at any time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from google.protobuf.empty_pb2 import Empty

from mulligan.common import waits
from mulligan.common.channel import Connection, Endpoint
from mulligan.common.errors import DomainError, Reason, ServiceUnavailable
from mulligan.common.status import to_status
from mulligan.env import replicas as env_replicas
from mulligan.policy import replicas as policy_replicas
from tests.support.waiting import until

ADDRESS = "127.0.0.1:1"


class Service:
    """Away until it is up; then it answers, or refuses."""

    def __init__(self, refusal: DomainError | None = None):
        self.is_up = False
        self._refusal = refusal

    async def __call__(self, request: Any, **_: Any) -> str:
        if not self.is_up:
            raise _error(grpc.StatusCode.UNAVAILABLE, "gone")
        if self._refusal is not None:
            status = to_status(self._refusal)
            raise _error(status.code, status.details, *status.trailing_metadata)
        return "well"

    async def stream(self, request: Any, **options: Any) -> AsyncIterator[str]:
        yield await self(request)


class Streamed:
    """A call as gRPC's stubs make them."""

    def __init__(self, service: Service):
        self._parts = service.stream(None)

    def __aiter__(self) -> AsyncIterator[str]:
        return self._parts

    def cancel(self) -> None:
        return None


def _error(code: grpc.StatusCode, details: str, *metadata: Any) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*metadata), details)


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
async def connection(told: list[str], monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Connection]:
    monkeypatch.setattr(waits, "_SHOWN_AFTER_SECONDS", 0.0)
    connection = Connection(Endpoint(ADDRESS, outage_seconds=30), told.append)
    yield connection
    await connection.close()


@pytest.mark.parametrize("refusal", [None, DomainError(Reason.UNKNOWN_LEARNER, "restarted")])
async def test_an_outage_and_its_end_are_told_once(
    connection: Connection, told: list[str], refusal: DomainError | None
) -> None:
    """Also where the service answers with a refusal."""
    service = Service(refusal)
    assert connection.waiting_for == ""
    calls = [asyncio.create_task(connection.call(service, Empty(), timeout=1)) for _ in range(5)]
    await until(lambda: bool(told))
    assert told == [f"waiting for {ADDRESS}: gone"] and connection.waiting_for == told[0]
    service.is_up = True
    answers = await asyncio.gather(*calls, return_exceptions=True)
    assert answers == ["well"] * 5 or {type(answer) for answer in answers} == {DomainError}
    assert told[1:] == [f"{ADDRESS} answers again, after 0 s"] and connection.waiting_for == ""


async def test_a_stream_waits_as_a_call_does(connection: Connection, told: list[str]) -> None:
    service = Service()

    async def first() -> str:
        method: Any = lambda request, **_: Streamed(service)  # noqa: E731
        async with connection.stream(method, Empty(), timeout=1) as parts:
            part: str = await anext(parts)
            assert connection.waiting_for == "", "it has an answer"
            return part

    call = asyncio.create_task(first())
    await until(lambda: bool(connection.waiting_for))
    service.is_up = True
    assert await call == "well" and len(told) == 2


async def test_nothing_waits_after_calls_were_given_up(connection: Connection, told: list[str]) -> None:
    hasty = Connection(Endpoint(ADDRESS, outage_seconds=0.2), told.append)
    with pytest.raises(ServiceUnavailable):
        await hasty.call(Service(), Empty(), timeout=1)
    await hasty.close()
    assert hasty.waiting_for == "" and told == [f"waiting for {ADDRESS}: gone"]
    call = asyncio.create_task(connection.call(Service(), Empty(), timeout=1))
    await until(lambda: bool(connection.waiting_for))
    call.cancel()
    await asyncio.wait([call])
    assert connection.waiting_for == "" and len(told) == 2, "nobody said that it answers"


async def test_a_run_s_connection_is_part_of_its_service_s(connection: Connection, told: list[str]) -> None:
    """They share the channel."""
    service = Service()
    call = asyncio.create_task(connection.call(service, Empty(), timeout=1))
    await until(lambda: bool(told))
    of_run = connection.with_run_credential("credential")
    other = asyncio.create_task(of_run.call(service, Empty(), timeout=1))
    await asyncio.sleep(0.1)
    assert connection.waiting_for == of_run.waiting_for == told[0]
    service.is_up = True
    await asyncio.gather(call, other)
    assert connection.waiting_for == of_run.waiting_for == "" and len(told) == 2


async def test_a_service_that_answers_others_is_not_waited_for(
    connection: Connection, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is full, and those that wait are no reason why a run stands still."""
    call = asyncio.create_task(connection.call(Service(), Empty(), timeout=1))
    await until(lambda: bool(connection.waiting_for))
    monkeypatch.setattr(waits, "_SHOWN_AFTER_SECONDS", 60.0)
    up = Service()
    up.is_up = True
    assert await connection.call(up, Empty(), timeout=1) == "well"
    assert connection.waiting_for == "" and told == [f"waiting for {ADDRESS}: gone"]
    call.cancel()
    await asyncio.wait([call])


@pytest.mark.parametrize("connect", [env_replicas.connect, policy_replicas.connect])
async def test_several_servers_are_waited_for_as_one(connect: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waits, "_SHOWN_AFTER_SECONDS", 0.0)
    client = connect(Endpoint("127.0.0.1:1,127.0.0.1:2", outage_seconds=30))
    ask = client.list_environments if hasattr(client, "list_environments") else client.info
    call = asyncio.create_task(ask())
    await until(lambda: bool(client.waiting_for))
    assert client.waiting_for.startswith("waiting for 127.0.0.1:1,127.0.0.1:2: 127.0.0.1:1: ")
    call.cancel()
    await asyncio.wait([call])
    assert client.waiting_for == ""
    await client.close()
