"""An agent may think for longer than an episode's lease: the trainer keeps its episodes from expiring."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import pytest

from mulligan.common.channel import Endpoint
from mulligan.common.errors import CallFailed, DomainError, Reason, ServiceUnavailable
from mulligan.common.experience import Sample
from mulligan.common.inference import SamplingParams
from mulligan.common.types import Outcome, Split
from mulligan.env.client import EnvClient, RemoteEpisode, kept_alive
from mulligan.env.replicas import EnvReplicas, connect
from mulligan.testing.processes import ServiceProcess, ServiceProcesses
from mulligan.trainer.harness import Harness
from tests.support.fakes import FakePolicy
from tests.support.playing import play_episode

LEASE_SECONDS = 0.6
CHAINED = {"kind": "mulligan.testing.chained", "max_steps": 3}  # every start shows another observation
WITNESSES = 100
SPLIT = Split.TRAIN


@pytest.fixture(scope="module")
def servers(shared_services: ServiceProcesses) -> list[ServiceProcess]:
    environments = {"frozenlake": {"kind": "frozenlake"}, "chained": CHAINED}
    return [
        shared_services.start("env", environments=environments, lease_seconds=LEASE_SECONDS, max_episodes=4096)
        for _ in range(2)
    ]


@asynccontextmanager
async def connected(address: str) -> AsyncIterator[EnvClient | EnvReplicas]:
    client = connect(Endpoint(address, outage_seconds=200.0))
    yield client
    await client.close()


async def outlast_the_lease(client: EnvClient | EnvReplicas, environment: str = "frozenlake") -> None:
    """Returns when an episode that nobody called has expired. To ask for one renews its lease, so each is asked for
    once."""
    task_id = (await client.list_tasks(environment, SPLIT, 1))[0].task_id
    while True:
        idle = [await client.start(environment, task_id, str(uuid4())) for _ in range(WITNESSES)]
        for episode in idle:
            try:
                await episode.step("nothing")
            except DomainError as error:
                if error.reason is not Reason.EPISODE_EXPIRED:
                    raise
                return
            await asyncio.sleep(LEASE_SECONDS / 20)


class Thinker(FakePolicy):
    """Waits in every call until `think` returns."""

    think: Callable[[], Awaitable[None]]

    async def generate(self, prompt: Any, sampling: Any, options: Any = None) -> Any:
        await self.think()
        return await super().generate(prompt, sampling, options)


async def attempt_of(
    client: EnvClient | EnvReplicas, think: Callable[[], Awaitable[None]], environment: str = "frozenlake"
) -> Sample:
    policy = Thinker(lambda system, last, sampling: "```Up```")
    policy.think = think
    policy.context_length = 2**20
    info = await client.describe(environment)
    harness = Harness(client, policy, info, await policy.info(), uuid4().hex, max_restarts=1)
    task_id = (await client.list_tasks(environment, SPLIT, 1))[0].task_id
    before = asyncio.all_tasks()
    attempt = await play_episode(harness, "attempt", task_id, "solve", SamplingParams(max_tokens=100))
    assert {task.get_name() for task in asyncio.all_tasks() - before if "_renew" in repr(task)} == set()
    return attempt


@pytest.mark.parametrize("count", [1, 2])
async def test_thoughts_may_take_longer_than_the_lease(servers: list[ServiceProcess], count: int) -> None:
    async with connected(",".join(server.address for server in servers[:count])) as client:
        turns = iter(range(100))

        async def think() -> None:
            if next(turns) < 2:  # after StartEpisode, and after a StepEpisode
                await outlast_the_lease(client)
                await outlast_the_lease(client)

        attempt = await attempt_of(client, think)
    assert attempt.outcome in (Outcome.COMPLETED, Outcome.TRUNCATED) and attempt.restarts == 0
    assert next(turns) > 2


async def test_without_it_an_episode_expires(servers: list[ServiceProcess]) -> None:
    async with connected(servers[0].address) as client:
        task_id = (await client.list_tasks("frozenlake", SPLIT, 1))[0].task_id
        episode = await client.start("frozenlake", task_id, str(uuid4()))
        await outlast_the_lease(client)
        with pytest.raises(DomainError) as caught:
            await episode.step("```Up```")
        assert caught.value.reason is Reason.EPISODE_EXPIRED


async def test_an_episode_that_was_begun_again_is_not_gone_on_with_when_it_shows_something_else(
    servers: list[ServiceProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server loses it while the agent thinks; the repeated StartEpisode begins another one under its id."""
    begun: list[RemoteEpisode] = []
    replaced = asyncio.Event()
    repeat = RemoteEpisode._repeat
    start = EnvClient.start

    async def repeating(self: RemoteEpisode) -> None:
        try:
            await repeat(self)
        except DomainError:
            replaced.set()
            raise

    async def starting(self: EnvClient, environment: str, task_id: str, episode_id: str) -> RemoteEpisode:
        begun.append(await start(self, environment, task_id, episode_id))
        return begun[-1]

    monkeypatch.setattr(RemoteEpisode, "_repeat", repeating)
    monkeypatch.setattr(EnvClient, "start", starting)
    async with connected(servers[0].address) as client:

        async def think() -> None:
            if len(begun) == 1 and not replaced.is_set():
                await client.end(begun[0].episode_id)
                await replaced.wait()

        attempt = await attempt_of(client, think, "chained")
    assert len(begun) == 2 and attempt.restarts == 1 and attempt.outcome is Outcome.COMPLETED
    assert attempt.turns[0].observation == begun[1].observation != begun[0].observation


