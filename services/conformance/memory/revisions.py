"""Checks of rewriting reflections."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

from mulligan.conformance.memory.scope import EXPLORE, SIMILAR_WORDS, optional, with_evidence
from mulligan.conformance.report import Suite, demand
from mulligan.conformance.target import CheckSession
from mulligan.memory.v1 import memory_service_pb2 as pb

suite: Suite[CheckSession] = Suite()
RETIRED = pb.REFLECTION_STATUS_RETIRED
CANDIDATE = pb.REFLECTION_STATUS_CANDIDATE


@suite.check("ReviseReflection", "what is named is rewritten, the rest stays; older versions keep what they had")
async def rewritten(session: CheckSession) -> None:
    scope = await with_evidence(session)
    added = await scope.labelled("request", "walrus", key="k", tags=["a"])
    revised = await scope.revise(added.reflection_id, 1, text="ostrich", tags=pb.TagList(tags=["b", "c"]))
    demand((revised.revision, revised.version) == (2, 2), "revision 2, made by version 2", revised)
    stored = await scope.get(added.reflection_id)
    found = (stored.text, stored.key, list(stored.tags), stored.revision, stored.version)
    demand(found == ("ostrich", "k", ["b", "c"], 2, 1), "the new text and tags, the key as before", stored)
    await scope.finds("the new text", ["ostrich"], 9, EXPLORE)
    await scope.finds("the text of version 1", ["walrus"], 9, EXPLORE, as_of_version=1)
    await scope.finds("nothing by the old words", [], 9, SIMILAR_WORDS, text="walrus")
    await scope.finds("the entry by its new words", ["ostrich"], 9, SIMILAR_WORDS, text="ostrich")
    await scope.finds("the old entry by its old words", ["walrus"], 9, SIMILAR_WORDS, text="walrus", as_of_version=1)
    await scope.revise(added.reflection_id, 2, key="", tags=pb.TagList())
    stored = await scope.get(added.reflection_id)
    demand((stored.key, list(stored.tags), stored.text) == ("", [], "ostrich"), "neither key nor tags", stored)


@suite.check("ReviseReflection", "a repeated call returns the first answer and changes nothing")
async def repeated(session: CheckSession) -> None:
    scope = await with_evidence(session)
    added = await scope.add("request")
    request = scope.revision(added.reflection_id, 1, text="new")
    first = await optional(session, "ReviseReflection", request)
    again = await session.ask("ReviseReflection", request)
    demand(again == first, f"the first answer, {first}", again, request)
    demand((await scope.snapshot())[0] == 2, "the scope at version 2", f"version {(await scope.snapshot())[0]}")


@suite.check("ReviseReflection", "a repeated call with another change is ALREADY_EXISTS REQUEST_CONFLICT")
async def another_change(session: CheckSession) -> None:
    scope = await with_evidence(session)
    added = await scope.add("request")
    await optional(session, "ReviseReflection", scope.revision(added.reflection_id, 1, "same", text="new"))
    for change in ({"text": "other"}, {"text": "new", "key": "k"}, {"tags": pb.TagList(tags=["t"])}):
        request = scope.revision(added.reflection_id, 1, "same", **change)
        await session.refused("ReviseReflection", request, "ALREADY_EXISTS", "REQUEST_CONFLICT")
    stored = await scope.get(added.reflection_id)
    demand((stored.text, stored.revision) == ("new", 2), "the text of the first call, at revision 2", stored)


@suite.check("ReviseReflection", "a revision that is not the newest is ABORTED REVISION_CONFLICT, with the newest")
async def conflict(session: CheckSession) -> None:
    scope = await with_evidence(session)
    added = await scope.add("request")
    await scope.revise(added.reflection_id, 1, text="second")
    for expected in (1, 3):
        request = scope.revision(added.reflection_id, expected, text="third")
        refusal = await session.refused("ReviseReflection", request, "ABORTED", "REVISION_CONFLICT", "revision")
        demand(refusal.metadata["revision"] == "2", "metadata `revision` 2", refusal, request)
    stored = await scope.get(added.reflection_id)
    demand(stored.text == "second", "the text of the revision that was first", stored)


@suite.check("ReviseReflection", "the text of an episode is never rewritten: FAILED_PRECONDITION RAW_ENTRY")
async def episode(session: CheckSession) -> None:
    scope = await with_evidence(session)
    added = await scope.labelled("request", "what happened", kind=pb.REFLECTION_KIND_EPISODE)
    await scope.revise(added.reflection_id, 1, key="k")
    request = scope.revision(added.reflection_id, 2, text="what did not")
    await session.refused("ReviseReflection", request, "FAILED_PRECONDITION", "RAW_ENTRY")
    stored = await scope.get(added.reflection_id)
    demand((stored.text, stored.key) == ("what happened", "k"), "the text as it was, and the new key", stored)


@suite.check("ReviseReflection", "RETIRED ones are not retrieved until they are CANDIDATE again")
async def retired(session: CheckSession) -> None:
    scope = await with_evidence(session)
    added = await scope.add("request")
    await scope.revise(added.reflection_id, 1, status=RETIRED)
    demand((await scope.get(added.reflection_id)).status == RETIRED, "RETIRED", await scope.get(added.reflection_id))
    for strategy in range(1, 4):
        await scope.finds("nothing that is retired", [], 9, strategy)
    await scope.finds("nothing that is retired", [], 9, EXPLORE)
    await scope.finds("what was there at version 1", ["request"], 9, EXPLORE, as_of_version=1)
    await scope.revise(added.reflection_id, 2, status=CANDIDATE)
    await scope.finds("the candidate", ["request"], 9, EXPLORE)


@suite.check("ReviseReflection", "an unknown reflection, and a forgotten one, are NOT_FOUND UNKNOWN_REFLECTION")
async def unknown(session: CheckSession) -> None:
    scope = await with_evidence(session)
    added = await scope.add("request")
    await scope.revise(added.reflection_id, 1, key="k")
    await scope.delete(added.reflection_id)
    for identity in (f"conformance-{uuid4()}", added.reflection_id):
        request = scope.revision(identity, 2, text="new")
        await session.refused("ReviseReflection", request, "NOT_FOUND", "UNKNOWN_REFLECTION")


@suite.check("ReviseReflection", "a bad field, or no change, is INVALID_ARGUMENT INVALID_FIELD and changes nothing")
async def bad_fields(session: CheckSession) -> None:
    scope = await with_evidence(session)
    added = await scope.add("request")
    await scope.revise(added.reflection_id, 1, key="k")
    cases: tuple[tuple[str, dict[str, Any]], ...] = (
        ("text", {}),
        ("text", {"text": ""}),
        ("text", {"text": "x" * (2**20 + 1)}),
        ("key", {"key": "k" * 201}),
        ("tags", {"tags": pb.TagList(tags=["a", "a"])}),
        ("status", {"status": pb.REFLECTION_STATUS_ACTIVE}),
        ("status", {"status": pb.REFLECTION_STATUS_QUARANTINED}),
        ("embedding", {"key": "other", "embedding": [1.0]}),
    )
    for field, change in cases:
        await session.bad_field("ReviseReflection", scope.revision(added.reflection_id, 2, **change), field)
    first = scope.revision(added.reflection_id, 0, key="other")
    await session.bad_field("ReviseReflection", first, "expected_revision")
    demand((await scope.snapshot())[0] == 2, "the scope at version 2", f"version {(await scope.snapshot())[0]}")
