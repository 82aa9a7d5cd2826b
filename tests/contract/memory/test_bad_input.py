"""What is wrong with a call is said precisely, and changes nothing. Over gRPC against a real process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from mulligan.common.errors import DomainError
from mulligan.common.status import from_rpc_error
from mulligan.memory.client import MemoryClient
from mulligan.memory.v1 import memory_service_pb2 as pb
from mulligan.memory.v1 import memory_service_pb2_grpc as pb_grpc
from mulligan.testing.processes import ServiceProcess, ServiceProcesses

NAN = float("nan")
HOSTILE = (
    "'; DROP TABLE reflections; --",
    '" OR 1=1',
    "NEAR(a b, 2) AND *",
    "\x00\x1b[2J\r\n",
    "%_\\",
    "\u202e🧊",
    "(" * 99,
)
GOOD_ADD: dict[str, Any] = {
    "request_id": "r",
    "text": "t",
    "provenance": pb.Provenance(environment="lake"),
}
GOOD_QUERY: dict[str, Any] = {"environment": "lake", "strategy": pb.RETRIEVAL_STRATEGY_EXPLORE}
TRIAL: dict[str, Any] = {"use_keys": ["a"], "holdout": 0.2}
DIMENSIONS = 256


def part(strategy: Any, limit: int = 1) -> pb.MixPart:
    return pb.MixPart(strategy=strategy, limit=limit)


def unit(**at: float) -> list[float]:
    """Ones, but for `at3=…`."""
    return [at.get(f"at{place}", 1.0) for place in range(DIMENSIONS)]


ADDS: list[tuple[str, dict[str, Any]]] = [
    ("text", {"text": "x" * (2**20 + 1)}),
    ("text", {"text": "x" * (10 * 2**20)}),
    ("kind", {"kind": 17}),
    ("key", {"key": "k" * 201}),
    ("tags", {"tags": [f"{n}" for n in range(33)]}),
    ("tags", {"tags": ["same", "same"]}),
    ("tags[1]", {"tags": ["fine", ""]}),
    ("source_ids", {"source_ids": ["same", "same"]}),
    ("embedding", {"embedding": [1.0]}),
    ("embedding", {"embedding": [1.0] * (DIMENSIONS + 1)}),
    ("embedding", {"embedding": [0.0] * DIMENSIONS}),
    ("embedding[3]", {"embedding": unit(at3=NAN)}),
    ("embedding[255]", {"embedding": unit(at255=float("-inf"))}),
    ("embedding", {"embedding": [1.0] * 8193}),
]
QUERIES: list[tuple[str, dict[str, Any]]] = [
    ("key", {"strategy": pb.RETRIEVAL_STRATEGY_BY_KEY}),
    ("text", {"strategy": pb.RETRIEVAL_STRATEGY_SIMILAR_WORDS}),
    ("text", {"strategy": pb.RETRIEVAL_STRATEGY_SIMILAR_WORDS, "embedding": unit()}),
    ("text", {"strategy": pb.RETRIEVAL_STRATEGY_SIMILAR_MEANING}),
    ("mix", {"strategy": pb.RETRIEVAL_STRATEGY_MIX}),
    ("mix", {"mix": [part(pb.RETRIEVAL_STRATEGY_EXPLORE)]}),
    ("key", {"strategy": pb.RETRIEVAL_STRATEGY_MIX, "mix": [part(pb.RETRIEVAL_STRATEGY_BY_KEY)]}),
    ("text", {"strategy": pb.RETRIEVAL_STRATEGY_MIX, "mix": [part(pb.RETRIEVAL_STRATEGY_SIMILAR_MEANING)]}),
    ("mix[0].strategy", {"strategy": pb.RETRIEVAL_STRATEGY_MIX, "mix": [part(pb.RETRIEVAL_STRATEGY_MIX)]}),
    ("mix[1].limit", {"strategy": pb.RETRIEVAL_STRATEGY_MIX, "mix": [part(6), part(6, 0)]}),
    ("mix", {"strategy": pb.RETRIEVAL_STRATEGY_MIX, "mix": [part(6)] * 9}),
    ("embedding", {"strategy": pb.RETRIEVAL_STRATEGY_SIMILAR_MEANING, "embedding": [1.0] * 3}),
    ("embedding", {"embedding": [1.0] * 3}),
    ("embedding[7]", {"strategy": pb.RETRIEVAL_STRATEGY_SIMILAR_MEANING, "embedding": unit(at7=NAN)}),
    ("text", {"strategy": pb.RETRIEVAL_STRATEGY_SIMILAR_WORDS, "text": "x" * (10 * 2**20)}),
    ("kinds[0]", {"kinds": [0]}),
    ("kinds[1]", {"kinds": [1, 9]}),
    ("key", {"key": "k" * 201}),
    ("tags[0]", {"tags": [""]}),
    ("task_prefix", {"task_prefix": "t" * 201}),
    ("max_tokens", {"max_tokens": -1}),
    ("trial.use_keys", {"trial": pb.Trial(holdout=0.1)}),
    ("trial.use_keys", {"trial": pb.Trial(use_keys=["a", "a"])}),
    ("trial.use_keys[1]", {"trial": pb.Trial(use_keys=["a", ""])}),
    ("trial.holdout", {"trial": pb.Trial(use_keys=["a"], holdout=0.6)}),
    ("trial.holdout", {"trial": pb.Trial(use_keys=["a"], holdout=-0.1)}),
    ("trial.holdout", {"trial": pb.Trial(use_keys=["a"], holdout=NAN)}),
]
REVISIONS: list[tuple[str, dict[str, Any]]] = [
    ("text", {}),
    ("text", {"text": ""}),
    ("text", {"text": "x" * (10 * 2**20)}),
    ("request_id", {"request_id": "", "key": "k"}),
    ("expected_revision", {"expected_revision": 0, "key": "k"}),
    ("embedding", {"key": "k", "embedding": unit()}),
    ("embedding", {"text": "t", "embedding": [1.0]}),
    ("tags.tags", {"tags": pb.TagList(tags=["a", "a"])}),
    ("status", {"status": pb.REFLECTION_STATUS_ACTIVE}),
    ("status", {"status": pb.REFLECTION_STATUS_QUARANTINED}),
    ("status", {"status": 0}),
    ("key", {"key": "k" * 201}),
]
OUTCOMES: list[tuple[str, list[pb.UseOutcome]]] = [
    ("outcomes", []),
    ("outcomes[0].use_id", [pb.UseOutcome(reward=1.0)]),
    ("outcomes[1].reward", [pb.UseOutcome(use_id="a"), pb.UseOutcome(use_id="b", reward=1.01)]),
    ("outcomes[0].reward", [pb.UseOutcome(use_id="a", reward=-0.01)]),
    ("outcomes[0].reward", [pb.UseOutcome(use_id="a", reward=NAN)]),
    ("outcomes", [pb.UseOutcome(use_id="a", reward=1.0)] * 1001),
]


async def refusal(call: Any) -> DomainError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    found = from_rpc_error(caught.value)
    assert found is not None, caught.value
    return found


async def bad_field(call: Any, field: str) -> None:
    found = await refusal(call)
    assert (found.reason, found.metadata["field"]) == ("INVALID_FIELD", field), found
    assert len(str(found)) < 2000


async def test_fields_of_an_addition(stub: pb_grpc.MemoryServiceStub, client: MemoryClient, scope: str) -> None:
    for field, change in ADDS:
        await bad_field(stub.AddReflection(pb.AddReflectionRequest(scope=scope, **(GOOD_ADD | change))), field)
    assert await client.snapshot(scope) == 0


async def test_fields_of_a_query(stub: pb_grpc.MemoryServiceStub, client: MemoryClient, scope: str) -> None:
    for field, change in QUERIES:
        await bad_field(stub.QueryReflections(pb.QueryReflectionsRequest(scope=scope, **(GOOD_QUERY | change))), field)
    assert await client.snapshot(scope) == 0


async def test_fields_of_a_revision(stub: pb_grpc.MemoryServiceStub, client: MemoryClient, scope: str) -> None:
    added = await stub.AddReflection(pb.AddReflectionRequest(scope=scope, **GOOD_ADD))
    good: dict[str, Any] = {"reflection_id": added.reflection_id, "request_id": "r", "expected_revision": 1}
    for field, change in REVISIONS:
        await bad_field(stub.ReviseReflection(pb.ReviseReflectionRequest(**(good | change))), field)
    wrong = pb.ReviseReflectionRequest(**(good | {"expected_revision": 2**62, "key": "k"}))
    assert (await refusal(stub.ReviseReflection(wrong))).metadata["revision"] == "1"
    assert (await client.snapshot(scope), (await client.get(added.reflection_id)).revision) == (1, 1)


async def test_fields_of_outcomes(stub: pb_grpc.MemoryServiceStub, client: MemoryClient, scope: str) -> None:
    for field, outcomes in OUTCOMES:
        await bad_field(stub.ReportOutcome(pb.ReportOutcomeRequest(outcomes=outcomes)), field)
    for method in ("ExplainReflection", "EraseReflection", "GetReflection"):
        request = getattr(pb, f"{method}Request")()
        await bad_field(getattr(stub, method)(request), "reflection_id")
    await bad_field(stub.ExplainReflection(pb.ExplainReflectionRequest(reflection_id="x", max_uses=1001)), "max_uses")
    await bad_field(stub.ListChanges(pb.ListChangesRequest(page_size=1001)), "page_size")


async def test_hostile_text_in_every_field_is_text(
    stub: pb_grpc.MemoryServiceStub, client: MemoryClient, scope: str
) -> None:
    for number, text in enumerate(HOSTILE):
        origin = pb.Provenance(run_id=text, experience_id=text, environment=text, task_id=text)
        request = pb.AddReflectionRequest(
            request_id=text, scope=scope + text, text=text, provenance=origin, key=text, tags=[text]
        )
        added = await stub.AddReflection(request)
        stored = (await stub.GetReflection(pb.GetReflectionRequest(reflection_id=added.reflection_id))).reflection
        assert (stored.scope, stored.text, stored.key, list(stored.tags)) == (scope + text, text, text, [text])
        assert stored.provenance == origin
        asked: dict[str, Any] = {"scope": scope + text, "environment": text, "key": text, "tags": [text]}
        for strategy in range(1, 8):
            words: dict[str, Any] = {"strategy": strategy, "text": text, "task_prefix": text}
            query = pb.QueryReflectionsRequest(**(asked | words))
            found = await stub.QueryReflections(query)
            seen = [one.reflection_id for one in found.reflections]
            assert seen in ([], [added.reflection_id]), number
            if strategy in (3, 6, 7):
                assert seen == [added.reflection_id], (number, strategy)
        trial = pb.Trial(use_keys=[text], holdout=0.5)
        explore = pb.QueryReflectionsRequest(**asked, strategy=pb.RETRIEVAL_STRATEGY_EXPLORE, trial=trial)
        uses = (await stub.QueryReflections(explore)).uses
        assert [use.use_key for use in uses] == [text]
        revise = pb.ReviseReflectionRequest(
            reflection_id=added.reflection_id, request_id=text, expected_revision=1, text=text + text, key=text
        )
        assert (await stub.ReviseReflection(revise)).revision == 2
        listed = await stub.ListChanges(pb.ListChangesRequest(scope=scope + text))
        assert [one.action for one in listed.changes] == ["add", "revise"]
        for method in ("GetReflection", "DeleteReflection", "EraseReflection", "ExplainReflection"):
            unknown = getattr(pb, f"{method}Request")(reflection_id=text)
            assert (await refusal(getattr(stub, method)(unknown))).reason == "UNKNOWN_REFLECTION"


async def test_text_that_is_not_utf8_is_malformed(embedding: ServiceProcess, client: MemoryClient, scope: str) -> None:
    good = pb.AddReflectionRequest(scope=scope, **(GOOD_ADD | {"text": "MARK"})).SerializeToString()
    async with grpc.aio.insecure_channel(embedding.address) as channel:
        call: Any = channel.unary_unary("/mulligan.memory.v1.MemoryService/AddReflection")
        found = await refusal(call(good.replace(b"MARK", b"\xff\xfe\xc0\x80")))
    assert found.reason == "MALFORMED_MESSAGE"
    assert await client.snapshot(scope) == 0


@pytest.fixture(scope="module")
def plain(shared_services: ServiceProcesses, acme: dict[str, str]) -> ServiceProcess:
    return shared_services.start("memory", environment=acme, database="notes:desk")


@pytest.fixture
async def without_embedder(plain: ServiceProcess) -> AsyncIterator[pb_grpc.MemoryServiceStub]:
    async with grpc.aio.insecure_channel(plain.address) as channel:
        yield pb_grpc.MemoryServiceStub(channel)


async def test_without_an_embedder_meaning_is_refused(without_embedder: pb_grpc.MemoryServiceStub, scope: str) -> None:
    meaning = pb.RETRIEVAL_STRATEGY_SIMILAR_MEANING
    for change in ({"strategy": meaning}, {"strategy": pb.RETRIEVAL_STRATEGY_MIX, "mix": [part(meaning)]}):
        query = pb.QueryReflectionsRequest(scope=scope, **(GOOD_QUERY | {"text": "t"} | change))
        found = await refusal(without_embedder.QueryReflections(query))
        assert (found.reason, found.code) == ("NO_EMBEDDER", "FAILED_PRECONDITION")
    add = pb.AddReflectionRequest(scope=scope, **GOOD_ADD, embedding=[1.0])
    await bad_field(without_embedder.AddReflection(add), "embedding")


async def test_where_callers_bring_embeddings_a_text_alone_is_refused(
    services: ServiceProcesses, acme: dict[str, str], scope: str
) -> None:
    settings: dict[str, Any] = {"database": "notes:desk", "embedder": "given", "given.size": 3}
    server = services.start("memory", environment=acme, **settings)
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = pb_grpc.MemoryServiceStub(channel)
        add = pb.AddReflectionRequest(scope=scope, **GOOD_ADD)
        await bad_field(stub.AddReflection(add), "embedding")
        query = pb.QueryReflectionsRequest(
            scope=scope, environment="lake", strategy=pb.RETRIEVAL_STRATEGY_SIMILAR_MEANING, text="t"
        )
        await bad_field(stub.QueryReflections(query), "embedding")
        add.embedding.extend([0.0, 5.0, 0.0])
        added = await stub.AddReflection(add)
        query.embedding.extend([0.0, 1.0, 1.0])
        assert [one.reflection_id for one in (await stub.QueryReflections(query)).reflections] == [added.reflection_id]
