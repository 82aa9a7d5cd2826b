"""Checks of the queries for successes, and of reads as of a version."""

from __future__ import annotations

from typing import Any

from mulligan.conformance.memory.scope import LATEST, TOP_GAIN, Scope
from mulligan.conformance.report import Suite, demand
from mulligan.conformance.target import CheckSession
from mulligan.memory.v1 import memory_service_pb2 as pb

suite: Suite[CheckSession] = Suite()


@suite.check("QueryReflections", "LATEST_SUCCESS finds the latest successful ones of the environment, newest first")
async def latest(session: CheckSession) -> None:
    scope = Scope(session)
    await scope.finds("nothing in an empty scope", [])
    for text in ("first", "second"):
        await scope.add(text)
    await scope.add("failed", reward_after=0.0, success=False)
    await scope.add("elsewhere", environment="maze")
    await scope.finds("the latest success", ["second"], 1)
    await scope.finds("limit 0 means 1", ["second"], 0)
    await scope.finds("both successes, the latest first", ["second", "first"])
    await scope.finds("those of the environment alone", ["elsewhere"], environment="maze")


@suite.check("QueryReflections", "TOP_GAIN finds the successful ones with the greatest gain; among equals the latest")
async def top_gain(session: CheckSession) -> None:
    scope = Scope(session)
    for number, before in enumerate([0.5, 0.0, 0.25, 0.0]):
        await scope.add(f"{number}", reward_before=before)
    await scope.add("failed", reward_before=-9.0, reward_after=0.0, success=False)
    await scope.finds("by gain, then newest", ["3", "1", "2"], 3, TOP_GAIN)
    await scope.finds("by gain, then newest", ["3", "1", "2", "0"], 9, TOP_GAIN)


@suite.check("QueryReflections", "scopes do not see each other")
async def scopes(session: CheckSession) -> None:
    one = Scope(session)
    other = Scope(session)
    await one.add("mine")
    await other.finds("nothing of another scope", [])


@suite.check("QueryReflections", "a read as of a version sees exactly that version")
async def as_of(session: CheckSession) -> None:
    scope = Scope(session)
    old = await scope.add("old")
    await scope.add("new")
    await scope.delete(old.reflection_id)
    await scope.finds("nothing at version 0", [], as_of_version=0)
    await scope.finds("what was there at version 1", ["old"], as_of_version=1)
    await scope.finds("what was there at version 2", ["new", "old"], as_of_version=2)
    await scope.finds("what is there now", ["new"])
    for strategy in (LATEST, TOP_GAIN):
        answer = await session.ask("QueryReflections", scope.query(9, strategy, as_of_version=2))
        demand(answer.version == 2, "version 2, which was read", answer)
    newest = await session.ask("QueryReflections", scope.query(9))
    demand(newest.version == 3, "version 3, which was read", newest, scope.query(9))


@suite.check("QueryReflections", "a version that is not reached yet is OUT_OF_RANGE UNKNOWN_VERSION")
async def unknown_version(session: CheckSession) -> None:
    scope = Scope(session)
    await scope.add("one")
    await session.refused("QueryReflections", scope.query(as_of_version=2), "OUT_OF_RANGE", "UNKNOWN_VERSION")


@suite.check("QueryReflections", "a bad field is INVALID_ARGUMENT INVALID_FIELD and named")
async def bad_queries(session: CheckSession) -> None:
    for field, change in (
        ("scope", {"scope": ""}),
        ("environment", {"environment": ""}),
        ("strategy", {"strategy": 0}),
        ("strategy", {"strategy": 99}),
        ("limit", {"limit": -1}),
        ("limit", {"limit": 101}),
        ("as_of_version", {"as_of_version": -1}),
    ):
        good: dict[str, Any] = {"scope": "conformance", "environment": "lake", "strategy": LATEST}
        await session.bad_field("QueryReflections", pb.QueryReflectionsRequest(**(good | change)), field)
