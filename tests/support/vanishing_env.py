"""Callers of the env service that vanish: a case for each call that changes something."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from mulligan.env import servicer
from mulligan.env.episodes import EpisodeLimits, EpisodeTable
from mulligan.env.v1 import env_service_pb2 as pb
from mulligan.env.v1 import env_service_pb2_grpc as pb_grpc
from mulligan.env.workers import WorkerPool
from tests.support.vanishing import Case, Vanishing, at_each_wait, vanishing
from tests.support.waiting import until
from tests.unit.env.test_episode_memory import Echo


class _Episodes:
    """A table of them, whose environment takes longer than the loop waits for quick calls."""

    def __init__(self) -> None:
        self.echo = Echo(0.005)
        self.workers = WorkerPool(size=2, limit_seconds=60.0, max_abandoned=2)
        self.table = EpisodeTable({"echo": self.echo}, self.workers, EpisodeLimits(max_episodes=10))
        self.stub: pb_grpc.EnvServiceStub
        self.name = uuid4().hex
        self.played = 0

    def start(self) -> pb.StartEpisodeRequest:
        return pb.StartEpisodeRequest(episode_id=self.name, environment="echo", task_id="t")

    def step(self, name: str = "") -> pb.StepEpisodeRequest:
        return pb.StepEpisodeRequest(episode_id=name or self.name, step_index=self.played, action=f"a{self.played}")

    async def end_all(self, *names: str) -> None:
        for name in names or [self.name]:
            await self.stub.EndEpisode(pb.EndEpisodeRequest(episode_id=name))
        await self.nothing_left()

    async def nothing_left(self) -> None:
        assert self.table.live_count == self.table.answer_bytes == 0
        await until(lambda: not self.echo.open and not self.table._closing)


@asynccontextmanager
async def _serving(caller: Vanishing) -> AsyncIterator[_Episodes]:
    found = _Episodes()
    async with vanishing(lambda server: servicer.add_to_server(server, found.table), caller) as (_, channel):
        found.stub = pb_grpc.EnvServiceStub(channel)
        yield found
    found.workers.close()


async def start_episode(folder: Path, caller: Vanishing) -> None:
    async def begun(answer: Any) -> None:
        if answer is None:
            again = await its.stub.StartEpisode(its.start())
            assert again.observation == "begin"
        assert its.table.live_count == 1, "one, whoever asked for it"
        await its.end_all()
        its.name = uuid4().hex

    async with _serving(caller) as its:
        await at_each_wait(caller, lambda: its.stub.StartEpisode(its.start()), begun)


async def start_episodes(folder: Path, caller: Vanishing) -> None:
    def starts() -> pb.StartEpisodesRequest:
        return pb.StartEpisodesRequest(
            starts=[pb.StartEpisodeRequest(episode_id=name, environment="echo", task_id="t") for name in names]
        )

    async def begun(answer: Any) -> None:
        again = await its.stub.StartEpisodes(starts())
        assert [item.episode.observation for item in again.items] == ["begin"] * 3
        assert answer is None or answer == again
        assert its.table.live_count == 3, "one of each id, whoever asked for it"
        await its.end_all(*names)
        names[:] = [uuid4().hex for _ in names]

    async with _serving(caller) as its:
        names = ["one", "two", "three"]
        await at_each_wait(caller, lambda: its.stub.StartEpisodes(starts()), begun)


async def step_episode(folder: Path, caller: Vanishing) -> None:
    async def stepped(answer: Any) -> None:
        again = await its.stub.StepEpisode(its.step())
        assert again.observation == f"a{its.played}" and (answer is None or answer == again)
        its.played += 1
        assert its.echo.played == its.played, "each step once"

    async with _serving(caller) as its:
        await its.stub.StartEpisode(its.start())
        await at_each_wait(caller, lambda: its.stub.StepEpisode(its.step()), stepped)
        await its.end_all()


async def step_episodes(folder: Path, caller: Vanishing) -> None:
    names = ["one", "two", "three"]

    def steps() -> pb.StepEpisodesRequest:
        return pb.StepEpisodesRequest(steps=map(its.step, names))

    async def stepped(answer: Any) -> None:
        again = await its.stub.StepEpisodes(steps())
        assert [item.step.observation for item in again.items] == [f"a{its.played}"] * 3
        assert answer is None or answer == again
        its.played += 1
        assert its.echo.played == its.played * 3, "each step once"
        assert not any(record.running or record.held for record in its.table._live.values())

    async with _serving(caller) as its:
        for its.name in names:
            await its.stub.StartEpisode(its.start())
        await at_each_wait(caller, lambda: its.stub.StepEpisodes(steps()), stepped)
        await its.end_all(*names)


async def fork_episode(folder: Path, caller: Vanishing) -> None:
    def fork() -> pb.ForkEpisodeRequest:
        return pb.ForkEpisodeRequest(episode_id="source", step_index=1, new_episode_id=its.name)

    async def forked(answer: Any) -> None:
        again = await its.stub.ForkEpisode(fork())
        assert again.observation == "a0" and (answer is None or answer == again)
        assert its.table.live_count == 2, "the source and one copy"
        await its.stub.EndEpisode(pb.EndEpisodeRequest(episode_id=its.name))
        await until(lambda: len(its.echo.open) == 1)
        its.name = uuid4().hex

    async with _serving(caller) as its:
        its.name = "source"
        await its.stub.StartEpisode(its.start())
        await its.stub.StepEpisode(its.step())
        its.name = uuid4().hex
        await at_each_wait(caller, lambda: its.stub.ForkEpisode(fork()), forked)
        await its.end_all("source")


async def end_episode(folder: Path, caller: Vanishing) -> None:
    async def ended(answer: Any) -> None:
        await its.end_all()
        its.name = uuid4().hex
        await its.stub.StartEpisode(its.start())

    async with _serving(caller) as its:
        await its.stub.StartEpisode(its.start())
        await at_each_wait(caller, lambda: its.stub.EndEpisode(pb.EndEpisodeRequest(episode_id=its.name)), ended)
        await its.end_all()


_SERVICE = "/mulligan.env.v1.EnvService/"
CASES: dict[str, Case] = {
    f"{_SERVICE}StartEpisode": start_episode,
    f"{_SERVICE}StartEpisodes": start_episodes,
    f"{_SERVICE}StepEpisode": step_episode,
    f"{_SERVICE}StepEpisodes": step_episodes,
    f"{_SERVICE}ForkEpisode": fork_episode,
    f"{_SERVICE}EndEpisode": end_episode,
}
