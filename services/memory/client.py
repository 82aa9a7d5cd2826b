"""The memory service as the trainer's `MemoryPort`, and what the command line asks of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mulligan.common.channel import Connection, Endpoint, is_for_later
from mulligan.common.errors import CallFailed, DomainError
from mulligan.common.numbers import not_negative
from mulligan.common.reflections import (
    Addition,
    Explained,
    Labels,
    MemoryChange,
    Provenance,
    ReflectionQuery,
    ReflectionStatus,
    Retrieved,
    StoredReflection,
    Trial,
    UseOutcome,
)
from mulligan.memory import wire
from mulligan.memory.v1 import memory_service_pb2 as pb
from mulligan.memory.v1 import memory_service_pb2_grpc as pb_grpc

_PAGE_SIZE = 1000
_OUTCOMES = 1000  # of one call
_ADDITIONS = 1000  # of one call
_ADDED_BYTES = 8 * 2**20  # of their texts, unless one alone is larger


class MemoryClient:
    """`timeout` bounds each call, in seconds. Every method raises DomainError with the reasons that the contract
    declares, CallFailed, also for an answer that violates the contract, and ServiceUnavailable."""

    def __init__(self, endpoint: Endpoint, *, timeout: float = 30.0, on_outage: Callable[[str], None] | None = None):
        self._connection = Connection(endpoint, on_outage)
        self._stub = pb_grpc.MemoryServiceStub(self._connection.channel)
        self._timeout = timeout
        self._adds_many = True  # as far as is known: servers may leave AddReflections out

    def with_run_credential(self, credential: str | Callable[[], str]) -> MemoryClient:
        """One for a run, over the same connection, which this client closes."""
        found = copy.copy(self)
        found._connection = self._connection.with_run_credential(credential)
        return found

    @property
    def waiting_for(self) -> str:
        """What calls wait for now; "" if none does."""
        return self._connection.waiting_for

    async def snapshot(self, scope: str) -> int:
        """The scope's version; 0 while it has no writes."""
        response = await self._call(self._stub.GetSnapshot, pb.GetSnapshotRequest(scope=scope))
        return self._connection.read(_version, response)

    async def query(self, query: ReflectionQuery, trial: Trial | None = None) -> Retrieved:
        """At most `query.limit` (1 to 100) entries, best first. With a trial, uses of them are drawn."""
        response = await self._call(self._stub.QueryReflections, wire.query_to_proto(query, trial))
        keys = () if trial is None else trial.use_keys
        return self._connection.read(lambda answer: wire.retrieved_from_proto(answer, keys), response)

    async def report(self, outcomes: Sequence[UseOutcome]) -> int:
        """Records the rewards of uses, in calls of at most 1,000. Returns how many counted; the others had been
        reported before."""
        counted = 0

        def read(answer: pb.ReportOutcomeResponse) -> int:
            not_negative("counted", [answer.counted])
            return answer.counted

        for start in range(0, len(outcomes), _OUTCOMES):
            part = outcomes[start : start + _OUTCOMES]
            request = pb.ReportOutcomeRequest(
                outcomes=[pb.UseOutcome(use_id=one.use_id, reward=one.reward) for one in part]
            )
            counted += self._connection.read(read, await self._call(self._stub.ReportOutcome, request))
        return counted

    async def add(
        self,
        request_id: str,
        scope: str,
        text: str,
        provenance: Provenance,
        labels: Labels | None = None,
        embedding: Sequence[float] = (),
        *,
        unless_known: bool = False,
    ) -> str:
        """Stores a reflection and returns its id. A repeated request id changes nothing. With `unless_known` nothing is
        stored if an entry of the scope has this environment, kind and text: the answer is its id."""
        request = wire.addition_to_proto(request_id, scope, text, provenance, labels or Labels())
        request.embedding.extend(embedding)
        request.unless_known = unless_known
        response: pb.AddReflectionResponse = await self._call(self._stub.AddReflection, request)
        return response.reflection_id

    async def add_all(self, additions: Sequence[Addition]) -> list[str]:
        """Adds them in this order, each as `add` does, and returns their ids. Raises the first error; the others are
        added all the same, unless the server is of an earlier release: then those after it are not. What the server
        asks to send later comes after the others of its call."""
        found: list[str] = []
        for part in _parts(additions):
            found += await self._add_part(part)
        return found

    async def _add_part(self, part: Sequence[Addition]) -> list[str]:
        requests = [
            wire.addition_to_proto(one.request_id, one.scope, one.text, one.provenance, one.labels) for one in part
        ]
        for one, request in zip(part, requests, strict=True):
            request.unless_known = one.unless_known
        if len(part) > 1 and self._adds_many:
            try:
                answer = await self._call(self._stub.AddReflections, pb.AddReflectionsRequest(reflections=requests))
            except CallFailed as error:
                if error.code != "UNIMPLEMENTED":
                    raise
                self._adds_many = False
            else:
                address = self._connection.endpoint.address
                found = self._connection.read(lambda given: wire.added_from_proto(given, len(part), address), answer)
                return [await self._added(one, request) for one, request in zip(found, requests, strict=True)]
        return [(await self._call(self._stub.AddReflection, request)).reflection_id for request in requests]

    async def _added(self, found: str | DomainError | CallFailed, request: pb.AddReflectionRequest) -> str:
        if isinstance(found, str):
            return found
        if isinstance(found, DomainError) and is_for_later(found):  # AddReflection waits and tries again
            response: pb.AddReflectionResponse = await self._call(self._stub.AddReflection, request)
            return response.reflection_id
        raise found

    async def get(self, reflection_id: str) -> StoredReflection:
        response = await self._call(self._stub.GetReflection, pb.GetReflectionRequest(reflection_id=reflection_id))
        return self._connection.read(lambda answer: wire.reflection_from_proto(answer.reflection), response)

    async def list(
        self,
        scope: str = "",
        limit: int = 0,
        *,
        include_deleted: bool = False,
        on_progress: Callable[[int], None] = lambda read: None,
    ) -> list[StoredReflection]:
        """The first `limit` reflections, oldest first. 0 means all; an empty scope means every scope. `on_progress`
        gets how many were read so far."""
        request = pb.ListReflectionsRequest(scope=scope, page_size=_PAGE_SIZE, include_deleted=include_deleted)
        read = 0

        def of_page(page: pb.ListReflectionsResponse) -> list[StoredReflection]:
            nonlocal read
            found = _reflections(page)
            read += len(found)
            on_progress(read)
            return found

        return await self._connection.list_items(
            self._stub.ListReflections, request, of_page, timeout=self._timeout, limit=limit
        )

    async def revise(
        self,
        reflection_id: str,
        request_id: str,
        expected_revision: int,
        *,
        text: str | None = None,
        key: str | None = None,
        tags: Sequence[str] | None = None,
        status: ReflectionStatus | None = None,
        embedding: Sequence[float] = (),
    ) -> int:
        """Rewrites what is given, and returns the new revision. `status` is RETIRED or CANDIDATE."""
        request = pb.ReviseReflectionRequest(
            reflection_id=reflection_id,
            request_id=request_id,
            expected_revision=expected_revision,
            text=text,
            key=key,
            tags=None if tags is None else pb.TagList(tags=tags),
            status=None if status is None else wire.number(status),
            embedding=embedding,
        )
        response = await self._call(self._stub.ReviseReflection, request)
        return self._connection.read(_revision, response)

    async def delete(self, reflection_id: str, expected_revision: int = 0) -> int:
        """Deletes a reflection. Returns the scope's version from which it is gone. Raises REVISION_CONFLICT where its
        newest revision is not the expected one; 0 expects any."""
        request = pb.DeleteReflectionRequest(reflection_id=reflection_id, expected_revision=expected_revision)
        return self._connection.read(_version, await self._call(self._stub.DeleteReflection, request))

    async def erase(self, reflection_id: str, expected_revision: int = 0) -> int:
        """Erases a reflection's text for good. Returns the scope's version from which it is gone. Raises as `delete`
        does."""
        request = pb.EraseReflectionRequest(reflection_id=reflection_id, expected_revision=expected_revision)
        return self._connection.read(_version, await self._call(self._stub.EraseReflection, request))

    async def explain(self, reflection_id: str, max_uses: int = 100) -> Explained:
        """Why a reflection has its status, with its latest uses, 1 to 1,000."""
        request = pb.ExplainReflectionRequest(reflection_id=reflection_id, max_uses=max_uses)
        response = await self._call(self._stub.ExplainReflection, request)
        return self._connection.read(wire.explained_from_proto, response)

    async def changes(self, scope: str = "", limit: int = 0) -> Sequence[MemoryChange]:
        """The first `limit` writes, oldest first. 0 means all; an empty scope means every scope."""
        request = pb.ListChangesRequest(scope=scope, page_size=_PAGE_SIZE)
        return await self._connection.list_items(
            self._stub.ListChanges, request, _changes, timeout=self._timeout, limit=limit
        )

    async def close(self) -> None:
        await self._connection.close()

    async def _call(self, method: Callable[..., Any], request: Any) -> Any:
        return await self._connection.call(method, request, timeout=self._timeout)


def _parts(additions: Sequence[Addition]) -> Iterator[list[Addition]]:
    """Splits by the limits of one call, in order."""
    part: list[Addition] = []
    size = 0
    for one in additions:
        more = len(one.text.encode())
        if part and (len(part) == _ADDITIONS or size + more > _ADDED_BYTES):
            yield part
            part, size = [], 0
        part.append(one)
        size += more
    if part:
        yield part


def _version(response: pb.GetSnapshotResponse | pb.DeleteReflectionResponse | pb.EraseReflectionResponse) -> int:
    not_negative("version", [response.version])
    return response.version


def _revision(response: pb.ReviseReflectionResponse) -> int:
    not_negative("revision", [response.revision])
    return response.revision


def _reflections(response: pb.ListReflectionsResponse) -> list[StoredReflection]:
    return [wire.reflection_from_proto(reflection) for reflection in response.reflections]


def _changes(response: pb.ListChangesResponse) -> list[MemoryChange]:
    return [wire.change_from_proto(change) for change in response.changes]
