"""A run without a learner: the memory alone learns, and all else is as in any run."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mulligan.cli.experiences import lines
from mulligan.common.errors import DomainError, Reason
from mulligan.common.experience_wire import experience_from_proto, experience_to_proto
from mulligan.common.inference import Feature
from mulligan.trainer.events import StepEvent
from mulligan.trainer.folder import RunState
from mulligan.trainer.journal import journal_file, journaled_steps, read_experiences
from mulligan.trainer.manager import RunManager
from mulligan.trainer.run import ServicePorts
from mulligan.trainer.sampling import ForeignWeights
from mulligan.trainer.settings import EvaluationSettings, RolloutSettings
from tests.unit.trainer.test_run import STEPS, World, crash, sampled_parts

ALONE: dict[str, Any] = {
    "learner": "none",
    "deterministic": False,
    "rollout": {"concurrency": 1},
    "algorithm": {"memory_strategy": "best_uplift", "memory_readers": "first", "memory_episodes": True},
}


class Alone(World):
    """Its policy knows what to do when its prompt says so, as texts of a reflection do that end in an even digit."""

    def __init__(self, folder: Path, **changes: Any):
        super().__init__(folder, **ALONE | changes)
        self.memory.left_out = lambda key: 0 if key.endswith("-r1") else None

    def _say(self, system: str, seed: int) -> str:
        self.happen()
        if system == "reflect":
            return f"<prompt>rule {seed % 10}</prompt>"
        told = system.splitlines()[0]
        return "go" if told[-1] in "02468" or seed % 5 == 0 else "no"

    def run(self) -> Any:
        async def open_learner(*_: Any) -> Any:
            raise AssertionError("a run without a learner never asks for one")

        run = super().run()
        before = run.services
        run.services = ServicePorts(before.environment, before.policy, before.memory, open_learner)
        return run


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    world = Alone(tmp_path_factory.mktemp("whole"))
    asyncio.run(world.run().train())
    return world.result(), world.memory.reported


async def test_the_memory_learns_and_no_weights_change(tmp_path: Path) -> None:
    world = Alone(tmp_path)
    run = world.run()
    await run.train()
    assert run.step == STEPS and not run.stopped
    assert world.policy.updates == [] and world.learner.steps == [] and world.learner.checkpoints == {}
    assert world.folder.checkpoint().step == STEPS  # type: ignore[union-attr]
    steps = [entry.event for entry in run.events.entries if isinstance(entry.event, StepEvent)]
    assert [event.metrics["policy_version"] for event in steps] == [0.0] * STEPS
    assert steps[0].metrics["memory_uses"] == 0 and steps[-1].metrics["memory_uses"] == 4
    assert steps[-1].metrics["memory_left_out"] == 2 and steps[-1].metrics["memory_reported"] == 4
    kinds = {entry.kind for entry in world.memory.entries}
    assert kinds == {"rule", "episode"}
    assert set(world.memory.reported.values()) <= {0.0, 1.0} and world.memory.reported


async def test_evaluations_read_the_newest_memory(tmp_path: Path) -> None:
    world = Alone(tmp_path, algorithm={"memory_strategy": "latest_success", "memory_readers": "first"})
    run = world.run()
    await run.train()
    prompts = [prompt for prompt, _ in world.policy.calls]
    evaluated = [prompt[0].content for prompt in prompts[:4] + prompts[-4:]]
    newest = world.memory.entries[-1].text
    assert evaluated == ["solve"] * 4 + [f"{newest}\nanswer with a word"] * 4
    assert all(trial is None for _, trial in world.memory.queries), "nothing is drawn for an evaluation"


async def test_reflectors_alone_leave_evaluations_bare(tmp_path: Path) -> None:
    world = Alone(tmp_path, algorithm={"memory_strategy": "latest_success"})
    await world.run().train()
    assert [prompt[0].content for prompt, _ in world.policy.calls[-4:]] == ["solve"] * 4


@pytest.mark.parametrize("crashes", [[0], [3, 9], [17, 40], [31, 5, 1], [58]])
def test_a_crash_anywhere_changes_nothing(tmp_path: Path, uninterrupted: Any, crashes: list[int]) -> None:
    world = Alone(tmp_path)
    crash(world, crashes, 20)
    assert (world.result(), world.memory.reported) == uninterrupted
    sampled = sampled_parts(world)
    assert len(sampled) == len(set(sampled))


async def test_a_stopped_run_goes_on(tmp_path: Path, uninterrupted: Any) -> None:
    world = Alone(tmp_path)
    run = world.run()
    world.environment.fail = lambda episode: run.stop() if "-s2-" in episode else None
    await run.train()
    assert run.stopped and world.folder.checkpoint().step == 3  # type: ignore[union-attr]
    await world.run().train()
    assert (world.result(), world.memory.reported) == uninterrupted


async def test_a_policy_that_gives_no_tokens_will_do(tmp_path: Path) -> None:
    world = Alone(tmp_path)
    world.policy.features = frozenset(Feature) - {Feature.TOKEN_IDS, Feature.LOG_PROBS, Feature.FULL_WEIGHTS}
    world.policy.frozen = True
    world.policy.fingerprint = "another model"
    run = world.run()
    await run.train()
    assert run.step == STEPS and world.memory.reported


async def test_steps_may_overlap(tmp_path: Path) -> None:
    world = Alone(tmp_path, rollout={"concurrency": 1, "max_staleness": 1})
    run = world.run()
    await run.train()
    ages = [event.metrics["staleness_max"] for event in run.events.steps().values()]
    assert run.step == STEPS and set(ages) == {0.0, 1.0}


async def test_weights_of_somebody_else_end_the_run(tmp_path: Path) -> None:
    world = Alone(tmp_path)
    run = world.run()
    world.environment.fail = lambda episode: setattr(world.policy, "version", 9) if "-s2-" in episode else None
    with pytest.raises(ForeignWeights, match="serves version 9"):
        await run.train()
    world.environment.fail = lambda episode: None
    again = world.run()
    await again.train()
    assert again.step == STEPS, "resumed, it goes on with the policy as it is"


async def test_the_manager_evaluates_it_with_its_memory_and_publishes_nothing(tmp_path: Path) -> None:
    world = Alone(tmp_path / "runs")
    await world.run().train()
    before, asked = len(world.policy.calls), len(world.memory.queries)
    services = world.run().services
    manager = RunManager(tmp_path / "runs", services)
    try:
        settings = EvaluationSettings(samples=1)
        event, version = await manager.evaluate("fake", settings, RolloutSettings(), 0, 1.0, run_id="run")
    finally:
        await manager.close()
    assert version == 0 and event.attempts == 4 and world.policy.updates == []
    assert [(query.version, trial) for query, trial in world.memory.queries[asked:]] == [(world.memory.version, None)]
    systems = {prompt[0].content for prompt, _ in world.policy.calls[before:]}
    assert systems == {f"{world.memory.entries[-1].text}\nanswer with a word"}


async def test_what_it_read_is_in_its_journal(tmp_path: Path) -> None:
    world = Alone(tmp_path)
    await world.run().train()
    folder = world.folder.journal
    chains = [chain for step in journaled_steps(folder) for chain in read_experiences(journal_file(folder, step))]
    read = [chain for chain in chains if chain.memory_use_id]
    assert {chain.memory_use_id for chain in read} == set(world.memory.reported)
    assert all(bool(chain.memory_left_out_id) == (chain.rollout == 1) for chain in read)
    assert [experience_from_proto(experience_to_proto(chain)) for chain in read] == read
    (told,) = [line for line in lines(read[1]) if "left out" in line]
    assert read[1].memory_left_out_id in told
    assert world.folder.record().state is RunState.RUNNING, "the manager writes states"


async def test_a_deterministic_policy_is_still_asked_for(tmp_path: Path) -> None:
    world = Alone(tmp_path, deterministic=True)
    info = world.policy.info

    async def other(policy: str = "") -> Any:
        return replace(await info(policy), deterministic=False)

    world.policy.info = other  # type: ignore[method-assign]
    with pytest.raises(DomainError) as caught:
        await world.run().train()
    assert caught.value.reason is Reason.INVALID_SETTING and caught.value.metadata["field"] == "deterministic"
