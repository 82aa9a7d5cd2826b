"""Many episodes played over a faulty network by the ordinary client, against a server that is killed now and then.

Every answer is compared with the one that the episode's own actions must lead to (`chained.py`). Who plays knows when
the server was killed and when an episode was last called, and so which losses have a cause.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import grpc

from mulligan.common.channel import Endpoint
from mulligan.common.errors import CallFailed, DomainError, Reason, ServiceUnavailable
from mulligan.common.types import EpisodeStep
from mulligan.env.client import EnvClient, RemoteEpisode
from mulligan.env.v1 import env_service_pb2 as pb
from mulligan.env.v1 import env_service_pb2_grpc as pb_grpc
from mulligan.testing.chained import SLOW, Chain
from mulligan.testing.faulty_network import Faults, FaultyProxy
from mulligan.testing.processes import ServiceProcess, ServiceProcesses

LEASE_SECONDS = 2.0
STEPS_OF_AN_EPISODE = 25
CLIENTS = 6
EPISODES_EACH = 12


class BrokenPromise(AssertionError):
    """What must never happen."""


@dataclass
class Play:
    """Until `wanted` steps were answered and compared; the server is killed about `kills` times meanwhile."""

    server: ServiceProcess
    wanted: int
    kills: int
    chance: random.Random
    counts: Counter[str] = field(default_factory=Counter)
    losses: Counter[str] = field(default_factory=Counter)
    generation: int = 0  # of the server
    steps: int = 0
    over: bool = False

    async def run(self) -> dict[str, Any]:
        proxy = FaultyProxy(self.server.address, Faults(), random.Random(self.chance.random()))
        await proxy.start()
        clients = [EnvClient(Endpoint(proxy.address, outage_seconds=60.0), timeout=30.0) for _ in range(CLIENTS)]
        began = time.monotonic()
        try:
            await self._play_all(clients)
        finally:
            for client in clients:
                await client.close()
            await proxy.stop()
        return {
            "steps": self.steps,
            **{name: self.counts[name] for name in ("episodes", "completed", "forks")},
            "losses": dict(sorted(self.losses.items())),
            "server_kills": self.generation,
            **{name: proxy.happened[name] for name in ("connections_cut", "answers_dropped", "delays")},
            **{
                name: self.counts[name]
                for name in ("calls_duplicated", "duplicates_answered", "old_steps_repeated", "conflicts_refused")
            },
            "wrong_answers": 0,  # the first one ends the case
            "losses_without_a_cause": 0,
            "seconds_under_fire": round(time.monotonic() - began, 1),
        }

    async def _play_all(self, clients: list[EnvClient]) -> None:
        async with _second_connection(self.server.address) as again, asyncio.TaskGroup() as group:
            killing = group.create_task(self._kill())
            players = [
                group.create_task(self._play(client, again, random.Random(self.chance.random())))
                for client in clients
                for _ in range(EPISODES_EACH)
            ]
            await asyncio.wait(players)
            self.over = True
            await killing

    async def _kill(self) -> None:
        for number in range(self.kills):
            due = self.wanted * (number + self.chance.uniform(0.2, 0.8)) / self.kills
            while self.steps < due and not self.over:  # noqa: ASYNC110 - counted by seventy tasks
                await asyncio.sleep(0.01)
            if self.over:
                return
            self.generation += 1
            restarting = asyncio.create_task(asyncio.to_thread(self.server.restart))
            try:
                await asyncio.shield(restarting)
            except asyncio.CancelledError:  # whoever ends the server does so after its start
                await restarting
                raise

    async def _play(self, client: EnvClient, again: _Again, chance: random.Random) -> None:
        while self.steps < self.wanted:
            episode = _Episode(self, client, again, chance)
            self.counts["episodes"] += 1
            try:
                await episode.play()
                self.counts["completed"] += 1
            except DomainError as error:
                self._lost(error, episode)
            except ServiceUnavailable:
                self.losses["ServiceUnavailable"] += 1
            except CallFailed as error:
                if not error.timed_out:
                    raise
                self.losses[error.code] += 1

    def _lost(self, error: DomainError, episode: _Episode) -> None:
        """Raises unless the loss has a cause."""
        unknown = error.reason is Reason.UNKNOWN_EPISODE and episode.generation < self.generation
        idle = time.monotonic() - episode.called
        expired = error.reason is Reason.EPISODE_EXPIRED and idle > LEASE_SECONDS
        if not unknown and not expired:
            raise BrokenPromise(f"{error}; idle for {idle:.2f} s, generation {episode.generation} of {self.generation}")
        self.losses[error.reason] += 1


class _Episode:
    """One episode, and how it is treated: mostly stepped, at times twice, late, or copied."""

    def __init__(self, play: Play, client: EnvClient, again: _Again, chance: random.Random) -> None:
        self._play = play
        self._client = client
        self._again = again
        self._chance = chance
        self.generation = play.generation
        self.called = time.monotonic()
        self._played: list[tuple[str, EpisodeStep]] = []

    async def play(self) -> None:
        remote = await self._client.start("chained", "plain", uuid4().hex)
        chain = Chain(remote.observation)
        while len(self._played) < STEPS_OF_AN_EPISODE:
            await self._step(remote, chain)
            draw = self._chance.random()
            if draw < 0.05:
                await self._look_back(remote)
            elif draw < 0.07 and len(self._played) < STEPS_OF_AN_EPISODE:
                remote = await self._continue_as_copy(remote)
            elif draw < 0.071:
                await asyncio.sleep(LEASE_SECONDS * 1.5)
        if not self._played[-1][1].done:
            raise BrokenPromise("the last step did not end the episode")
        await remote.end()

    async def _step(self, remote: RemoteEpisode, chain: Chain) -> None:
        index = len(self._played)
        action = (
            f"{SLOW if self._chance.random() < 0.01 else 'quick'} {remote.episode_id} {index} {self._chance.random()}"
        )
        duplicates = self._chance.choices((0, 1, 3), (0.8, 0.15, 0.05))[0]
        sent = [asyncio.create_task(self._again(remote.episode_id, index, action)) for _ in range(duplicates)]
        self._play.counts["calls_duplicated"] += duplicates
        if sent and self._chance.random() < 0.5:
            await asyncio.sleep(self._chance.uniform(0, 0.01))  # the copies come first
        called = time.monotonic()
        try:
            answer = await remote.step(action)
        finally:
            others = await asyncio.gather(*sent)
        self.called = called
        expected = chain.after(action)
        if answer.observation != expected:
            raise BrokenPromise(f"step {index} of {remote.episode_id} showed {answer.observation!r}, not {expected!r}")
        for other in others:
            if other is not None and other != answer.observation:
                raise BrokenPromise(f"step {index} of {remote.episode_id} had two answers: {other!r}, {expected!r}")
            self._play.counts["duplicates_answered"] += other is not None
        self._played.append((action, answer))
        self._play.steps += 1

    async def _look_back(self, remote: RemoteEpisode) -> None:
        """A step that was played long ago has the answer that it had; with another action it has none."""
        index = self._chance.randrange(len(self._played))
        action, answer = self._played[index]
        called = time.monotonic()
        if self._chance.random() < 0.5:
            if await self._client.step(remote.episode_id, index, action) != answer:
                raise BrokenPromise(f"step {index} of {remote.episode_id} has another answer now")
            self._play.counts["old_steps_repeated"] += 1
        else:
            try:
                await self._client.step(remote.episode_id, index, f"not {action}")
            except DomainError as error:
                if error.reason is not Reason.STEP_CONFLICT:
                    raise
                self._play.counts["conflicts_refused"] += 1
            else:
                raise BrokenPromise(f"step {index} of {remote.episode_id} was played with two actions")
        self.called = called

    async def _continue_as_copy(self, remote: RemoteEpisode) -> RemoteEpisode:
        called = time.monotonic()
        copied = await remote.fork(uuid4().hex)
        self.called = called
        if copied.observation != self._played[-1][1].observation:
            raise BrokenPromise(f"a copy of {remote.episode_id} shows {copied.observation!r}")
        self._play.counts["forks"] += 1
        await remote.end()
        return copied


_Again = Callable[[str, int, str], Any]


@asynccontextmanager
async def _second_connection(address: str) -> AsyncIterator[_Again]:
    """Sends a step a second time, past the proxy: alone or in a batch. Its observation, None where it got none."""
    options = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 200)]
    async with grpc.aio.insecure_channel(address, options) as channel:
        stub = pb_grpc.EnvServiceStub(channel)

        async def again(episode_id: str, index: int, action: str) -> str | None:
            step = pb.StepEpisodeRequest(episode_id=episode_id, step_index=index, action=action)
            try:
                if index % 2:
                    return (await stub.StepEpisode(step, timeout=10.0)).observation
                batch = pb.StepEpisodesRequest(steps=[step])
                batch.max_wait.FromMilliseconds(20)
                (item,) = (await stub.StepEpisodes(batch, timeout=10.0)).items
                return item.step.observation if item.HasField("step") else None
            except grpc.aio.AioRpcError:
                return None

        yield again


async def play_under_faults(
    services: ServiceProcesses, *, steps: int, kills: int, seed: int, **settings: object
) -> dict[str, Any]:
    """What happened, in numbers. Raises a group with a BrokenPromise at the first wrong answer or loss without a cause.
    `settings` are the environment's."""
    table = {"kind": "mulligan.testing.chained", "max_steps": STEPS_OF_AN_EPISODE, **settings}
    server = services.start(
        "env",
        environments={"chained": table},
        lease_seconds=LEASE_SECONDS,
    )
    return await Play(server, steps, kills, random.Random(seed)).run()