async def test_an_episode_of_a_chained_server_lives_as_long_as_the_one_that_stands_for_it(
    servers: list[ServiceProcess], services: ServiceProcesses
) -> None:
    there = {"kind": "remote", "address": servers[0].address, "environment": "frozenlake"}
    front = services.start("env", environments={"frozenlake": there}, lease_seconds=600.0)
    async with connected(front.address) as client, connected(servers[0].address) as behind:
        turns = iter(range(100))

        async def think() -> None:
            if next(turns) < 2:
                await outlast_the_lease(behind)
                await outlast_the_lease(behind)

        attempt = await attempt_of(client, think)
    assert attempt.outcome in (Outcome.COMPLETED, Outcome.TRUNCATED) and attempt.restarts == 0


FAILURES = [
    CallFailed("somewhere", "StepEpisode", "DEADLINE_EXCEEDED", "late"),
    ServiceUnavailable("somewhere", 1.0, "away"),
    DomainError(Reason.EPISODE_EXPIRED, "expired"),
    RuntimeError("anything"),
]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
async def test_a_failing_renewal_fails_nothing_else(failure: Exception) -> None:
    called = asyncio.Event()
    calls: list[int] = []

    async def repeat() -> None:
        calls.append(1)
        if len(calls) > 2 or not isinstance(failure, CallFailed | ServiceUnavailable):
            called.set()
        raise failure

    before = asyncio.all_tasks()
    async with kept_alive("episode", 0.01, repeat):
        await called.wait()
    assert asyncio.all_tasks() == before


async def test_what_is_waited_for_is_told_as_it_is() -> None:
    """The block's own failure and a cancellation pass, and no renewal outlives them."""
    running = asyncio.Event()

    async def repeat() -> None:
        running.set()
        await asyncio.Event().wait()

    async def fail(failure: BaseException) -> None:
        async with kept_alive("episode", 0.01, repeat):
            await running.wait()
            raise failure

    before = asyncio.all_tasks()
    for failure in (ValueError("of the block"), asyncio.CancelledError()):
        running.clear()
        with pytest.raises(type(failure)):
            await fail(failure)
    async with kept_alive("episode", 0.0, repeat):  # a server that states no lease
        assert asyncio.all_tasks() == before
    assert asyncio.all_tasks() == before
