"""Episodes that live in an environment server that is killed: played again under new ids, a bounded number of times."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from mulligan.common.channel import Endpoint
from mulligan.common.experience import Experience
from mulligan.common.inference import SamplingParams
from mulligan.common.types import Outcome
from mulligan.env.client import EnvClient
from mulligan.testing.processes import ServiceProcess, ServiceProcesses
from mulligan.trainer.harness import Harness
from mulligan.trainer.settings import RunSettings
from mulligan.trainer.step import StepRunner
from tests.support.fakes import FakeLearner, FakeMemory, FakePolicy

MAX_RESTARTS = 2


@pytest.fixture(scope="module")
def env(shared_services: ServiceProcesses) -> ServiceProcess:
    return shared_services.start("env")


class Killer:
    """A policy that bumps into walls, and has the server killed at its third answer in the first `kills` episodes."""

    def __init__(self, kill: Callable[[], None], kills: int):
        self.left = kills
        self.kill = kill
        self.turn = 0

    def answer(self, system: str, last: str, sampling: SamplingParams) -> str:
        self.turn += 1
        if self.turn == 3 and self.left:
            self.left -= 1
            self.turn = 0
            self.kill()
        return "```Up```"


async def chain(env: ServiceProcess, kills: int) -> tuple[StepRunner, list[Experience]]:
    killer = Killer(env.restart, kills)
    client = EnvClient(Endpoint(env.address, outage_seconds=60))
    policy = FakePolicy(killer.answer)
    settings = RunSettings.model_validate(
        {"environment": "frozenlake-3x3", "algorithm": {"name": "rlvr"}, "rollout": {"rollouts_per_task": 1}}
    )
    info = await client.describe("frozenlake-3x3")
    harness = Harness(client, policy, info, await policy.info(), f"{kills}", MAX_RESTARTS)
    runner = StepRunner(f"killed-{kills}", settings, harness, FakeMemory(), FakeLearner())
    try:
        async with asyncio.timeout(100):
            return runner, list(await runner.sample(0, ["train/00000"], 0))
    finally:
        await client.close()


async def test_a_lost_episode_is_played_again_under_a_new_id(env: ServiceProcess) -> None:
    runner, (experience,) = await chain(env, kills=1)
    attempt = experience["first"]
    assert attempt.outcome.has_reward and attempt.restarts == 1 and attempt.episode_id.endswith("-1")
    assert runner.metrics([experience])["restarts"] == 1 and runner.metrics([experience])["excluded"] == 0


async def test_after_the_last_restart_it_is_excluded_and_counted(env: ServiceProcess) -> None:
    runner, (experience,) = await chain(env, kills=MAX_RESTARTS + 1)
    attempt = experience["first"]
    assert attempt.outcome is Outcome.ENV_ERROR and attempt.reward is None and attempt.restarts == MAX_RESTARTS
    assert "UNKNOWN_EPISODE" in attempt.error
    assert runner.training_data([experience])[0] == []
    assert runner.metrics([experience])["excluded"] == 1
