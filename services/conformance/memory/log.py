"""Checks of the log of writes."""

from __future__ import annotations

import time
from functools import partial

from mulligan.conformance.memory.scope import Scope, optional, with_evidence
from mulligan.conformance.report import Suite, Violation, demand
from mulligan.conformance.target import CheckSession, Refusal, all_pages
from mulligan.memory.v1 import memory_service_pb2 as pb

suite: Suite[CheckSession] = Suite()
_CLOCKS_SECONDS = 600.0


async def _page(scope: Scope, size: int = 0, token: str = "") -> pb.ListChangesResponse:
    request = pb.ListChangesRequest(scope=scope.name, page_size=size, page_token=token)
    page: pb.ListChangesResponse = await optional(scope.session, "ListChanges", request)
    return page


@suite.check("ListChanges", "it lists every write of a scope, oldest first, page by page, without any text")
async def changes(session: CheckSession) -> None:
    scope = await with_evidence(session)
    added = await scope.labelled("request", "walrus", key="ostrich")
    await scope.revise(added.reflection_id, 1, text="penguin")
    use = (await scope.query_answer(trial=pb.Trial(use_keys=["use"], holdout=0.5))).uses[0]
    await scope.report([(use.use_id, 1.0)])
    await scope.delete(added.reflection_id)
    await scope.erase(added.reflection_id)
    expected = [(number, action) for number, action in enumerate(["add", "revise", "report", "delete", "erase"], 1)]
    for size in (1, 2, 1000):
        found: list[pb.Change] = []
        async for page in all_pages(partial(_page, scope, size)):
            demand(len(page.changes) <= size, f"a page of at most {size}", f"{len(page.changes)} changes")
            found += page.changes
            if len(found) > len(expected):
                break
        told = [(one.version, one.action) for one in found]
        demand(told == expected, f"these versions and actions in pages of {size}: {expected}", told)
    for change in found:
        named = change.reflection_id == ("" if change.action == "report" else added.reflection_id)
        demand(named and change.scope == scope.name, "the reflection, and the scope", change)
        now = abs(change.changed_at.ToSeconds() - time.time()) < _CLOCKS_SECONDS
        demand(now and bool(change.actor), "changed_at is now, and somebody did it", change)
        leaked = any(word in f"{change}" for word in ("walrus", "penguin", "ostrich"))
        demand(not leaked, "nothing of the entry's text or key", change)


@suite.check("ListChanges", "who wrote is what the call's metadata says as `mulligan-actor`")
async def actors(session: CheckSession) -> None:
    scope = await with_evidence(session)
    request = scope.request("request")
    metadata = (*session.target.metadata, ("mulligan-actor", "conformance"))
    added = await session.attempt("AddReflection", request, metadata=metadata)
    if isinstance(added, Refusal):
        raise Violation("this call is answered", added, request)
    session.later("DeleteReflection", pb.DeleteReflectionRequest(reflection_id=added.reflection_id))
    found = [change.actor for change in (await _page(scope)).changes]
    demand(found == ["conformance"], "the actor `conformance`", found, request)


@suite.check("ListChanges", "a page token that it did not make is INVALID_ARGUMENT BAD_PAGE_TOKEN")
async def bad_tokens(session: CheckSession) -> None:
    await with_evidence(session)
    for token in ("no such token", "é🧊", "\x00", "bnVsbA=="):
        request = pb.ListChangesRequest(scope="conformance", page_token=token)
        await session.refused("ListChanges", request, "INVALID_ARGUMENT", "BAD_PAGE_TOKEN")
    for field, bad in (
        ("page_size", pb.ListChangesRequest(page_size=1001)),
        ("scope", pb.ListChangesRequest(scope="s" * 201)),
    ):
        await session.bad_field("ListChanges", bad, field)
