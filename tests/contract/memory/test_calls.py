"""Revisions, erasing, uses and their outcomes, strategies and the log, over gRPC against a real process."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import grpc
import pytest

from mulligan.common.errors import DomainError, Reason
from mulligan.common.reflections import (
    Labels,
    MixPart,
    Provenance,
    ReflectionKind,
    ReflectionQuery,
    ReflectionStatus,
    RetrievalStrategy,
    Trial,
    Use,
    UseOutcome,
)
from mulligan.memory.client import MemoryClient
from mulligan.memory.v1 import memory_service_pb2 as pb
from mulligan.memory.v1 import memory_service_pb2_grpc as pb_grpc

ORIGIN = Provenance("run", "experience", "lake", "train/00001", 3, 0.0, 0.0, False)
WORDS = RetrievalStrategy.SIMILAR_WORDS
MEANING = RetrievalStrategy.SIMILAR_MEANING
BY_KEY = RetrievalStrategy.BY_KEY
EXPLORE = RetrievalStrategy.EXPLORE


def query(scope: str, strategy: RetrievalStrategy, **more: object) -> ReflectionQuery:
    return replace(ReflectionQuery(scope, "lake", strategy, 9), **more)  # type: ignore[arg-type]  # by name


async def found(client: MemoryClient, asked: ReflectionQuery) -> list[str]:
    return [one.text for one in (await client.query(asked)).reflections]


async def refused(call: object, reason: Reason, **metadata: str) -> None:
    with pytest.raises(DomainError) as caught:
        await call  # type: ignore[misc]  # any of the client's coroutines
    assert caught.value.reason is reason
    assert metadata.items() <= caught.value.metadata.items()


async def test_labels_are_kept_and_queries_filter_by_them(client: MemoryClient, scope: str) -> None:
    source = await client.add("1", scope, "rule", ORIGIN)
    labels = Labels(ReflectionKind.DOCUMENT, "grep", ("tools", "long"), (source,))
    added = await client.add("2", scope, "document", replace(ORIGIN, task_id="train/7"), labels)
    stored = await client.get(added)
    assert (stored.kind, stored.key, stored.tags, stored.source_ids) == (
        *(ReflectionKind.DOCUMENT, "grep", ("tools", "long")),
        (source,),
    )
    assert (stored.status, stored.revision, stored.uplift) == (ReflectionStatus.PROBATION, 1, None)
    assert await found(client, query(scope, BY_KEY, key="grep")) == [], "EXPLORE alone finds what is on probation"
    for asked in (
        query(scope, EXPLORE, key="grep"),
        query(scope, EXPLORE, kinds=(ReflectionKind.DOCUMENT, ReflectionKind.EPISODE)),
        query(scope, EXPLORE, tags=("long",)),
        query(scope, EXPLORE, task_prefix="train/7"),
        query(scope, EXPLORE, limit=1),
    ):
        assert await found(client, asked) == ["document"], asked
    assert await found(client, query(scope, EXPLORE)) == ["document", "rule"]
    await refused(client.add("3", scope, "x", ORIGIN, Labels(source_ids=("none",))), Reason.UNKNOWN_REFLECTION)


async def test_words_and_meaning_and_a_mix(client: MemoryClient, scope: str) -> None:
    written = ["The dog sleeps near the fire.", "Count the coins twice.", "Walk around every hole."]
    for number, text in enumerate(written):
        await client.add(f"{number}", scope, text, ORIGIN)
    assert await found(client, query(scope, WORDS, text="coins? holes!")) == ["Count the coins twice."]
    puppy = query(scope, MEANING, text="a puppy")
    assert (await found(client, puppy))[0] == "The dog sleeps near the fire."
    parts = (MixPart(WORDS, 1), MixPart(MEANING, 1))
    mixed = query(scope, RetrievalStrategy.MIX, text="coins of a puppy", mix=parts)
    assert (await found(client, mixed))[0] == "Count the coins twice."
    # 29 bytes are 8 tokens; the second does not fit
    assert await found(client, replace(puppy, max_tokens=8)) == ["The dog sleeps near the fire."]


async def test_embeddings_of_callers_are_normalised(client: MemoryClient, scope: str) -> None:
    axes = [tuple(3.0 if place == axis else 0.0 for place in range(256)) for axis in range(2)]
    await client.add("0", scope, "one", ORIGIN, embedding=axes[0])
    await client.add("1", scope, "other", ORIGIN, embedding=[value * 100 for value in axes[1]])
    near = [first + 2 * second for first, second in zip(*axes, strict=True)]
    assert await found(client, query(scope, MEANING, embedding=tuple(near))) == ["other", "one"]


async def test_a_new_text_has_a_new_embedding(client: MemoryClient, scope: str) -> None:
    first = await client.add("0", scope, "The dog sleeps.", ORIGIN)
    await client.add("1", scope, "Count the coins.", ORIGIN)
    assert await client.revise(first, "r", 1, text="Money is kept in the bank.") == 2
    asked = query(scope, MEANING, text="dog puppy", version=2)
    assert (await found(client, asked))[0] == "The dog sleeps.", "as of the version before"
    assert "dog" not in " ".join(await found(client, replace(asked, version=None)))


async def test_revisions(client: MemoryClient, scope: str) -> None:
    added = await client.add("0", scope, "first", ORIGIN, Labels(key="k"))
    assert await client.revise(added, "r1", 1, text="second", tags=("t",)) == 2
    assert await client.revise(added, "r1", 1, text="second", tags=("t",)) == 2, "a repeated call"
    stored = await client.get(added)
    assert (stored.text, stored.key, stored.tags, stored.revision) == ("second", "k", ("t",), 2)
    await refused(client.revise(added, "r2", 1, text="third"), Reason.REVISION_CONFLICT, revision="2")
    assert await client.revise(added, "r3", 2, status=ReflectionStatus.RETIRED) == 3
    assert await found(client, query(scope, EXPLORE)) == []
    assert await found(client, query(scope, EXPLORE, version=2)) == ["second"]
    assert await client.revise(added, "r4", 3, status=ReflectionStatus.CANDIDATE, key="") == 4
    assert (await client.get(added)).key == ""
    episode = await client.add("1", scope, "what happened", ORIGIN, Labels(ReflectionKind.EPISODE))
    await refused(client.revise(episode, "r", 1, text="what did not"), Reason.RAW_ENTRY)
    assert await client.revise(episode, "r", 1, key="k") == 2
    await refused(client.revise("none", "r", 1, text="x"), Reason.UNKNOWN_REFLECTION)


async def test_erasing(client: MemoryClient, scope: str) -> None:
    kept = await client.add("0", scope, "kept", ORIGIN)
    added = await client.add("1", scope, "secret", ORIGIN, Labels(key="k", tags=("t",)))
    assert [await client.erase(added), await client.erase(added)] == [3, 3]
    stored = await client.get(added)
    assert (stored.text, stored.key, stored.tags, stored.erased_version, stored.provenance) == ("", "", (), 3, ORIGIN)
    await refused(client.query(query(scope, EXPLORE, version=2)), Reason.SNAPSHOT_REDACTED, version="3")
    assert await found(client, query(scope, EXPLORE, version=1)) == ["kept"]
    assert await found(client, query(scope, EXPLORE)) == ["kept"]
    assert [one.reflection_id for one in await client.list(scope)] == [kept]
    assert await client.add("1", scope, "secret", ORIGIN) == added, "the repeated call stores nothing"
    assert (await client.get(added)).text == ""


def outcomes(uses: tuple[Use, ...], bad: str) -> list[UseOutcome]:
    """What shows `bad` fails."""
    return [UseOutcome(use.use_id, 1.0 if use.left_out_id == bad else 0.0) for use in uses]


async def test_a_harmful_entry_is_quarantined(client: MemoryClient, scope: str) -> None:
    good = await client.add("0", scope, "good", ORIGIN)
    bad = await client.add("1", scope, "bad", ORIGIN)
    trial = Trial(tuple(f"use-{number}" for number in range(300)), 0.5, 7)
    retrieved = await client.query(query(scope, EXPLORE), trial)
    assert [use.use_key for use in retrieved.uses] == list(trial.use_keys)
    shares = [sum(use.left_out_id == one for use in retrieved.uses) / 300 for one in ("", good, bad)]
    assert all(0.1 < share < 0.9 for share in shares)
    assert (await client.query(query(scope, EXPLORE), trial)).uses == retrieved.uses, "a repeated query"
    reported = outcomes(retrieved.uses, bad)
    assert [await client.report(reported), await client.report(reported)] == [300, 0]
    stored = await client.get(bad)
    assert stored.status is ReflectionStatus.QUARANTINED and stored.uplift is not None
    compared = [use for use in retrieved.uses if use.left_out_id in ("", bad)]
    assert stored.uplift.uses_shown + stored.uplift.uses_left_out == len(compared)
    assert stored.uplift.upper < 0 and (stored.uplift.mean_shown, stored.uplift.mean_left_out) == (0.0, 1.0)
    best = query(scope, RetrievalStrategy.BEST_UPLIFT)
    assert await found(client, best) == ["good"]
    assert await found(client, replace(best, version=2)) == ["bad", "good"], "before the report"
    assert await found(client, query(scope, EXPLORE)) == ["good", "bad"], "a use counts as eight"
    explained = await client.explain(bad, 5)
    assert [use.use_key for use in explained.uses] == [f"use-{number}" for number in range(299, 294, -1)]
    assert all(use.reward == float(not use.shown) and use.holdout == 0.25 for use in explained.uses)
    other = await client.add("2", scope, "third", ORIGIN)
    await refused(client.query(query(scope, EXPLORE), trial), Reason.REQUEST_CONFLICT)
    assert await client.query(query(scope, BY_KEY, key="none"), trial) == replace(
        retrieved, reflections=(), version=4, uses=()
    )
    assert (await client.get(other)).uplift is None
    unknown = [UseOutcome(retrieved.uses[0].use_id, 1.0), UseOutcome("none", 1.0)]
    await refused(client.report(unknown), Reason.UNKNOWN_USE, use_id="none")


async def test_lineage_is_explained_parents_first(client: MemoryClient, scope: str) -> None:
    oldest = await client.add("0", scope, "oldest", ORIGIN)
    parents = [await client.add(f"p{n}", scope, f"parent {n}", ORIGIN, Labels(source_ids=(oldest,))) for n in range(2)]
    child = await client.add("c", scope, "child", ORIGIN, Labels(source_ids=tuple(parents)))
    explained = await client.explain(child)
    assert [one.text for one in explained.sources] == ["parent 0", "parent 1", "oldest"]
    assert list((await client.explain(oldest)).derived_ids) == parents
    await refused(client.explain("none"), Reason.UNKNOWN_REFLECTION)


async def test_the_log_says_who_changed_what(client: MemoryClient, stub: pb_grpc.MemoryServiceStub, scope: str) -> None:
    added = await client.add("0", scope, "text", ORIGIN)
    revise = pb.ReviseReflectionRequest(reflection_id=added, request_id="r", expected_revision=1, key="k")
    await stub.ReviseReflection(revise, metadata=(("mulligan-actor", "ann" + "n" * 300),))
    await client.delete(added)
    await client.erase(added)
    log = await client.changes(scope)
    assert [(one.version, one.action, one.reflection_id) for one in log] == [
        (number, action, added) for number, action in enumerate(["add", "revise", "delete", "erase"], 1)
    ]
    assert [one.actor for one in log] == ["127.0.0.1", "ann" + "n" * 197, "127.0.0.1", "127.0.0.1"]
    assert [one.action for one in await client.changes(scope, 2)] == ["add", "revise"]
    page = await stub.ListChanges(pb.ListChangesRequest(scope=scope, page_size=1))
    for request in (
        pb.ListChangesRequest(scope="another", page_token=page.next_page_token),
        pb.ListChangesRequest(scope=scope, page_token="nonsense"),
    ):
        with pytest.raises(grpc.aio.AioRpcError, match="page_token"):
            await stub.ListChanges(request)
    with pytest.raises(grpc.aio.AioRpcError, match="page_token"):
        await stub.ListReflections(pb.ListReflectionsRequest(scope=scope, page_token=page.next_page_token))


async def test_many_texts_are_embedded_at_once(client: MemoryClient, scope: str) -> None:
    texts = [
        f"{first} {second}" for first in ("dog", "coin", "hole", "fire") for second in "abcdefghijklmnopqrstuvwxyz"
    ]
    await asyncio.gather(*(client.add(text, scope, text, ORIGIN) for text in texts))
    for text in texts[::7]:
        assert await found(client, query(scope, MEANING, text=text, limit=1)) == [text]
