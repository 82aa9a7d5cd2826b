"""Checks of kinds, keys, tags and sources, and of queries that filter by them."""

from __future__ import annotations

from typing import Any

from mulligan.conformance.memory.scope import BY_KEY, EXPLORE, LATEST, TOP_GAIN, with_evidence
from mulligan.conformance.report import Suite, demand
from mulligan.conformance.target import CheckSession, gathered
from mulligan.memory.v1 import memory_service_pb2 as pb

suite: Suite[CheckSession] = Suite()
_SAME_TIME = 8  # calls


@suite.check("AddReflection", "kind, key, tags and sources are read back; without them it is a rule, and a candidate")
async def labelled(session: CheckSession) -> None:
    scope = await with_evidence(session)
    source = await scope.add("source")
    stored = await scope.get(source.reflection_id)
    plain = (stored.kind, stored.key, list(stored.tags), stored.status, stored.revision)
    expected: tuple[Any, ...] = (pb.REFLECTION_KIND_RULE, "", [], pb.REFLECTION_STATUS_CANDIDATE, 1)
    demand(plain == expected, "a RULE without key and tags, CANDIDATE, of revision 1", stored)
    demand(not stored.HasField("uplift"), "no uplift before a use is reported", stored)
    given: dict[str, Any] = {"kind": pb.REFLECTION_KIND_DOCUMENT, "key": "grep 🧊", "tags": ["b", "a"]}
    added = await scope.labelled("labelled", source_ids=[source.reflection_id], **given)
    stored = await scope.get(added.reflection_id)
    found = {"kind": stored.kind, "key": stored.key, "tags": list(stored.tags)}
    demand(found == given, f"the labels that were given, {given}", stored)
    demand(list(stored.source_ids) == [source.reflection_id], "the source that was given", stored)
    demand(stored.status == pb.REFLECTION_STATUS_PROBATION, "PROBATION, as it was made from another", stored)
    await scope.finds("what is on probation only by EXPLORE", ["source"], 9, pb.RETRIEVAL_STRATEGY_BEST_UPLIFT)
    await scope.finds("what is on probation only by EXPLORE", ["labelled", "source"], 9, pb.RETRIEVAL_STRATEGY_EXPLORE)


@suite.check("AddReflection", "a repeated call with other labels is ALREADY_EXISTS REQUEST_CONFLICT")
async def other_labels(session: CheckSession) -> None:
    scope = await with_evidence(session)
    await scope.labelled("request", key="k", tags=["a"])
    for change in ({"key": "other"}, {"tags": ["a", "b"]}, {"kind": pb.REFLECTION_KIND_EPISODE}):
        request = scope.request("request")
        request.MergeFrom(pb.AddReflectionRequest(**({"key": "k", "tags": ["a"]} | change)))
        await session.refused("AddReflection", request, "ALREADY_EXISTS", "REQUEST_CONFLICT")


@suite.check("AddReflection", "a source that is not in the scope is NOT_FOUND UNKNOWN_REFLECTION, and stores nothing")
async def unknown_source(session: CheckSession) -> None:
    scope = await with_evidence(session)
    elsewhere = await (await with_evidence(session)).add("elsewhere")
    for source in ("no such reflection", elsewhere.reflection_id):
        request = scope.request("request")
        request.source_ids.append(source)
        await session.refused("AddReflection", request, "NOT_FOUND", "UNKNOWN_REFLECTION")
    demand(await scope.snapshot() == (0, 0), "version 0 with no reflections", f"{await scope.snapshot()}")


@suite.check("AddReflection", "bad labels are INVALID_ARGUMENT INVALID_FIELD and named")
async def bad_labels(session: CheckSession) -> None:
    scope = await with_evidence(session)
    bad: tuple[tuple[str, dict[str, Any]], ...] = (
        ("kind", {"kind": 9}),
        ("key", {"key": "k" * 201}),
        ("tags", {"tags": ["a", "a"]}),
        ("tags", {"tags": [f"{number}" for number in range(33)]}),
        ("tags", {"tags": [""]}),
        ("source_ids", {"source_ids": ["a", "a"]}),
        ("embedding", {"embedding": [1.0] * 8193}),
    )
    for field, labels in bad:
        request = scope.request("request")
        request.MergeFrom(pb.AddReflectionRequest(**labels))
        await session.bad_field("AddReflection", request, field)


