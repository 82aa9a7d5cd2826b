"""A run stays in the environment that it began in: nothing is learned from attempts at two tasks of one name."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from mulligan.common.errors import DomainError, Reason
from mulligan.common.types import EnvironmentInfo, Split, TaskInfo
from mulligan.trainer.fingerprint import brief, fingerprint
from mulligan.trainer.folder import RunState
from mulligan.trainer.journal import journal_file, read_experiences
from mulligan.trainer.manager import RunManager
from mulligan.trainer.run_environment import EnvironmentChanged, KnownEnvironment
from mulligan.trainer.settings import EvaluationSettings, RolloutSettings
from tests.support.fakes import FakeEnvironment, FakeEpisode
from tests.support.waiting import until
from tests.unit.trainer.test_run import STEPS, World, sampled_parts


class SeededEpisode(FakeEpisode):
    seed = 0

    @property
    def observation(self) -> str:
        return f"board {self.task_id} of seed {self.seed}"


@dataclass
class Seeded(FakeEnvironment):
    """`seed_of` gives the seed of the server at which an episode begins."""

    seed_of: Callable[[str], int] = lambda episode_id: 0
    changes: dict[str, Any] = field(default_factory=dict)  # of what it says of itself
    without: Split | None = None  # it has no tasks of this kind
    tests: int = 4

    async def describe(self, environment: str) -> EnvironmentInfo:
        return replace(await super().describe(environment), **self.changes)

    async def list_tasks(self, environment: str, split: Split, limit: int) -> list[TaskInfo]:
        return [] if split is self.without else await super().list_tasks(environment, split, limit)

    async def start(self, environment: str, task_id: str, episode_id: str) -> FakeEpisode:
        self.started.append(episode_id)
        episode = SeededEpisode(self, task_id, episode_id)
        episode.seed = self.seed_of(episode_id)
        return episode


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path)
    world.environment = Seeded(world.environment.answers, fail=world.environment.fail)
    return world


def seeded(world: World) -> Seeded:
    assert isinstance(world.environment, Seeded)
    return world.environment


@pytest.fixture
async def manager(world: World, tmp_path: Path) -> AsyncIterator[RunManager]:
    manager = RunManager(tmp_path, world.run().services)
    yield manager
    await manager.close()


def boards(world: World) -> dict[str, set[str]]:
    """What the attempts of each group began with."""
    found: dict[str, set[str]] = {}
    for step in range(STEPS):
        path = journal_file(world.folder.journal, step)
        for chain in read_experiences(path) if path.exists() else ():
            for attempt in (chain.sample("first"), chain.sample("second")):
                if attempt is not None and attempt.turns:
                    group = found.setdefault(chain.experience_id.rpartition("-r")[0], set())
                    group.add(attempt.turns[0].observation)
    return found


async def ended(manager: RunManager) -> tuple[RunState, str]:
    await until(lambda: manager.record("run").state is not RunState.RUNNING)
    return manager.record("run").state, manager.record("run").error


async def test_a_run_resumes_in_its_own_environment_alone(world: World, manager: RunManager) -> None:
    run = world.run()
    world.environment.fail = lambda episode: run.stop() if "-s2-" in episode else None
    await run.train()
    world.environment.fail = lambda episode: None
    kept = world.folder.environment()
    assert run.step == 3 and kept is not None and len(kept.observations) == 2
    world.folder.write_record(world.folder.record().now(RunState.STOPPED))

    seeded(world).seed_of = lambda episode_id: 7
    with pytest.raises(DomainError) as caught:
        await manager.resume("run")
    assert caught.value.reason is Reason.ENVIRONMENT_CHANGED and caught.value.code == "FAILED_PRECONDITION"
    assert "task 't0' showed 'board t0 of seed 0' first and shows 'board t0 of seed 7'" in caught.value.message
    assert "--accept-environment" in caught.value.message
    assert manager.record("run").state is RunState.STOPPED and world.folder.environment() == kept

    seeded(world).seed_of = lambda episode_id: 0
    await manager.resume("run")
    assert (await ended(manager))[0] is RunState.COMPLETED
    assert all(len(group) == 1 for group in boards(world).values())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_steps": 9}, "max_steps was 1 and is 9"),
        ({"max_reward": 2.0}, "max_reward was 1.0 and is 2.0"),
        ({"task_counts": {Split.TRAIN: 3, Split.TEST: 1}}, "task_counts.train was 4 and is 3"),
        ({"prompts": "solver"}, "prompts.solver was 'solve' and is 'other'"),
        ({"answers": {"t0": "go", "t9": "go"}}, "the list of train tasks has changed"),
    ],
)
async def test_what_differs_is_said(world: World, manager: RunManager, changes: dict[str, Any], words: str) -> None:
    place = world.run().environments
    await place.settle(await place.open(), lambda text: None, accept=False)
    if "answers" in changes:
        world.environment.answers = changes["answers"]
    elif "prompts" in changes:
        prompts = (await world.environment.describe("fake")).prompts
        seeded(world).changes = {"prompts": replace(prompts, solver="other")}
    else:
        seeded(world).changes = changes
    world.folder.write_record(world.folder.record().now(RunState.STOPPED))
    with pytest.raises(DomainError, match=words):
        await manager.resume("run")


async def test_words_for_people_may_change(world: World) -> None:
    place = world.run().environments
    await place.settle(await place.open(), lambda text: None, accept=False)
    seeded(world).changes = {"description": "better said", "can_fork": True}
    await world.run().train()


async def test_an_accepted_environment_is_the_runs_own_from_then_on(world: World, manager: RunManager) -> None:
    """The step that was sampled in part is sampled anew, so that no group holds attempts at two boards."""
    world.environment.fail = lambda episode: fails() if "-s3-" in episode and "second" in episode else None

    def fails() -> None:
        raise RuntimeError("the trainer's machine is switched off")

    manager.go_on()
    assert (await ended(manager))[0] is RunState.FAILED
    world.environment.fail = lambda episode: None
    partly = journal_file(world.folder.journal, 3)
    assert partly.exists()
    seeded(world).seed_of = lambda episode_id: 7
    await manager.resume("run", accept_environment=True)
    assert (await ended(manager))[0] is RunState.COMPLETED
    found = boards(world)
    assert all(len(group) == 1 for group in found.values())
    seeds = {group.rpartition("-t")[0]: next(iter(shown))[-1] for group, shown in found.items()}
    assert seeds == {"run-s0": "0", "run-s1": "0", "run-s2": "0", "run-s3": "7", "run-s4": "7"}
    assert partly.with_name(f"{partly.name}.set-aside-0").exists(), "nothing that was journaled is lost"
    kept = world.folder.environment()
    assert kept is not None and kept.observations["t0"] == "board t0 of seed 7"


async def test_a_server_that_comes_back_with_another_seed_is_noticed_within_the_step(
    world: World, manager: RunManager
) -> None:
    """And when it has its seed again, the run ends as if nothing had been."""
    own = World(world.folder.path.parent / "own")
    own.environment = Seeded(own.environment.answers)
    await own.run().train()

    seeded(world).seed_of = lambda episode_id: 7 if "-s2-" in episode_id and "-second" in episode_id else 0
    manager.go_on()
    state, error = await ended(manager)
    assert state is RunState.FAILED and "of seed 0' first and now" in error and "--accept-environment" in error
    assert len(world.learner.steps) == 2, "nothing was learned from the step"
    assert not journal_file(world.folder.journal, 2).exists()

    seeded(world).seed_of = lambda episode_id: 0
    await manager.resume("run")
    assert (await ended(manager))[0] is RunState.COMPLETED
    assert world.result() == own.result()
    assert all(len(group) == 1 for group in boards(world).values())
    sampled = sampled_parts_of_runs_own(world)
    assert len(sampled) == len(set(sampled))


def sampled_parts_of_runs_own(world: World) -> list[str]:
    for path in world.folder.journal.glob("*.set-aside-*"):
        path.unlink()
    return sampled_parts(world)


async def test_a_change_between_the_tasks_of_a_step_is_noticed_before_it_is_learned_from(world: World) -> None:
    """Each task has been shown once: nothing but the fingerprint tells."""
    seeded(world).seed_of = lambda episode_id: 7 if "run-s1-" in episode_id or changed else 0
    changed: list[str] = []
    world.environment.answers = {f"t{n}": "go" for n in range(40)}
    world.policy.answer = lambda system, last, sampling: "go"
    run = world.run()
    world.environment.fail = lambda episode: changed.append(episode) if "run-s1-" in episode else None
    with pytest.raises(EnvironmentChanged, match=r"is not the one that the run began in|first and now"):
        await run.train()
    assert run.step == 1 and len(world.learner.steps) <= 1


async def test_one_of_several_servers_with_another_seed_is_noticed(world: World) -> None:
    seeded(world).seed_of = lambda episode_id: sum(map(ord, episode_id)) % 2
    with pytest.raises(EnvironmentChanged):
        await world.run().train()
    assert not world.learner.steps


async def test_an_environment_that_does_not_say_that_it_is_deterministic_may_show_what_it_likes(world: World) -> None:
    shown = iter(range(10**6))
    seeded(world).seed_of = lambda episode_id: next(shown)
    seeded(world).changes = {"deterministic": False}
    await world.run().train()
    kept = world.folder.environment()
    assert kept is not None and not kept.observations


async def test_a_run_from_before_fingerprints_resumes_and_gets_one(world: World, manager: RunManager) -> None:
    run = world.run()
    world.environment.fail = lambda episode: run.stop() if "-s2-" in episode else None
    await run.train()
    world.environment.fail = lambda episode: None
    (world.folder.path / "environment.json").unlink()
    world.folder.write_record(world.folder.record().now(RunState.STOPPED))
    await manager.resume("run")
    assert (await ended(manager))[0] is RunState.COMPLETED
    assert world.folder.environment() is not None


async def test_tasks_that_cannot_be_started_tell_nothing() -> None:
    environment = Seeded({"t0": "go", "t1": "go"})

    async def start(environment: str, task_id: str, episode_id: str) -> FakeEpisode:
        raise DomainError(Reason.ENVIRONMENT_FAILED, "no")

    tasks = {Split.TRAIN: await environment.list_tasks("fake", Split.TRAIN, 0)}
    whole = await fingerprint(environment, await environment.describe("fake"), tasks)
    environment.start = start  # type: ignore[method-assign]
    broken = await fingerprint(environment, await environment.describe("fake"), tasks)
    assert set(whole.observations) == {"t0", "t1"} and not broken.observations
    assert whole.differences(broken) == [] == broken.differences(whole)


def test_long_observations_are_compared_whole_and_kept_short() -> None:
    long = "x" * 10_000
    assert brief(long) == brief("x" * 10_000) != brief(long + "y") and len(brief(long)) < 300
    assert brief("\ud800" * 300) != brief("\ud801" * 300)


@pytest.mark.parametrize(
    ("split", "words"), [(Split.TRAIN, "has no training tasks"), (Split.TEST, "has no test tasks")]
)
async def test_without_tasks_nothing_is_paid_for(world: World, manager: RunManager, split: Split, words: str) -> None:
    seeded(world).without = split
    manager.go_on()
    state, error = await ended(manager)
    assert state is RunState.FAILED and error.startswith("INVALID_SETTING: environment: 'fake'")
    assert words in error and not world.environment.started and not world.policy.calls and not world.policy.updates


async def test_an_evaluation_without_test_tasks_is_refused(world: World, manager: RunManager) -> None:
    seeded(world).without = Split.TEST
    settings = EvaluationSettings(samples=1)
    for run_id in ("", "run"):
        with pytest.raises(DomainError) as caught:
            await manager.evaluate("fake", settings, RolloutSettings(), 0, 1.0, run_id=run_id)
        assert caught.value.reason is Reason.INVALID_SETTING and caught.value.metadata["field"] == "environment"
        assert "'fake' has no test tasks" in caught.value.message
    assert not world.policy.updates and not world.policy.calls
    seeded(world).without = Split.TRAIN
    measured, _ = await manager.evaluate("fake", settings, RolloutSettings(), 0, 1.0)
    assert measured.attempts == 4


async def test_an_evaluation_at_two_environments_is_refused(world: World, manager: RunManager) -> None:
    seeded(world).seed_of = lambda episode_id: sum(map(ord, episode_id)) % 2
    with pytest.raises(DomainError) as caught:
        await manager.evaluate("fake", EvaluationSettings(samples=8), RolloutSettings(), 0, 1.0)
    assert caught.value.reason is Reason.ENVIRONMENT_CHANGED


async def test_an_episode_at_another_board_is_ended() -> None:
    left: list[str] = []

    class Open(SeededEpisode):
        async def end(self) -> None:
            left.append(self.episode_id)

    class Environment(Seeded):
        async def start(self, environment: str, task_id: str, episode_id: str) -> FakeEpisode:
            episode = Open(self, task_id, episode_id)
            episode.seed = int(episode_id)
            return episode

    known = KnownEnvironment(Environment({"t0": "go"}))
    await known.describe("fake")
    await known.start("fake", "t0", "0")
    with pytest.raises(EnvironmentChanged, match="'t0' showed 'board t0 of seed 0' first and now 'board t0 of seed 1'"):
        await known.start("fake", "t0", "1")
    assert left == ["1"]
