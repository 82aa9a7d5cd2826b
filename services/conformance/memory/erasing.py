"""Checks of erasing reflections."""

from __future__ import annotations

from uuid import uuid4

from mulligan.conformance.memory.scope import EXPLORE, SIMILAR_WORDS, optional, with_evidence
from mulligan.conformance.report import Suite, demand
from mulligan.conformance.target import CheckSession
from mulligan.memory.v1 import memory_service_pb2 as pb

suite: Suite[CheckSession] = Suite()


@suite.check("EraseReflection", "text, key and tags are gone, also those of older revisions; the rest stays on record")
async def erased(session: CheckSession) -> None:
    scope = await with_evidence(session)
    request = scope.request("request", "walrus")
    request.MergeFrom(pb.AddReflectionRequest(key="secret", tags=["private"]))
    added = await scope.send(request)
    version = await scope.erase(added.reflection_id)
    demand(version == 2, "version 2", f"version {version}")
    stored = await scope.get(added.reflection_id)
    demand((stored.text, stored.key, list(stored.tags)) == ("", "", []), "no text, key or tags", stored)
    demand(stored.erased_version == 2, "erased_version 2", stored)
    demand(stored.provenance == request.provenance, f"the provenance, {request.provenance}", stored)
    await scope.finds("nothing that is erased", [], 9, EXPLORE)
    await scope.finds("nothing that is erased", [], 9, SIMILAR_WORDS, text="walrus")
    demand(await scope.snapshot() == (2, 0), "version 2 with no reflections", f"{await scope.snapshot()}")
    listed = (await scope.page()).reflections
    demand(not listed, "the list without it", listed)
    again = await session.ask("AddReflection", request)
    demand(again == added, f"the first answer to a repeated addition, {added}", again, request)
    demand(not (await scope.get(added.reflection_id)).text, "no text afterwards", "the text is back")


@suite.check("EraseReflection", "an older version that had it is DATA_LOSS SNAPSHOT_REDACTED, and others can be read")
async def redacted(session: CheckSession) -> None:
    scope = await with_evidence(session)
    await scope.add("kept")
    added = await scope.add("gone")
    await scope.add("later")
    await scope.delete(added.reflection_id)
    await scope.erase(added.reflection_id)
    for version in (2, 3):
        request = scope.query(9, EXPLORE, as_of_version=version)
        refusal = await session.refused("QueryReflections", request, "DATA_LOSS", "SNAPSHOT_REDACTED", "version")
        demand(refusal.metadata["version"] == "4", "metadata `version` 4, the next that can be read", refusal, request)
    await scope.finds("what was there before it", ["kept"], 9, EXPLORE, as_of_version=1)
    for version in (4, 5):
        await scope.finds("what was left without it", ["later", "kept"], 9, EXPLORE, as_of_version=version)


_REQUESTS = {"DeleteReflection": pb.DeleteReflectionRequest, "EraseReflection": pb.EraseReflectionRequest}


@suite.check("EraseReflection", "as DeleteReflection: a revision that is not the newest is ABORTED REVISION_CONFLICT")
async def another_revision(session: CheckSession) -> None:
    scope = await with_evidence(session)
    added = await scope.add("one")
    await scope.revise(added.reflection_id, 1, key="k")
    for method, kind in _REQUESTS.items():
        request = kind(reflection_id=added.reflection_id, expected_revision=1)
        refusal = await session.refused(method, request, "ABORTED", "REVISION_CONFLICT", "revision")
        demand(refusal.metadata["revision"] == "2", "metadata `revision` 2", refusal, request)
        bad = kind(reflection_id=added.reflection_id, expected_revision=-1)
        await session.bad_field(method, bad, "expected_revision")
    demand((await scope.snapshot())[0] == 2, "the scope at version 2", f"version {(await scope.snapshot())[0]}")
    for version, (method, kind) in enumerate(_REQUESTS.items(), 3):
        request = kind(reflection_id=added.reflection_id, expected_revision=2)
        answer = await session.ask(method, request)
        demand(answer.version == version, f"version {version}", answer, request)


@suite.check("EraseReflection", "erasing again changes nothing, and an unknown one is NOT_FOUND UNKNOWN_REFLECTION")
async def erased_again(session: CheckSession) -> None:
    scope = await with_evidence(session)
    added = await scope.add("one")
    first, again = [await scope.erase(added.reflection_id) for _ in range(2)]
    demand(first == again == 2, "version 2 both times", f"{first} and {again}")
    demand((await scope.snapshot())[0] == 2, "the scope at version 2", f"version {(await scope.snapshot())[0]}")
    unknown = pb.EraseReflectionRequest(reflection_id=f"conformance-{uuid4()}")
    await session.refused("EraseReflection", unknown, "NOT_FOUND", "UNKNOWN_REFLECTION")
    await session.bad_field("EraseReflection", pb.EraseReflectionRequest(), "reflection_id")
    await optional(session, "EraseReflection", pb.EraseReflectionRequest(reflection_id=added.reflection_id))
