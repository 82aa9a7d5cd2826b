"""The memory service as the trainer's `MemoryPort`, and what the command line asks of it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC

from mulligan.common.channel import Connection, Endpoint
from mulligan.common.numbers import finite, not_negative
from mulligan.common.reflections import Provenance, RetrievalStrategy, StoredReflection
from mulligan.memory.v1 import memory_service_pb2 as pb
from mulligan.memory.v1 import memory_service_pb2_grpc as pb_grpc

_PAGE_SIZE = 1000
_STRATEGIES = {
    RetrievalStrategy.LATEST_SUCCESS: pb.RETRIEVAL_STRATEGY_LATEST_SUCCESS,
    RetrievalStrategy.TOP_GAIN: pb.RETRIEVAL_STRATEGY_TOP_GAIN,
}


class MemoryClient:
    """`timeout` bounds each call, in seconds."""

    def __init__(self, endpoint: Endpoint, *, timeout: float = 30.0, on_outage: Callable[[str], None] | None = None):
        self._connection = Connection(endpoint, on_outage)
        self._stub = pb_grpc.MemoryServiceStub(self._connection.channel)
        self._timeout = timeout

    async def snapshot(self, scope: str) -> int:
        """The scope's version; 0 while it has no writes."""
        request = pb.GetSnapshotRequest(scope=scope)
        response = await self._connection.call(self._stub.GetSnapshot, request, timeout=self._timeout)
        return self._connection.read(_version, response)

    async def query(
        self, scope: str, environment: str, strategy: RetrievalStrategy, limit: int, as_of_version: int | None = None
    ) -> tuple[StoredReflection, ...]:
        """At most `limit` (1 to 100) successful reflections, best first."""
        request = pb.QueryReflectionsRequest(
            scope=scope,
            environment=environment,
            strategy=_STRATEGIES[strategy],
            limit=limit,
            as_of_version=as_of_version,
        )
        response = await self._connection.call(self._stub.QueryReflections, request, timeout=self._timeout)
        return tuple(self._connection.read(_reflections, response))

    async def add(self, request_id: str, scope: str, text: str, provenance: Provenance) -> str:
        """Stores a reflection and returns its id. A repeated request id changes nothing."""
        request = pb.AddReflectionRequest(
            request_id=request_id, scope=scope, text=text, provenance=_provenance(provenance)
        )
        response = await self._connection.call(self._stub.AddReflection, request, timeout=self._timeout)
        return response.reflection_id

    async def get(self, reflection_id: str) -> StoredReflection:
        request = pb.GetReflectionRequest(reflection_id=reflection_id)
        response = await self._connection.call(self._stub.GetReflection, request, timeout=self._timeout)
        return self._connection.read(lambda answer: _reflection(answer.reflection), response)

    async def list(self, scope: str = "", limit: int = 0, *, include_deleted: bool = False) -> list[StoredReflection]:
        """The first `limit` reflections, oldest first. 0 means all; an empty scope means every scope."""
        request = pb.ListReflectionsRequest(scope=scope, page_size=_PAGE_SIZE, include_deleted=include_deleted)
        return await self._connection.list_items(
            self._stub.ListReflections, request, _reflections, timeout=self._timeout, limit=limit
        )

    async def delete(self, reflection_id: str) -> int:
        """Deletes a reflection. Returns the scope's version from which it is gone."""
        request = pb.DeleteReflectionRequest(reflection_id=reflection_id)
        response = await self._connection.call(self._stub.DeleteReflection, request, timeout=self._timeout)
        return response.version

    async def close(self) -> None:
        await self._connection.close()


def _provenance(provenance: Provenance) -> pb.Provenance:
    return pb.Provenance(
        run_id=provenance.run_id,
        experience_id=provenance.experience_id,
        environment=provenance.environment,
        task_id=provenance.task_id,
        policy_version=provenance.policy_version,
        reward_before=provenance.reward_before,
        reward_after=provenance.reward_after,
        success=provenance.success,
    )


def _version(response: pb.GetSnapshotResponse) -> int:
    not_negative("version", [response.version])
    return response.version


def _reflections(
    response: pb.QueryReflectionsResponse | pb.ListReflectionsResponse,
) -> list[StoredReflection]:
    return [_reflection(reflection) for reflection in response.reflections]


def _reflection(message: pb.StoredReflection) -> StoredReflection:
    """Raises ValueError for a reward or version that is not a valid number."""
    origin = message.provenance
    finite("provenance.reward_before", [origin.reward_before])
    finite("provenance.reward_after", [origin.reward_after])
    not_negative("version", [message.version])
    return StoredReflection(
        reflection_id=message.reflection_id,
        scope=message.scope,
        text=message.text,
        provenance=Provenance(
            run_id=origin.run_id,
            experience_id=origin.experience_id,
            environment=origin.environment,
            task_id=origin.task_id,
            policy_version=origin.policy_version,
            reward_before=origin.reward_before,
            reward_after=origin.reward_after,
            success=origin.success,
        ),
        version=message.version,
        created_at=message.created_at.ToDatetime(UTC),
        deleted_version=message.deleted_version if message.HasField("deleted_version") else None,
    )
