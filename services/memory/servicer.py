"""The memory service on the wire: protobuf in, the store, protobuf out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal
from urllib.parse import unquote

import grpc

from mulligan.common.errors import DomainError, invalid_field
from mulligan.common.paging import DEFAULT_PAGE_SIZE, page_position, page_token
from mulligan.common.reflections import (
    Explained,
    Labels,
    ReflectionKind,
    ReflectionQuery,
    ReflectionStatus,
    RetrievalStrategy,
    Retrieved,
    StoredReflection,
    Trial,
    UseOutcome,
)
from mulligan.common.run_credentials import RunGuard
from mulligan.common.status import fill_item_error
from mulligan.common.tasks import gather_or_cancel
from mulligan.memory import metrics, wire
from mulligan.memory.embedder import Embedder
from mulligan.memory.retrieval import retrieve
from mulligan.memory.store import ANSWER_BYTES, Added, NewReflection, Rewriting, Store, add_all
from mulligan.memory.trials import with_uses
from mulligan.memory.v1 import memory_service_pb2 as pb
from mulligan.memory.v1 import memory_service_pb2_grpc as pb_grpc
from mulligan.memory.vectors import Vectors

SERVICE = "mulligan.memory.v1.MemoryService"
_ACTOR = "mulligan-actor"
_ACTOR_CHARACTERS = 200
_USES = 100
_REWRITTEN: tuple[Literal["text", "key", "tags", "status"], ...] = ("text", "key", "tags", "status")
_SOURCES = 1000


def add_to_server(
    server: grpc.aio.Server, store: Store, embedder: Embedder | None = None, guard: RunGuard | None = None
) -> list[str]:
    """`store` has this embedder already (`Store.use_embedder`). `guard` knows who may write to which scope."""
    pb_grpc.add_MemoryServiceServicer_to_server(MemoryServicer(store, embedder, guard), server)
    return [SERVICE]


class MemoryServicer(pb_grpc.MemoryServiceServicer):
    def __init__(self, store: Store, embedder: Embedder | None = None, guard: RunGuard | None = None):
        self._store = store
        self._guard = guard or RunGuard()
        self._vectors = Vectors(embedder)

    async def AddReflection(self, request: pb.AddReflectionRequest, context: Any) -> pb.AddReflectionResponse:
        self._guard.check_scopes(context, request.scope)
        [added] = await self._added([request], context)
        if isinstance(added, DomainError):
            raise added
        return added

    async def AddReflections(self, request: pb.AddReflectionsRequest, context: Any) -> pb.AddReflectionsResponse:
        self._guard.check_scopes(context, *dict.fromkeys(one.scope for one in request.reflections))
        return pb.AddReflectionsResponse(items=map(_item, await self._added(request.reflections, context)))

    async def _added(
        self, requests: Sequence[pb.AddReflectionRequest], context: Any
    ) -> list[pb.AddReflectionResponse | DomainError]:
        """The answer or the error of each, in order."""
        made = await gather_or_cancel(self._new(request, context) for request in requests)
        answers = iter(await add_all(self._store, [new for new in made if isinstance(new, NewReflection)]))
        found = [next(answers) if isinstance(new, NewReflection) else new for new in made]
        metrics.ADDED.inc(sum(isinstance(one, Added) for one in found))
        return [
            pb.AddReflectionResponse(reflection_id=one.reflection_id, version=one.version)
            if isinstance(one, Added)
            else one
            for one in found
        ]

    async def _new(self, request: pb.AddReflectionRequest, context: Any) -> NewReflection | DomainError:
        """What is to be stored, or why it cannot be."""
        labels = Labels(
            kind=wire.named(ReflectionKind, request.kind, ReflectionKind.RULE),
            key=request.key,
            tags=tuple(request.tags),
            source_ids=tuple(request.source_ids),
        )
        try:
            embedding = await self._vectors.of(request.text, request.embedding)
        except DomainError as error:
            return error
        return NewReflection(
            request_id=request.request_id,
            scope=request.scope,
            text=request.text,
            provenance=wire.provenance_from_proto(request.provenance),
            labels=labels,
            embedding=embedding,
            actor=_actor(context),
            unless_known=request.unless_known,
        )

    async def QueryReflections(self, request: pb.QueryReflectionsRequest, context: Any) -> pb.QueryReflectionsResponse:
        if request.HasField("trial"):  # its uses are written down
            self._guard.check_scopes(context, request.scope)
        query = await self._with_embedding(wire.query_from_proto(request))
        found = await retrieve(query, self._store)
        metrics.RETRIEVED.inc(len(found.reflections))
        if request.HasField("trial"):
            trial = Trial(tuple(request.trial.use_keys), request.trial.holdout, request.trial.seed)
            return wire.retrieved_to_proto(await with_uses(found, query.scope, trial, self._store))
        return wire.retrieved_to_proto(Retrieved(found.reflections, found.version))

    async def _with_embedding(self, query: ReflectionQuery) -> ReflectionQuery:
        """The query with what its strategy needs. Raises INVALID_FIELD for what is missing, and NO_EMBEDDER."""
        strategies = _checked_strategies(query)
        if RetrievalStrategy.SIMILAR_MEANING in strategies:
            self._vectors.require()
            return replace(query, embedding=await self._vectors.of(query.text, query.embedding))
        if query.embedding:
            self._vectors.unit(query.embedding)
        return query

    async def GetReflection(self, request: pb.GetReflectionRequest, context: Any) -> pb.GetReflectionResponse:
        return pb.GetReflectionResponse(
            reflection=wire.reflection_to_proto(await self._store.get(request.reflection_id))
        )

    async def ListReflections(self, request: pb.ListReflectionsRequest, context: Any) -> pb.ListReflectionsResponse:
        listing = (request.scope, request.include_deleted)
        position = page_position(request.page_token, *listing)
        size = request.page_size or DEFAULT_PAGE_SIZE
        page = await self._store.list(request.scope, position, size, request.include_deleted)
        return pb.ListReflectionsResponse(
            reflections=map(wire.reflection_to_proto, page.reflections),
            next_page_token="" if page.next_position is None else page_token(page.next_position, *listing),
        )

    async def ReviseReflection(self, request: pb.ReviseReflectionRequest, context: Any) -> pb.ReviseReflectionResponse:
        if not any(map(request.HasField, _REWRITTEN)):
            raise invalid_field("text", "at least one of text, key, tags and status")
        text = request.text if request.HasField("text") else None
        if text is None and request.embedding:
            raise invalid_field("embedding", "none without a text")
        await self._check_scope_of(request.reflection_id, context)
        rewriting = Rewriting(
            reflection_id=request.reflection_id,
            request_id=request.request_id,
            expected_revision=request.expected_revision,
            text=text,
            key=request.key if request.HasField("key") else None,
            tags=tuple(request.tags.tags) if request.HasField("tags") else None,
            status=wire.named(ReflectionStatus, request.status) if request.HasField("status") else None,
            embedding=() if text is None else await self._vectors.of(text, request.embedding),
            actor=_actor(context),
        )
        revised = await self._store.revise(rewriting)
        return pb.ReviseReflectionResponse(revision=revised.revision, version=revised.version)

    async def DeleteReflection(self, request: pb.DeleteReflectionRequest, context: Any) -> pb.DeleteReflectionResponse:
        await self._check_scope_of(request.reflection_id, context)
        version = await self._store.delete(request.reflection_id, _actor(context), request.expected_revision)
        return pb.DeleteReflectionResponse(version=version)

    async def EraseReflection(self, request: pb.EraseReflectionRequest, context: Any) -> pb.EraseReflectionResponse:
        await self._check_scope_of(request.reflection_id, context)
        version = await self._store.erase(request.reflection_id, _actor(context), request.expected_revision)
        return pb.EraseReflectionResponse(version=version)

    async def GetSnapshot(self, request: pb.GetSnapshotRequest, context: Any) -> pb.GetSnapshotResponse:
        snapshot = await self._store.snapshot(request.scope)
        return pb.GetSnapshotResponse(version=snapshot.version, reflection_count=snapshot.reflection_count)

    async def ReportOutcome(self, request: pb.ReportOutcomeRequest, context: Any) -> pb.ReportOutcomeResponse:
        outcomes = [UseOutcome(outcome.use_id, outcome.reward) for outcome in request.outcomes]
        if self._guard.is_set:
            scopes = await self._store.scopes_of_uses([outcome.use_id for outcome in outcomes])
            self._guard.check_scopes(context, *scopes)
        counted = await self._store.report(outcomes, _actor(context))
        metrics.REPORTED.inc(counted)
        return pb.ReportOutcomeResponse(counted=counted)

    async def _check_scope_of(self, reflection_id: str, context: Any) -> None:
        """That the caller may write to the scope of the entry. Raises UNKNOWN_REFLECTION and RUN_CREDENTIAL."""
        if self._guard.is_set:
            self._guard.check_scopes(context, (await self._store.get(reflection_id)).scope)

    async def ExplainReflection(
        self, request: pb.ExplainReflectionRequest, context: Any
    ) -> pb.ExplainReflectionResponse:
        reflection = await self._store.get(request.reflection_id)
        explained = Explained(
            reflection=reflection,
            uses=await self._store.uses_of(reflection.reflection_id, request.max_uses or _USES),
            sources=await self._sources(reflection),
            derived_ids=await self._store.derived_from(reflection.reflection_id),
        )
        return wire.explained_to_proto(explained)

    async def _sources(self, reflection: StoredReflection) -> Sequence[StoredReflection]:
        """What it was made from, and what that was made from, nearest first, each once."""
        found: dict[str, StoredReflection] = {}
        left = ANSWER_BYTES
        waiting = list(reflection.source_ids)
        for identity in waiting:  # grows meanwhile
            if identity in found:
                continue
            source = await self._store.get(identity)
            left -= len(source.text.encode())
            if left < 0 or len(found) == _SOURCES:
                break
            found[identity] = source
            waiting += source.source_ids
        return tuple(found.values())

    async def ListChanges(self, request: pb.ListChangesRequest, context: Any) -> pb.ListChangesResponse:
        listing = ("changes", request.scope)
        position = page_position(request.page_token, *listing)
        page = await self._store.changes(request.scope, position, request.page_size or DEFAULT_PAGE_SIZE)
        return pb.ListChangesResponse(
            changes=map(wire.change_to_proto, page.changes),
            next_page_token="" if page.next_position is None else page_token(page.next_position, *listing),
        )


def _item(answer: pb.AddReflectionResponse | DomainError) -> pb.AddReflectionsResponse.Item:
    if isinstance(answer, pb.AddReflectionResponse):
        return pb.AddReflectionsResponse.Item(added=answer)
    item = pb.AddReflectionsResponse.Item()
    fill_item_error(item.error, answer)
    return item


def _checked_strategies(query: ReflectionQuery) -> set[RetrievalStrategy]:
    """The strategies that the query asks for. Raises INVALID_FIELD for a field that one of them needs."""
    if query.strategy is RetrievalStrategy.MIX and not query.mix:
        raise invalid_field("mix", "at least one part, for MIX")
    if query.strategy is not RetrievalStrategy.MIX and query.mix:
        raise invalid_field("mix", f"no parts, as the strategy is {query.strategy.name}, not MIX")
    found = {query.strategy, *(part.strategy for part in query.mix)}
    if RetrievalStrategy.BY_KEY in found and not query.key:
        raise invalid_field("key", "the key of the entries that BY_KEY finds")
    if RetrievalStrategy.SIMILAR_WORDS in found and not query.text:
        raise invalid_field("text", "a text for SIMILAR_WORDS to compare with")
    if RetrievalStrategy.SIMILAR_MEANING in found and not query.text and not query.embedding:
        raise invalid_field("text", "a text or an embedding for SIMILAR_MEANING to compare with")
    return found


def _actor(context: Any) -> str:
    """Who writes: what the metadata say, else the address of the caller, without its port."""
    said = str(dict(context.invocation_metadata() or ()).get(_ACTOR, ""))
    readable = "".join(one for one in said if one.isprintable())[:_ACTOR_CHARACTERS]
    return readable or _host(context.peer())


def _host(peer: str) -> str:
    """The address in what gRPC calls the peer: ipv4:127.0.0.1:50000, ipv6:%5B::1%5D:50000, unix:path."""
    kind, _, address = peer.partition(":")
    if kind not in ("ipv4", "ipv6"):
        return kind
    return unquote(address).rpartition(":")[0].strip("[]")
