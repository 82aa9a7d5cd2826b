"""Checks of AddReflections: the same as AddReflection, for many reflections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from google.rpc import code_pb2

from mulligan.conformance.memory.entries import BAD_ADDS
from mulligan.conformance.memory.scope import Scope, optional
from mulligan.conformance.report import NotApplicable, Suite, demand
from mulligan.conformance.target import CheckSession
from mulligan.memory.v1 import memory_service_pb2 as pb

suite: Suite[CheckSession] = Suite()
_COUNT = 4


async def added(scope: Scope, requests: Sequence[pb.AddReflectionRequest]) -> list[Any]:
    """The items. Raises NotApplicable where the server leaves the call out."""
    request = pb.AddReflectionsRequest(reflections=requests)
    items = list((await optional(scope.session, "AddReflections", request)).items)
    demand(len(items) == len(requests), f"{len(requests)} items, one per reflection", f"{len(items)}", request)
    for one, item in zip(requests, items, strict=True):
        if item.HasField("added"):
            forget = pb.DeleteReflectionRequest(reflection_id=item.added.reflection_id)
            scope.session.later("DeleteReflection", forget)
        elif item.error.metadata.get("field") == "embedding" and not one.embedding:
            raise NotApplicable("its callers bring embeddings, whose size is not known here")
    return items


@suite.check("AddReflections", "each item is what AddReflection stores, in a version of its own and in their order")
async def same_entries(session: CheckSession) -> None:
    scope = Scope(session)
    requests = [scope.request(f"{n}") for n in range(_COUNT)]
    items = await added(scope, requests)
    for version, (request, item) in enumerate(zip(requests, items, strict=True), 1):
        demand(item.WhichOneof("result") == "added", "an answer for each", item, request)
        demand(item.added.version == version, f"version {version}", item.added, request)
        stored = await scope.get(item.added.reflection_id)
        same = (stored.text, stored.provenance, stored.version) == (request.text, request.provenance, version)
        demand(same, f"what was added, {request}", stored, request)
        again = await session.ask("AddReflection", request)
        demand(again == item.added, f"the first answer, {item.added}", again, request)


@suite.check("AddReflections", "a repeated item returns the first answer and makes no version")
async def repeated(session: CheckSession) -> None:
    scope = Scope(session)
    requests = [scope.request(f"{n}") for n in range(_COUNT)]
    first = await added(scope, requests[:2])
    again = await added(scope, [*requests, requests[-1]])
    demand(again[:2] == first, f"the first answers, {first}", again[:2], requests[0])
    demand(again[-1] == again[-2], "one answer to what a call has twice", again[-1], requests[-1])
    found = await scope.snapshot()
    demand(found == (_COUNT, _COUNT), f"version {_COUNT} with {_COUNT} reflections", f"{found}")


@suite.check("AddReflections", "an item that is refused has the error of AddReflection, and the others are stored")
async def one_refused(session: CheckSession) -> None:
    scope = Scope(session)
    await added(scope, [scope.request("used")])
    requests = [scope.request("a"), scope.request("used", "another text"), scope.request("b")]
    items = await added(scope, requests)
    kinds = [item.WhichOneof("result") for item in items]
    demand(kinds == ["added", "error", "added"], "['added', 'error', 'added']", kinds, requests[1])
    right = (items[1].error.code, items[1].error.reason) == (code_pb2.ALREADY_EXISTS, "REQUEST_CONFLICT")
    demand(right, "ALREADY_EXISTS REQUEST_CONFLICT", items[1].error, requests[1])
    texts = [reflection.text for reflection in (await scope.page()).reflections]
    demand(texts == ["used", "a", "b"], "the others, in their order", texts)


@suite.check("AddReflections", "a malformed call is INVALID_ARGUMENT INVALID_FIELD and named, and stores nothing")
async def malformed(session: CheckSession) -> None:
    scope = Scope(session)
    probe = Scope(session)
    await added(probe, [probe.request("probe")])
    await session.bad_field("AddReflections", pb.AddReflectionsRequest(), "reflections")
    for field, make in BAD_ADDS:
        request = pb.AddReflectionsRequest(reflections=[scope.request("good"), make(scope)])
        await session.bad_field("AddReflections", request, f"reflections[1].{field}")
    demand(await scope.snapshot() == (0, 0), "version 0 with no reflections", f"{await scope.snapshot()}")