@suite.check("AddReflection", "unless_known adds nothing where an entry has the text, and answers with that entry")
async def known(session: CheckSession) -> None:
    scope = await with_evidence(session)
    first = await scope.add("first", "text")
    again = _unless_known(scope.request("again", "text"))
    for answer in await gathered(scope.send(again) for _ in range(_SAME_TIME)):
        demand(answer == first, f"the answer of the entry that has the text, {first}", answer, again)
    demand(await scope.snapshot() == (2, 1), "version 2 with 1 reflection", f"{await scope.snapshot()}", again)
    other = scope.request("again", "other")
    await session.refused("AddReflection", _unless_known(other), "ALREADY_EXISTS", "REQUEST_CONFLICT")
    elsewhere = scope.request("elsewhere", "text", environment="maze")
    episode = scope.request("episode", "text")
    episode.kind = pb.REFLECTION_KIND_EPISODE
    for version, request in ((3, elsewhere), (4, episode)):
        added = await scope.send(_unless_known(request))
        demand(added.version == version, "another environment or kind is another entry", added, request)
    await scope.delete(first.reflection_id)
    answer = await scope.send(again)
    demand(answer == first, f"the first answer, {first}, to a repeated call", answer, again)
    later = _unless_known(scope.request("later", "text"))
    added = await scope.send(later)
    demand(added.version == 6, "a new entry, as the one that had the text is forgotten", added, later)


@suite.check("AddReflection", "of calls with unless_known and one text that come at the same time, one adds it")
async def known_at_once(session: CheckSession) -> None:
    scope = await with_evidence(session)
    requests = [_unless_known(scope.request(f"{number}", "text")) for number in range(_SAME_TIME)]
    answers = await gathered(map(scope.send, requests))
    demand(all(answer == answers[0] for answer in answers), "the same answer to each", f"{answers}", requests[0])
    expected = (_SAME_TIME, 1)
    demand(await scope.snapshot() == expected, f"{_SAME_TIME} versions", f"{await scope.snapshot()}", requests[0])


def _unless_known(request: pb.AddReflectionRequest) -> pb.AddReflectionRequest:
    request.unless_known = True
    return request


@suite.check("QueryReflections", "BY_KEY finds all of a key, the latest first, also without a success")
async def by_key(session: CheckSession) -> None:
    scope = await with_evidence(session)
    for name, key in (("one", "k"), ("other", "K"), ("two", "k"), ("none", "")):
        await scope.labelled(name, key=key)
    failed = scope.request("failed", reward_after=0.0, success=False)
    failed.key = "k"
    await scope.send(failed)
    await scope.finds("all of the key, the latest first", ["failed", "two", "one"], 9, BY_KEY, key="k")
    await scope.finds("nothing of an unknown key", [], 9, BY_KEY, key="nothing")
    await session.bad_field("QueryReflections", scope.query(9, BY_KEY), "key")


@suite.check("QueryReflections", "kinds, key, tags and task_prefix leave out what does not fit, for each strategy")
async def filters(session: CheckSession) -> None:
    scope = await with_evidence(session)
    await scope.labelled("plain")
    await scope.labelled("tagged", kind=pb.REFLECTION_KIND_EPISODE, key="k", tags=["a", "b"])
    elsewhere = scope.request("elsewhere", task_id="test/2")
    elsewhere.kind = pb.REFLECTION_KIND_DOCUMENT
    elsewhere.tags.append("a")
    await scope.send(elsewhere)
    cases: tuple[tuple[list[str], dict[str, Any]], ...] = (
        (["elsewhere", "tagged"], {"kinds": [pb.REFLECTION_KIND_DOCUMENT, pb.REFLECTION_KIND_EPISODE]}),
        (["plain"], {"kinds": [pb.REFLECTION_KIND_RULE]}),
        (["tagged"], {"key": "k"}),
        (["elsewhere", "tagged"], {"tags": ["a"]}),
        (["tagged"], {"tags": ["b", "a"]}),
        (["elsewhere"], {"task_prefix": "test/"}),
        (["tagged", "plain"], {"task_prefix": "train/1"}),
        ([], {"task_prefix": "%"}),
        ([], {"tags": ["a"], "task_prefix": "train/2"}),
    )
    for strategy in (EXPLORE, LATEST, TOP_GAIN):
        for texts, change in cases:
            await scope.finds("those that fit, the latest first", texts, 9, strategy, **change)


@suite.check("QueryReflections", "max_tokens leaves out the entries that do not fit; a token is four bytes")
async def tokens(session: CheckSession) -> None:
    scope = await with_evidence(session)
    for text in ("x", "e" * 9, "é" * 4):  # 1, 3 and 2 tokens
        await scope.add(text)
    for most, texts in ((0, ["é" * 4, "e" * 9, "x"]), (3, ["é" * 4, "x"]), (1, ["x"]), (5, ["é" * 4, "e" * 9])):
        await scope.finds(f"what fits into {most} tokens, the better ones first", texts, 9, EXPLORE, max_tokens=most)
