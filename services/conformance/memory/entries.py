"""Checks of adding, reading, listing and forgetting reflections."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any
from uuid import uuid4

from mulligan.conformance.memory.scope import Scope
from mulligan.conformance.report import Suite, demand
from mulligan.conformance.target import CheckSession, all_pages, gathered
from mulligan.memory.v1 import memory_service_pb2 as pb

suite: Suite[CheckSession] = Suite()
SAME_TIME = 8  # calls
CLOCKS_SECONDS = 600.0  # by which two machines' clocks may differ


@suite.check("AddReflection", "what is added is read back whole")
async def whole(session: CheckSession) -> None:
    scope = Scope(session)
    text = "A is you; √ ends it.\n\x00\t🧊" + "x" * 1000
    request = scope.request("request", text, reward_before=0.25, reward_after=0.75)
    added = await scope.send(request)
    stored = await scope.get(added.reflection_id)
    demand(bool(added.reflection_id), "a reflection_id", added, request)
    same = (stored.reflection_id, stored.scope) == (added.reflection_id, scope.name)
    demand(same, "the id and the scope under which it was added", stored, request)
    demand(stored.text == text, "the text as it was added, to the last character", repr(stored.text), request)
    demand(stored.provenance == request.provenance, f"the provenance, {request.provenance}", stored.provenance)
    demand(stored.version == added.version, f"version {added.version}, of its write", stored, request)
    demand(not stored.HasField("deleted_version"), "no deleted_version while it is kept", stored)
    demand(abs(stored.created_at.ToSeconds() - time.time()) < CLOCKS_SECONDS, "created_at is now", stored)


@suite.check("AddReflection", "a text of a mebibyte is stored, a longer one is INVALID_ARGUMENT INVALID_FIELD")
async def long_text(session: CheckSession) -> None:
    scope = Scope(session)
    text = "é" * 2**19
    stored = await scope.get((await scope.add("long", text)).reflection_id)
    demand(stored.text == text, "the text as it was added", f"{len(stored.text)} characters of {len(text)}")
    await session.bad_field("AddReflection", scope.request("longer", text + "x"), "text")


@suite.check("AddReflection", "every write makes a new version of its scope, counted from 1")
async def versions(session: CheckSession) -> None:
    scope = Scope(session)
    other = Scope(session)
    found = [(await scope.add(f"{n}")).version for n in range(3)]
    demand(found == [1, 2, 3], "versions 1, 2 and 3", found)
    demand((await other.add("0")).version == 1, "version 1 of another scope", "another version")


@suite.check("AddReflection", "a repeated call returns the first answer and makes no version, also after forgetting")
async def repeated(session: CheckSession) -> None:
    scope = Scope(session)
    request = scope.request("request", "text")
    first = await scope.send(request)
    for again in await gathered(scope.send(request) for _ in range(SAME_TIME)):
        demand(again == first, f"the first answer, {first}", again, request)
    demand(await scope.snapshot() == (1, 1), "version 1 with 1 reflection", f"{await scope.snapshot()}", request)
    await scope.delete(first.reflection_id)
    again = await session.ask("AddReflection", request)
    demand(again == first, f"the first answer, {first}", again, request)
    await scope.finds("it stays forgotten", [])


@suite.check("AddReflection", "calls with one request_id that come at the same time store one reflection")
async def concurrent(session: CheckSession) -> None:
    scope = Scope(session)
    request = scope.request("request", "text")
    answers = await gathered(scope.send(request) for _ in range(SAME_TIME))
    demand(all(answer == answers[0] for answer in answers), "the same answer to each", f"{answers}", request)
    listed = len((await scope.page()).reflections)
    demand(listed == 1, "one reflection in the scope", f"{listed} reflections", request)


@suite.check("AddReflection", "a request_id in use for another reflection is ALREADY_EXISTS REQUEST_CONFLICT")
async def conflict(session: CheckSession) -> None:
    scope = Scope(session)
    await scope.add("request", "text")
    for request in (scope.request("request", "other"), scope.request("request", "text", reward_before=0.5)):
        await session.refused("AddReflection", request, "ALREADY_EXISTS", "REQUEST_CONFLICT")
    elsewhere = Scope(session)
    await elsewhere.add("request", "other")  # idempotent on (scope, request_id): another scope is another request


def _bad(**change: Any) -> Callable[[Scope], pb.AddReflectionRequest]:
    def make(scope: Scope) -> pb.AddReflectionRequest:
        request = scope.request("request", "text")
        for name, value in change.items():
            holder = request if name in ("request_id", "scope", "text") else request.provenance
            setattr(holder, name, value)
        return request

    return make


BAD_ADDS: tuple[tuple[str, Callable[[Scope], pb.AddReflectionRequest]], ...] = (
    ("request_id", _bad(request_id="")),
    ("request_id", _bad(request_id="r" * 201)),
    ("scope", _bad(scope="")),
    ("scope", _bad(scope="s" * 201)),
    ("text", _bad(text="")),
    ("provenance", lambda scope: pb.AddReflectionRequest(request_id="r", scope=scope.name, text="t")),
    ("provenance.environment", _bad(environment="")),
    ("provenance.run_id", _bad(run_id="r" * 201)),
    ("provenance.policy_version", _bad(policy_version=-1)),
    ("provenance.reward_before", _bad(reward_before=float("inf"))),
    ("provenance.reward_after", _bad(reward_after=float("nan"))),
)


@suite.check("AddReflection", "a bad field is INVALID_ARGUMENT INVALID_FIELD and named, and stores nothing")
async def bad_adds(session: CheckSession) -> None:
    scope = Scope(session)
    for field, make in BAD_ADDS:
        await session.bad_field("AddReflection", make(scope), field)
    demand(await scope.snapshot() == (0, 0), "version 0 with no reflections", f"{await scope.snapshot()}")


@suite.check("GetReflection", "an unknown reflection is NOT_FOUND UNKNOWN_REFLECTION")
async def unknown(session: CheckSession) -> None:
    request = pb.GetReflectionRequest(reflection_id=f"conformance-{uuid4()}")
    await session.refused("GetReflection", request, "NOT_FOUND", "UNKNOWN_REFLECTION")
    await session.bad_field("GetReflection", pb.GetReflectionRequest(), "reflection_id")


@suite.check("ListReflections", "page by page it lists a scope, oldest first")
async def pages(session: CheckSession) -> None:
    scope = Scope(session)
    await gathered(scope.add(f"{n}") for n in range(7))
    for size in (1, 3, 7, 1000):
        found: list[int] = []
        async for page in all_pages(partial(scope.page, size)):
            demand(len(page.reflections) <= size, f"a page of at most {size}", f"{len(page.reflections)} reflections")
            found += [reflection.version for reflection in page.reflections]
            if len(found) >= 8:
                break
        demand(found == list(range(1, 8)), f"versions 1 to 7 in pages of {size}", found)
    everything = pb.ListReflectionsRequest(page_size=1)
    listed = len((await session.ask("ListReflections", everything)).reflections)
    demand(listed == 1, "an empty scope means every scope", f"a page of {listed} reflections", everything)


@suite.check("ListReflections", "a page token that it did not make is INVALID_ARGUMENT BAD_PAGE_TOKEN")
async def bad_tokens(session: CheckSession) -> None:
    for token in ("no such token", "é🧊", "\x00", "bnVsbA=="):
        request = pb.ListReflectionsRequest(scope="conformance", page_token=token)
        await session.refused("ListReflections", request, "INVALID_ARGUMENT", "BAD_PAGE_TOKEN")
    for field, bad in (
        ("page_size", pb.ListReflectionsRequest(page_size=-1)),
        ("page_size", pb.ListReflectionsRequest(page_size=1001)),
        ("scope", pb.ListReflectionsRequest(scope="s" * 201)),
    ):
        await session.bad_field("ListReflections", bad, field)


@suite.check(
    "DeleteReflection", "a forgotten reflection is not retrieved from the next version on, but stays on record"
)
async def forgotten(session: CheckSession) -> None:
    scope = Scope(session)
    added = await scope.add("one")
    await scope.add("two")
    demand((version := await scope.delete(added.reflection_id)) == 3, "version 3", f"version {version}")
    await scope.finds("the other one", ["two"])
    stored = await scope.get(added.reflection_id)
    demand(stored.deleted_version == 3, "deleted_version 3", stored)
    kept = [reflection.text for reflection in (await scope.page()).reflections]
    demand(kept == ["two"], "the list without it", kept)
    everything = [reflection.text for reflection in (await scope.page(deleted=True)).reflections]
    demand(everything == ["one", "two"], "the list with it, under include_deleted", everything)
    snapshot = await scope.snapshot()
    demand(snapshot[0] == 3, "the scope at version 3", f"version {snapshot[0]}")


@suite.check("DeleteReflection", "forgetting again changes nothing, and an unknown one is NOT_FOUND UNKNOWN_REFLECTION")
async def forgotten_again(session: CheckSession) -> None:
    scope = Scope(session)
    added = await scope.add("one")
    first, again = [await scope.delete(added.reflection_id) for _ in range(2)]
    demand(first == again == 2, "version 2 both times", f"{first} and {again}")
    demand((await scope.snapshot())[0] == 2, "the scope at version 2", f"version {(await scope.snapshot())[0]}")
    unknown = pb.DeleteReflectionRequest(reflection_id=f"conformance-{uuid4()}")
    await session.refused("DeleteReflection", unknown, "NOT_FOUND", "UNKNOWN_REFLECTION")


@suite.check("GetSnapshot", "a scope without writes has version 0, one with writes their number")
async def snapshots(session: CheckSession) -> None:
    scope = Scope(session)
    demand(await scope.snapshot() == (0, 0), "version 0, 0 reflections", f"{await scope.snapshot()}")
    for count in (1, 2):
        await scope.add(f"{count}")
        found = await scope.snapshot()
        demand(found == (count, count), f"version {count}, {count} reflections", f"{found}")
    await session.bad_field("GetSnapshot", pb.GetSnapshotRequest(), "scope")
