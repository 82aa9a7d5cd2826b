"""Ways to step one server, from bare Python to the coalescing client.

A server process on loopback serves FrozenLake. Each way plays whole episodes of the same tasks with the same actions.
Only steps are counted and timed: episodes start before and end after the measured time.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import grpc

from benchmarks.common import alternate, median, print_table, spread
from benchmarks.env.cores import on
from benchmarks.env.sessions import ACTION, STEPS
from mulligan.common.channel import Endpoint
from mulligan.env.client import EnvClient, RemoteEpisode
from mulligan.env.envs.frozenlake.environment import FrozenLake
from mulligan.env.v1 import env_service_pb2 as pb
from mulligan.env.v1 import env_service_pb2_grpc as pb_grpc
from mulligan.testing.processes import ServiceProcesses

ENVIRONMENT = "frozenlake"
_ids = itertools.count()


def task(index: int) -> str:
    return f"train/{index % 64:05d}"


async def bare(episodes: int) -> float:
    """The environment in this process, without transport: the upper limit."""
    lake = FrozenLake()
    started = [lake.start(task(index)) for index in range(episodes)]
    start = time.perf_counter()
    for episode in started:
        for _ in range(STEPS):
            episode.step(ACTION)
    return episodes * STEPS / (time.perf_counter() - start)


async def with_episodes(client: EnvClient, count: int, play: Callable[[list[RemoteEpisode]], Awaitable[None]]) -> float:
    episodes = await asyncio.gather(
        *(client.start(ENVIRONMENT, task(index), f"bench-{next(_ids)}") for index in range(count))
    )
    start = time.perf_counter()
    await play(list(episodes))
    rate = count * STEPS / (time.perf_counter() - start)
    await asyncio.gather(*(episode.end() for episode in episodes))
    return rate


async def unary(stub: pb_grpc.EnvServiceStub, concurrent: int, episodes: list[RemoteEpisode]) -> None:
    """One StepEpisode call per step, `concurrent` at a time."""
    waiting = iter(episodes)

    async def play() -> None:
        for episode in waiting:
            for index in range(STEPS):
                await stub.StepEpisode(
                    pb.StepEpisodeRequest(episode_id=episode.episode_id, step_index=index, action=ACTION)
                )

    await asyncio.gather(*(play() for _ in range(concurrent)))


async def batched(stub: pb_grpc.EnvServiceStub, episodes: list[RemoteEpisode]) -> None:
    """One StepEpisodes call for a step of all episodes."""
    for index in range(STEPS):
        await stub.StepEpisodes(
            pb.StepEpisodesRequest(
                steps=[
                    pb.StepEpisodeRequest(episode_id=episode.episode_id, step_index=index, action=ACTION)
                    for episode in episodes
                ]
            )
        )


async def coalesced(episodes: list[RemoteEpisode]) -> None:
    """An asyncio task for each episode, as in the trainer; the client coalesces their steps."""

    async def play(episode: RemoteEpisode) -> None:
        for _ in range(STEPS):
            await episode.step(ACTION)

    await asyncio.gather(*(play(episode) for episode in episodes))


async def one_after_another(episodes: list[RemoteEpisode]) -> None:
    """One episode at a time, so that there is nothing to coalesce."""
    for episode in episodes:
        await coalesced([episode])


async def measure(address: str, rounds: int) -> dict[str, list[float]]:
    client = EnvClient(Endpoint(address))
    async with grpc.aio.insecure_channel(address) as channel:
        stub = pb_grpc.EnvServiceStub(channel)
        ways: dict[str, Callable[[], Awaitable[float]]] = {
            "bare Python": partial(bare, 512),
            "client, 1 episode": partial(with_episodes, client, 32, one_after_another),
            "unary, 1 at a time": partial(with_episodes, client, 32, partial(unary, stub, 1)),
            "unary, 64 at a time": partial(with_episodes, client, 64, partial(unary, stub, 64)),
            "batches of 64": partial(with_episodes, client, 64, partial(batched, stub)),
            "batches of 512": partial(with_episodes, client, 512, partial(batched, stub)),
            "client, 64 episodes": partial(with_episodes, client, 64, coalesced),
            "client, 512 episodes": partial(with_episodes, client, 512, coalesced),
        }
        await alternate(ways, 1)  # warms caches and connections
        found = await alternate(ways, rounds)
    await client.close()
    return found


def run(folder: Path, server_core: int | None, rounds: int) -> dict[str, int]:
    """Prints the table, and returns the medians of steps per second by way."""
    services = ServiceProcesses(folder)
    try:
        with on(server_core):
            server = services.start("env")
        found = asyncio.run(measure(server.address, rounds))
    finally:
        services.end()
    base = median(found["bare Python"])
    one = median(found["unary, 64 at a time"])
    print_table(
        ["way", "steps/s", "least–greatest", "of bare Python", "of unary, 64"],
        [
            [name, f"{median(v):,.0f}", spread(v), f"{median(v) / base:.1%}", f"{median(v) / one:.2f}x"]
            for name, v in found.items()
        ],
    )
    return {name: round(median(v)) for name, v in found.items()}
