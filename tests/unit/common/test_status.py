"""Errors over gRPC: what another program's error must have to be one of ours."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from mulligan.common.channel import Endpoint
from mulligan.common.disk import free_bytes
from mulligan.common.errors import CallFailed, DomainError, Reason
from mulligan.common.status import domain_error, to_status
from mulligan.memory.client import MemoryClient
from mulligan.memory.v1 import memory_service_pb2_grpc

FULL = {"folder": "/elsewhere", "free_bytes": "0", "needed_bytes": "12"}


@pytest.mark.parametrize(
    ("reason", "metadata"),
    [
        ("DISK_FULL", {}),
        *(("DISK_FULL", {name: value for name, value in FULL.items() if name != lacking}) for lacking in FULL),
        ("DISK_FULL", FULL | {"free_bytes": "-1"}),
        ("DISK_FULL", FULL | {"needed_bytes": "many"}),
        ("DISK_FULL", FULL | {"needed_bytes": "9" * 5000}),
        ("DISK_FULL", FULL | {"folder": ""}),
        ("FOLDER_REMOVED", {}),
    ],
)
def test_an_error_without_the_metadata_that_its_reason_promises_is_none_of_ours(
    reason: str, metadata: Mapping[str, str]
) -> None:
    assert domain_error(reason, "as another program says", metadata) is None


def test_an_error_with_its_metadata_is_as_it_was_raised() -> None:
    error = domain_error("DISK_FULL", "full", FULL | {"more": "x"})
    assert error is not None and error.reason is Reason.DISK_FULL and error.metadata == FULL | {"more": "x"}
    assert domain_error("UNKNOWN_RUN", "no such run", {}) is not None, "what nobody has to have may be left out"


def test_metadata_of_another_program_may_have_any_names() -> None:
    error = DomainError(Reason.UNKNOWN_POLICY, "no", retry_after=timedelta(seconds=1))
    error.metadata = {"reason": "r", "message": "m", "retry_after": "s", "self": "x"}
    told = error.told("field: no", field="policies.actor")
    assert told.metadata == error.metadata | {"field": "policies.actor"}
    assert (told.reason, told.message, told.retry_after) == (error.reason, "field: no", error.retry_after)


def test_the_room_beside_a_folder_that_cannot_be_here_is_that_of_the_next_one_above() -> None:
    assert free_bytes(Path("/") / ("x" * 5000) / "runs") > 0


async def test_a_client_gets_such_an_error_as_a_failed_call() -> None:
    class Full(memory_service_pb2_grpc.MemoryServiceServicer):
        async def GetSnapshot(self, request: Any, context: Any) -> Any:
            error = DomainError(Reason.DISK_FULL, "no room")
            error.metadata = given
            await context.abort_with_status(to_status(error))

    given: dict[str, str] = {}
    server = grpc.aio.server()
    memory_service_pb2_grpc.add_MemoryServiceServicer_to_server(Full(), server)  # type: ignore[abstract]  # the one call that is made
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    client = MemoryClient(Endpoint(f"127.0.0.1:{port}"))
    try:
        with pytest.raises(CallFailed, match=r"GetSnapshot at .* failed: RESOURCE_EXHAUSTED: no room"):
            await client.snapshot("scope")
        given = dict(FULL)
        with pytest.raises(DomainError, match="DISK_FULL: no room") as caught:
            await client.snapshot("scope")
        assert caught.value.metadata == FULL
    finally:
        await client.close()
        await server.stop(None)
