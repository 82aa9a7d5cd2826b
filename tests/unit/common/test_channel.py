"""When a client calls again by itself, and when it says what it was told."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import grpc
import pytest
from google.protobuf.empty_pb2 import Empty

from mulligan.common.channel import Connection, Endpoint, UnprotectedToken, check_protection
from mulligan.common.errors import DomainError, Reason, ServiceUnavailable
from mulligan.common.status import to_status
from mulligan.common.tls import ClientTls
from mulligan.env.v1 import env_service_pb2 as pb

SOON = timedelta(milliseconds=1)


def test_a_token_is_not_shown() -> None:
    assert "secret" not in repr(Endpoint("127.0.0.1:50051", token="secret"))


class Method:
    """Answers with these errors, then well."""

    def __init__(self, *errors: DomainError):
        self.left = list(errors)
        self.calls = 0

    async def __call__(self, request: Any, **options: Any) -> str:
        self.calls += 1
        if not self.left:
            return "well"
        status = to_status(self.left.pop(0))
        raise grpc.aio.AioRpcError(
            status.code,
            grpc.aio.Metadata(),
            grpc.aio.Metadata(*status.trailing_metadata),
            status.details,
        )


async def call(method: Method, outage_seconds: float = 60) -> Any:
    connection = Connection(Endpoint("127.0.0.1:1", outage_seconds=outage_seconds))
    try:
        return await connection.call(method, Empty(), timeout=1)
    finally:
        await connection.close()


@pytest.mark.parametrize("reason", [Reason.QUEUE_FULL, Reason.ENGINE_UNAVAILABLE])
async def test_a_call_that_is_to_come_again_later_does(reason: Reason) -> None:
    method = Method(*[DomainError(reason, "later", retry_after=SOON)] * 2)
    assert await call(method) == "well" and method.calls == 3
    with pytest.raises(ServiceUnavailable, match=f"{reason}: later"):
        await call(Method(DomainError(reason, "later", retry_after=SOON)), outage_seconds=0)


@pytest.mark.parametrize("reason", [Reason.ENGINE_UNAVAILABLE, Reason.POLICY_REFUSED, Reason.CAPACITY_REACHED])
async def test_without_a_time_to_come_again_it_is_the_answer(reason: Reason) -> None:
    method = Method(DomainError(reason, "no"))
    with pytest.raises(DomainError) as caught:
        await call(method)
    assert caught.value.reason is reason and method.calls == 1


async def pages(request: pb.ListTasksRequest, **_: Any) -> pb.ListTasksResponse:
    """A list of seven tasks, in pages of at most three."""
    begin = int(request.page_token or 0)
    end = min(begin + min(request.page_size, 3), 7)
    tasks = [pb.TaskInfo(task_id=str(number)) for number in range(begin, end)]
    return pb.ListTasksResponse(tasks=tasks, next_page_token=str(end) if end < 7 else "")


@pytest.mark.parametrize("limit", range(9))
@pytest.mark.parametrize("size", [1, 2, 3, 100])
async def test_a_listing_has_the_first_items_or_all(limit: int, size: int) -> None:
    connection = Connection(Endpoint("127.0.0.1:1"))
    found = await connection.list_items(
        pages, pb.ListTasksRequest(page_size=size), lambda page: [*page.tasks], timeout=1, limit=limit
    )
    await connection.close()
    assert [task.task_id for task in found] == [str(number) for number in range(min(limit or 7, 7))]


def test_an_endpoint_is_shown_without_its_token() -> None:
    shown = repr(Endpoint("host:1", "hunter2"))
    assert "host:1" in shown and "hunter2" not in shown


@pytest.mark.parametrize("address", ["10.0.0.7:50051", "env:50051", "dns:///env:50051", "127.0.0.1:1,10.0.0.7:1"])
def test_a_token_goes_to_another_machine_over_tls_alone(address: str) -> None:
    with pytest.raises(UnprotectedToken, match="would cross the network without TLS"):
        check_protection(Endpoint(address, token="a-token"))
    check_protection(Endpoint(address))
    check_protection(Endpoint(address, token="a-token", tls=ClientTls()))
    check_protection(Endpoint(address, token="a-token", insecure=True))


@pytest.mark.parametrize("address", ["localhost:1", "127.0.0.1:50051-50053", "[::1]:50051", "unix:/run/env"])
def test_on_this_machine_a_token_needs_no_tls(address: str) -> None:
    check_protection(Endpoint(address, token="a-token"))


async def test_a_connection_does_not_begin_where_others_could_read_its_token() -> None:
    with pytest.raises(UnprotectedToken, match=r"10\.0\.0\.7:50051"):
        Connection(Endpoint("10.0.0.7:50051", token="a-token"))
