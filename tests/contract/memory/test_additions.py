"""Reflections that are added together, over gRPC and in the store."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from mulligan.common.channel import Endpoint
from mulligan.common.errors import CallFailed, DomainError, Reason
from mulligan.common.reflections import Addition, Labels, Provenance
from mulligan.common.status import fill_item_error
from mulligan.memory.client import MemoryClient
from mulligan.memory.servicer import MemoryServicer
from mulligan.memory.store import Added, NewReflection, add_all
from mulligan.memory.stores import sqlite
from mulligan.memory.v1 import memory_service_pb2 as pb
from mulligan.memory.v1 import memory_service_pb2_grpc as pb_grpc
from tests.support.distribution.acme import notes

ORIGIN = Provenance("run", "experience", "lake", "train/00001", 3, 0.0, 1.0, True)


class Counted(MemoryServicer):
    """Has the requests of each call that adds."""

    leaves_out = False

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.calls: list[list[str]] = []

    async def AddReflection(self, request: pb.AddReflectionRequest, context: Any) -> pb.AddReflectionResponse:
        self.calls.append([request.request_id])
        return await super().AddReflection(request, context)

    async def AddReflections(self, request: pb.AddReflectionsRequest, context: Any) -> pb.AddReflectionsResponse:
        self.calls.append([one.request_id for one in request.reflections])
        if self.leaves_out:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "not here")
        return await self.answer(request, context)

    async def answer(self, request: pb.AddReflectionsRequest, context: Any) -> pb.AddReflectionsResponse:
        return await super().AddReflections(request, context)


@asynccontextmanager
async def serving(folder: Path, kind: type[Counted] = Counted) -> AsyncIterator[tuple[Counted, MemoryClient]]:
    store = await sqlite.open(str(folder / "memory.db"), sqlite.Settings())
    server = grpc.aio.server()
    servicer = kind(store)
    pb_grpc.add_MemoryServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    client = MemoryClient(Endpoint(f"127.0.0.1:{port}"))
    yield servicer, client
    await client.close()
    await server.stop(None)
    await store.close()


def additions(*names: str, text: str = "") -> list[Addition]:
    return [Addition(name, "scope", text or f"text {name}", ORIGIN) for name in names]


async def texts(client: MemoryClient) -> list[tuple[str, int]]:
    return [(one.text, one.version) for one in await client.list("scope")]


async def test_several_are_one_call_and_are_written_in_their_order(tmp_path: Path) -> None:
    async with serving(tmp_path) as (servicer, client):
        ids = await client.add_all(additions("c", "a", "b"))
        assert await texts(client) == [("text c", 1), ("text a", 2), ("text b", 3)]
        assert [one.reflection_id for one in await client.list("scope")] == ids
        assert await client.add_all(additions("c", "a", "b")) == ids, "a repetition adds nothing"
        known = Addition("d", "scope", "text a", ORIGIN, unless_known=True)
        assert await client.add_all([known, *additions("e")]) == [
            ids[1],
            (await client.list("scope"))[-1].reflection_id,
        ]
        assert await client.add_all([]) == [] and await client.add_all(additions("a")) == [ids[1]]
        assert servicer.calls == [["c", "a", "b"], ["c", "a", "b"], ["d", "e"], ["a"]]


async def test_the_first_error_is_raised_and_the_others_are_written(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, client):
        await client.add_all(additions("a"))
        lost = Addition("x", "scope", "of nobody", ORIGIN, Labels(source_ids=("no such entry",)))
        with pytest.raises(DomainError) as caught:
            await client.add_all([*additions("b"), lost, *additions("a", text="another"), *additions("c")])
        assert caught.value.reason is Reason.UNKNOWN_REFLECTION
        assert await texts(client) == [("text a", 1), ("text b", 2), ("text c", 3)]


async def test_a_server_of_an_earlier_release_is_asked_one_by_one_and_not_again(tmp_path: Path) -> None:
    class Earlier(Counted):
        leaves_out = True

    async with serving(tmp_path, Earlier) as (servicer, client):
        ids = await client.add_all(additions("b", "a"))
        assert await client.with_run_credential("no matter").add_all(additions("b", "a")) == ids
        assert await texts(client) == [("text b", 1), ("text a", 2)]
        assert servicer.calls == [["b", "a"], ["b"], ["a"], ["b"], ["a"]]


async def test_many_and_long_ones_are_several_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mulligan.memory.client._ADDITIONS", 2)
    monkeypatch.setattr("mulligan.memory.client._ADDED_BYTES", 100)
    async with serving(tmp_path) as (servicer, client):
        await client.add_all([*additions("a", "b", "c"), *additions("d", text="d" * 101), *additions("e")])
        assert servicer.calls == [["a", "b"], ["c"], ["d"], ["e"]]
        assert [version for _, version in await texts(client)] == [1, 2, 3, 4, 5]


async def test_what_is_to_be_sent_later_is_added_by_a_call_of_its_own(tmp_path: Path) -> None:
    class Full(Counted):
        async def answer(self, request: pb.AddReflectionsRequest, context: Any) -> pb.AddReflectionsResponse:
            answer = await super().answer(pb.AddReflectionsRequest(reflections=request.reflections[1:]), context)
            later = DomainError(Reason.CALLER_LIMIT, "full", retry_after=timedelta(milliseconds=1))
            answer.items.insert(0, pb.AddReflectionsResponse.Item())
            fill_item_error(answer.items[0].error, later)
            return answer

    async with serving(tmp_path, Full) as (servicer, client):
        ids = await client.add_all(additions("a", "b", "c"))
        assert servicer.calls == [["a", "b", "c"], ["a"]]
        assert await texts(client) == [("text b", 1), ("text c", 2), ("text a", 3)]
        assert sorted(ids) == sorted(one.reflection_id for one in await client.list("scope"))


def too_few(answer: pb.AddReflectionsResponse) -> None:
    del answer.items[-1]


def nothing(answer: pb.AddReflectionsResponse) -> None:
    answer.items[0].Clear()


def from_the_future(answer: pb.AddReflectionsResponse) -> None:
    answer.items[0].error.CopyFrom(pb.AddError(code=9, reason="FROM_THE_FUTURE", message="no"))


@pytest.mark.parametrize(
    ("change", "said"),
    [(too_few, "1 items for 2"), (nothing, "an item has no result"), (from_the_future, "FROM_THE_FUTURE")],
)
async def test_an_answer_that_cannot_be_used_is_told(tmp_path: Path, change: Any, said: str) -> None:
    class Strange(Counted):
        async def answer(self, request: pb.AddReflectionsRequest, context: Any) -> pb.AddReflectionsResponse:
            answer = await super().answer(request, context)
            change(answer)
            return answer

    async with serving(tmp_path, Strange) as (_, client):
        with pytest.raises(CallFailed, match=said):
            await client.add_all(additions("a", "b"))


def shown(answers: Sequence[Added | DomainError]) -> list[int | Reason]:
    return [one.version if isinstance(one, Added) else one.reason for one in answers]


async def test_a_store_that_adds_one_by_one_answers_the_same(tmp_path: Path) -> None:
    news = [NewReflection(name, "scope", f"text {name}", ORIGIN) for name in ("a", "b", "a")]
    news.insert(1, NewReflection("a", "scope", "another", ORIGIN))
    expected = [1, Reason.REQUEST_CONFLICT, 2, 1]
    assert shown(await add_all(notes.Notes(notes.Settings()), news)) == expected
    store = await sqlite.open(str(tmp_path / "memory.db"), sqlite.Settings())
    assert shown(await add_all(store, news)) == expected
    await store.close()
