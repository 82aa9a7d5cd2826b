"""Thousands of episodes and of calls at the same moment: none fails, and none gets another's answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import pytest

from mulligan.common.channel import Endpoint
from mulligan.env.client import EnvClient
from mulligan.env.v1 import env_service_pb2 as pb
from mulligan.env.v1 import env_service_pb2_grpc as pb_grpc
from mulligan.testing.processes import ServiceProcess, ServiceProcesses

MANY = 2_500


@pytest.fixture(scope="module")
def server(shared_services: ServiceProcesses) -> ServiceProcess:
    awkward = {"kind": "tests.support.environments"}
    return shared_services.start("env", environments={"awkward": awkward}, max_episodes=2 * MANY)


@pytest.fixture
async def client(server: ServiceProcess) -> AsyncIterator[EnvClient]:
    client = EnvClient(Endpoint(server.address))
    yield client
    await client.close()


async def test_thousands_of_episodes_through_one_client(client: EnvClient) -> None:
    async def play(n: int) -> list[str]:
        episode = await client.start("awkward", "good", f"many-{n}")
        steps = [await episode.step(f"{n}.{index}") for index in range(2)]
        await episode.end()
        return [step.observation for step in steps]

    played = await asyncio.gather(*map(play, range(MANY)))
    assert played == [[f"1: {n}.0", f"2: {n}.1"] for n in range(MANY)]


async def test_steps_of_thousands_in_one_moment(client: EnvClient) -> None:
    episodes = await asyncio.gather(*(client.start("awkward", "good", f"moment-{n}") for n in range(MANY)))
    answers = await asyncio.gather(*(episode.step(str(n)) for n, episode in enumerate(episodes)))
    assert [answer.observation for answer in answers] == [f"1: {n}" for n in range(MANY)]
    await asyncio.gather(*(episode.end() for episode in episodes))


async def test_a_client_that_bounds_nothing(server: ServiceProcess) -> None:
    """By default gRPC's server cancels calls, at random, once a thousand wait for it."""
    async with grpc.aio.insecure_channel(server.address) as channel:
        stub = pb_grpc.EnvServiceStub(channel)
        requests = [
            pb.StartEpisodeRequest(episode_id=f"plain-{n}", environment="awkward", task_id="good") for n in range(MANY)
        ]
        started = await asyncio.gather(*map(stub.StartEpisode, requests))
        assert {response.observation for response in started} == {"begin"}
        await asyncio.gather(*(stub.EndEpisode(pb.EndEpisodeRequest(episode_id=r.episode_id)) for r in requests))
