"""Callers of the memory service that vanish: a case for each call that changes something."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from mulligan.memory import servicer
from mulligan.memory.stores import sqlite
from mulligan.memory.v1 import memory_service_pb2 as pb
from mulligan.memory.v1 import memory_service_pb2_grpc as pb_grpc
from tests.support.vanishing import Case, Vanishing, at_each_wait, vanishing


class _Entries:
    """What the calls of a test write to one scope. Each write is asked for until it is answered, and then once more:
    it counts once."""

    def __init__(self, stub: pb_grpc.MemoryServiceStub):
        self.stub = stub
        self.written = 0

    def new(self, ahead: int = 0) -> pb.AddReflectionRequest:
        number = self.written + ahead
        provenance = pb.Provenance(environment="lake")
        return pb.AddReflectionRequest(request_id=f"r{number}", scope="s", text=f"text {number}", provenance=provenance)

    async def add(self) -> str:
        added = await self.stub.AddReflection(self.new())
        self.written += 1
        return str(added.reflection_id)

    async def listed(self) -> list[pb.StoredReflection]:
        return list((await self.stub.ListReflections(pb.ListReflectionsRequest(scope="s"))).reflections)

    async def changes(self) -> int:
        return len((await self.stub.ListChanges(pb.ListChangesRequest(scope="s", page_size=1000))).changes)


def _query(*keys: str) -> pb.QueryReflectionsRequest:
    """With a trial, whose uses are written down."""
    alike = pb.RETRIEVAL_STRATEGY_SIMILAR_WORDS
    query = pb.QueryReflectionsRequest(scope="s", environment="lake", strategy=alike, text="text", limit=3)
    query.trial.CopyFrom(pb.Trial(use_keys=keys, holdout=0.3))
    return query


@asynccontextmanager
async def _serving(folder: Path, caller: Vanishing) -> AsyncIterator[_Entries]:
    store = await sqlite.open(str(folder / "memory.db"), sqlite.Settings())
    async with vanishing(lambda server: servicer.add_to_server(server, store), caller) as (_, channel):
        yield _Entries(pb_grpc.MemoryServiceStub(channel))
    await store.close()


async def add_reflection(folder: Path, caller: Vanishing) -> None:
    async def added(answer: Any) -> None:
        again = await its.stub.AddReflection(its.new())
        assert answer is None or answer == again
        its.written += 1
        texts = sorted(found.text for found in await its.listed())
        assert texts == sorted(f"text {number}" for number in range(its.written))

    async with _serving(folder, caller) as its:
        await at_each_wait(caller, lambda: its.stub.AddReflection(its.new()), added)


async def add_reflections(folder: Path, caller: Vanishing) -> None:
    def several() -> pb.AddReflectionsRequest:
        return pb.AddReflectionsRequest(reflections=map(its.new, range(3)))

    async def added(answer: Any) -> None:
        again = await its.stub.AddReflections(several())
        assert answer is None or answer == again
        its.written += 3
        texts = sorted(found.text for found in await its.listed())
        assert texts == sorted(f"text {number}" for number in range(its.written))

    async with _serving(folder, caller) as its:
        await at_each_wait(caller, lambda: its.stub.AddReflections(several()), added)


async def query_reflections(folder: Path, caller: Vanishing) -> None:
    asked = 0

    def query() -> pb.QueryReflectionsRequest:
        return _query(f"k{asked}", f"l{asked}")

    async def drawn(answer: Any) -> None:
        nonlocal asked
        again = await its.stub.QueryReflections(query())
        assert len(again.uses) == 2 and (answer is None or answer == again)
        asked += 1
        explained = await its.stub.ExplainReflection(pb.ExplainReflectionRequest(reflection_id=one, max_uses=1000))
        assert len({use.use_id for use in explained.uses}) == len(explained.uses) == 2 * asked

    async with _serving(folder, caller) as its:
        one = await its.add()
        await at_each_wait(caller, lambda: its.stub.QueryReflections(query()), drawn)


async def report_outcome(folder: Path, caller: Vanishing) -> None:
    use = ""

    def report() -> pb.ReportOutcomeRequest:
        return pb.ReportOutcomeRequest(outcomes=[pb.UseOutcome(use_id=use, reward=1.0)])

    async def reported(answer: Any) -> None:
        nonlocal use
        await its.stub.ReportOutcome(report())
        assert (await its.stub.ReportOutcome(report())).counted == 0, "it has counted"
        explained = await its.stub.ExplainReflection(pb.ExplainReflectionRequest(reflection_id=one, max_uses=1000))
        assert [found.reward for found in explained.uses if found.HasField("reward")] == [1.0] * len(explained.uses)
        use = await draw(f"k{len(explained.uses)}")

    async def draw(key: str) -> str:
        return str((await its.stub.QueryReflections(_query(key))).uses[0].use_id)

    async with _serving(folder, caller) as its:
        one = await its.add()
        use = await draw("k")
        await at_each_wait(caller, lambda: its.stub.ReportOutcome(report()), reported)


async def revise_reflection(folder: Path, caller: Vanishing) -> None:
    revision = 1

    def revise() -> pb.ReviseReflectionRequest:
        text = f"revised {revision}"
        return pb.ReviseReflectionRequest(
            reflection_id=one, request_id=f"v{revision}", expected_revision=revision, text=text
        )

    async def revised(answer: Any) -> None:
        nonlocal revision
        again = await its.stub.ReviseReflection(revise())
        assert again.revision == revision + 1 and (answer is None or answer == again)
        assert [found.text for found in await its.listed()] == [f"revised {revision}"]
        revision += 1

    async with _serving(folder, caller) as its:
        one = await its.add()
        await at_each_wait(caller, lambda: its.stub.ReviseReflection(revise()), revised)
        assert await its.changes() == revision, "each once"


async def delete_reflection(folder: Path, caller: Vanishing) -> None:
    one = ""

    def delete() -> pb.DeleteReflectionRequest:
        return pb.DeleteReflectionRequest(reflection_id=one)

    async def deleted(answer: Any) -> None:
        nonlocal one
        before = its.written
        again = await its.stub.DeleteReflection(delete())
        assert answer is None or answer == again
        assert await its.listed() == []
        assert await its.changes() == 2 * before, "each was added and deleted once"
        one = await its.add()

    async with _serving(folder, caller) as its:
        one = await its.add()
        await at_each_wait(caller, lambda: its.stub.DeleteReflection(delete()), deleted)


async def erase_reflection(folder: Path, caller: Vanishing) -> None:
    one = ""

    def erase() -> pb.EraseReflectionRequest:
        return pb.EraseReflectionRequest(reflection_id=one)

    async def erased(answer: Any) -> None:
        nonlocal one
        again = await its.stub.EraseReflection(erase())
        assert answer is None or answer == again
        every = pb.ListReflectionsRequest(scope="s", include_deleted=True)
        assert not [found.text for found in (await its.stub.ListReflections(every)).reflections if found.text]
        one = await its.add()

    async with _serving(folder, caller) as its:
        one = await its.add()
        await at_each_wait(caller, lambda: its.stub.EraseReflection(erase()), erased)


_SERVICE = "/mulligan.memory.v1.MemoryService/"
CASES: dict[str, Case] = {
    f"{_SERVICE}AddReflection": add_reflection,
    f"{_SERVICE}AddReflections": add_reflections,
    f"{_SERVICE}QueryReflections": query_reflections,
    f"{_SERVICE}ReportOutcome": report_outcome,
    f"{_SERVICE}ReviseReflection": revise_reflection,
    f"{_SERVICE}DeleteReflection": delete_reflection,
    f"{_SERVICE}EraseReflection": erase_reflection,
}
