"""Starts that the client sends together, over gRPC: each has its own episode or error, whatever becomes of others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import grpc
import pytest

from mulligan.common.channel import Endpoint
from mulligan.common.errors import CallFailed, DomainError, Reason
from mulligan.env.client import EnvClient
from mulligan.env.v1 import env_service_pb2 as pb
from mulligan.env.v1 import env_service_pb2_grpc as pb_grpc
from tests.support.waiting import until

Item = pb.StartEpisodesResponse.Item
Many = Callable[[pb.StartEpisodesRequest], list[Item] | None]


class Recorded(pb_grpc.EnvServiceServicer):
    """Shows each episode its id. `many` gives the items of StartEpisodes, or None to leave the call out."""

    def __init__(self, many: Many):
        self.many = many
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.alone: list[str] = []
        self.together: list[list[str]] = []
        self.ended: list[str] = []

    async def StartEpisode(self, request: pb.StartEpisodeRequest, context: Any) -> pb.StartEpisodeResponse:
        self.alone.append(request.episode_id)
        return shown(request)

    async def StartEpisodes(self, request: pb.StartEpisodesRequest, context: Any) -> pb.StartEpisodesResponse:
        self.together.append([one.episode_id for one in request.starts])
        await self.go_on.wait()
        items = self.many(request)
        if items is None:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "not here")
        return pb.StartEpisodesResponse(items=items)

    async def EndEpisode(self, request: pb.EndEpisodeRequest, context: Any) -> pb.EndEpisodeResponse:
        self.ended.append(request.episode_id)
        return pb.EndEpisodeResponse()


def shown(request: pb.StartEpisodeRequest) -> pb.StartEpisodeResponse:
    return pb.StartEpisodeResponse(observation=request.episode_id)


def all_of(request: pb.StartEpisodesRequest) -> list[Item]:
    return [Item(episode=shown(one)) for one in request.starts]


def failed(reason: str, code: int = 8, **retry: float) -> Item:
    error = pb.StartError(code=code, reason=reason, message="no")
    if retry:
        error.retry_delay.FromTimedelta(timedelta(**retry))
    return Item(error=error)


@asynccontextmanager
async def recorded(many: Many = all_of) -> AsyncIterator[tuple[Recorded, EnvClient]]:
    servicer = Recorded(many)  # type: ignore[abstract]
    server = grpc.aio.server()
    pb_grpc.add_EnvServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    client = EnvClient(Endpoint(f"127.0.0.1:{port}", outage_seconds=20), timeout=300)
    yield servicer, client
    await client.close()
    await server.stop(None)


def asked_for(client: EnvClient, *names: str) -> list[asyncio.Task[Any]]:
    """Starts of one moment."""
    return [asyncio.create_task(client.start("lake", "task", name)) for name in names]


async def observations(asked: list[asyncio.Task[Any]]) -> list[str]:
    return [episode.observation for episode in await asyncio.gather(*asked)]


async def test_starts_of_one_moment_are_one_call_and_one_alone_is_none_of_many() -> None:
    async with recorded() as (servicer, client):
        assert await observations(asked_for(client, "a", "b", "c")) == ["a", "b", "c"]
        assert await observations(asked_for(client, "d")) == ["d"]
        assert (servicer.together, servicer.alone) == ([["a", "b", "c"]], ["d"])


async def test_starts_that_come_while_others_are_under_way_share_a_call() -> None:
    async with recorded() as (servicer, client):
        servicer.go_on.clear()
        first = asked_for(client, "a", "b")
        await until(lambda: len(servicer.together) == 1)
        later = []
        for name in ("c", "d", "e"):  # each in a tick of its own
            later += asked_for(client, name)
            await asyncio.sleep(0)
        servicer.go_on.set()
        assert await observations([*first, *later]) == ["a", "b", "c", "d", "e"]
        assert (servicer.together, servicer.alone) == ([["a", "b"], ["c", "d", "e"]], [])


async def test_a_server_without_the_call_is_asked_one_by_one_and_not_again() -> None:
    async with recorded(lambda request: None) as (servicer, client):
        for names in (("a", "b"), ("c", "d")):
            assert await observations(asked_for(client, *names)) == [*names]
        assert (servicer.together, sorted(servicer.alone)) == ([["a", "b"]], ["a", "b", "c", "d"])


def is_slow(request: pb.StartEpisodesRequest) -> list[Item]:
    return [Item(episode=shown(request.starts[0])), Item(pending=pb.StartPending()), Item(pending=pb.StartPending())]


def is_full(request: pb.StartEpisodesRequest) -> list[Item]:
    full = failed(Reason.CAPACITY_REACHED, milliseconds=1)
    return [Item(episode=shown(request.starts[0])), full, full]


def says_nothing(request: pb.StartEpisodesRequest) -> list[Item]:
    return [Item(episode=shown(request.starts[0])), Item(), Item()]


@pytest.mark.parametrize("many", [is_slow, is_full, says_nothing])
async def test_what_is_not_answered_is_asked_again_alone(many: Many) -> None:
    async with recorded(many) as (servicer, client):
        assert await observations(asked_for(client, "a", "b", "c")) == ["a", "b", "c"]
        assert (len(servicer.together), sorted(servicer.alone)) == (1, ["b", "c"])


async def test_with_another_number_of_items_each_is_asked_for_alone() -> None:
    async with recorded(lambda request: all_of(request)[:1]) as (servicer, client):
        assert await observations(asked_for(client, "a", "b")) == ["a", "b"]
        assert sorted(servicer.alone) == ["a", "b"]


async def test_an_error_is_that_of_its_own_start() -> None:
    def some(request: pb.StartEpisodesRequest) -> list[Item]:
        good, *_ = all_of(request)
        return [good, failed(Reason.UNKNOWN_TASK, 5), failed("FROM_THE_FUTURE", 9)]

    async with recorded(some) as (servicer, client):
        good, unknown, later = await asyncio.gather(*asked_for(client, "a", "b", "c"), return_exceptions=True)
        assert not isinstance(good, BaseException) and good.observation == "a"
        assert isinstance(unknown, DomainError) and unknown.reason is Reason.UNKNOWN_TASK
        assert isinstance(later, CallFailed) and "FROM_THE_FUTURE" in str(later)
        assert not servicer.alone


async def test_one_id_twice_is_asked_for_in_calls_of_their_own() -> None:
    async with recorded() as (servicer, client):
        assert await observations(asked_for(client, "a", "b", "a")) == ["a", "b", "a"]
        assert (servicer.together, servicer.alone) == ([["a", "b"]], ["a"])


async def test_an_episode_whose_caller_was_cancelled_is_ended_also_after_it_began() -> None:
    async with recorded() as (servicer, client):
        servicer.go_on.clear()
        first, *others = asked_for(client, "a", "b", "c")
        await until(lambda: len(servicer.together) == 1)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert servicer.ended == ["a"]
        servicer.go_on.set()
        assert await observations(others) == ["b", "c"]
        await until(lambda: servicer.ended == ["a", "a"])
