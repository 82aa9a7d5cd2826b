"""The memory service on the wire: protobuf in, the store, protobuf out."""

from __future__ import annotations

from typing import Any

import grpc

from mulligan.common.paging import DEFAULT_PAGE_SIZE, page_position, page_token
from mulligan.common.reflections import Provenance, RetrievalStrategy, StoredReflection
from mulligan.memory.store import Store
from mulligan.memory.v1 import memory_service_pb2 as pb
from mulligan.memory.v1 import memory_service_pb2_grpc as pb_grpc

SERVICE = "mulligan.memory.v1.MemoryService"
_STRATEGIES = {
    pb.RETRIEVAL_STRATEGY_LATEST_SUCCESS: RetrievalStrategy.LATEST_SUCCESS,
    pb.RETRIEVAL_STRATEGY_TOP_GAIN: RetrievalStrategy.TOP_GAIN,
}


def add_to_server(server: grpc.aio.Server, store: Store) -> list[str]:
    pb_grpc.add_MemoryServiceServicer_to_server(MemoryServicer(store), server)
    return [SERVICE]


class MemoryServicer(pb_grpc.MemoryServiceServicer):
    def __init__(self, store: Store):
        self._store = store

    async def AddReflection(self, request: pb.AddReflectionRequest, context: Any) -> pb.AddReflectionResponse:
        provenance = _provenance(request.provenance)
        added = await self._store.add(request.request_id, request.scope, request.text, provenance)
        return pb.AddReflectionResponse(reflection_id=added.reflection_id, version=added.version)

    async def QueryReflections(self, request: pb.QueryReflectionsRequest, context: Any) -> pb.QueryReflectionsResponse:
        found = await self._store.query(
            request.scope,
            request.environment,
            _STRATEGIES[request.strategy],
            request.limit or 1,
            request.as_of_version if request.HasField("as_of_version") else None,
        )
        return pb.QueryReflectionsResponse(
            reflections=[_reflection(reflection) for reflection in found.reflections], version=found.version
        )

    async def GetReflection(self, request: pb.GetReflectionRequest, context: Any) -> pb.GetReflectionResponse:
        return pb.GetReflectionResponse(reflection=_reflection(await self._store.get(request.reflection_id)))

    async def ListReflections(self, request: pb.ListReflectionsRequest, context: Any) -> pb.ListReflectionsResponse:
        listing = (request.scope, request.include_deleted)
        position = page_position(request.page_token, *listing)
        size = request.page_size or DEFAULT_PAGE_SIZE
        page = await self._store.list(request.scope, position, size, request.include_deleted)
        return pb.ListReflectionsResponse(
            reflections=[_reflection(reflection) for reflection in page.reflections],
            next_page_token="" if page.next_position is None else page_token(page.next_position, *listing),
        )

    async def DeleteReflection(self, request: pb.DeleteReflectionRequest, context: Any) -> pb.DeleteReflectionResponse:
        return pb.DeleteReflectionResponse(version=await self._store.delete(request.reflection_id))

    async def GetSnapshot(self, request: pb.GetSnapshotRequest, context: Any) -> pb.GetSnapshotResponse:
        snapshot = await self._store.snapshot(request.scope)
        return pb.GetSnapshotResponse(version=snapshot.version, reflection_count=snapshot.reflection_count)


def _provenance(provenance: pb.Provenance) -> Provenance:
    return Provenance(
        run_id=provenance.run_id,
        experience_id=provenance.experience_id,
        environment=provenance.environment,
        task_id=provenance.task_id,
        policy_version=provenance.policy_version,
        reward_before=provenance.reward_before,
        reward_after=provenance.reward_after,
        success=provenance.success,
    )


def _reflection(reflection: StoredReflection) -> pb.StoredReflection:
    origin = reflection.provenance
    message = pb.StoredReflection(
        reflection_id=reflection.reflection_id,
        scope=reflection.scope,
        text=reflection.text,
        provenance=pb.Provenance(
            run_id=origin.run_id,
            experience_id=origin.experience_id,
            environment=origin.environment,
            task_id=origin.task_id,
            policy_version=origin.policy_version,
            reward_before=origin.reward_before,
            reward_after=origin.reward_after,
            success=origin.success,
        ),
        version=reflection.version,
        deleted_version=reflection.deleted_version,
    )
    message.created_at.FromDatetime(reflection.created_at)
    return message
