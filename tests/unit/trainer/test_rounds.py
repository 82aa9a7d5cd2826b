"""Rounds of a step, and several environments in one run."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest

from mulligan.common.errors import DomainError, Reason
from mulligan.trainer.algorithms import erl
from mulligan.trainer.events import EvaluationEvent
from mulligan.trainer.folder import RunState
from mulligan.trainer.journal import GroupsReplaced, StepJournal, journal_file, read_experiences, read_records, slot_of
from mulligan.trainer.manager import RunManager
from mulligan.trainer.protocols import pass_at_k
from mulligan.trainer.run_environment import EnvironmentChanged
from mulligan.trainer.wire import entry_from_proto, entry_to_proto
from tests.unit.trainer.test_run import STEPS, World

MIXED: dict[str, Any] = {"sampler": {"name": "mixture", "shares": {"fake": 0.6, "quiz": 0.4}}}
REPLACING: dict[str, Any] = {"rollout": {"replace_rounds": 2}}


async def test_groups_without_signal_are_replaced_and_the_others_are_trained_on(tmp_path: Path) -> None:
    """ERL learns from a group in which the first attempts differ, or a second attempt earned something."""
    world = World(tmp_path, **REPLACING)
    await world.run().train()
    steps = world.run().events.steps()
    assert any(event.metrics["replaced_groups"] for event in steps.values())
    kept_for_seconds = 0
    for step, event in steps.items():
        path = journal_file(world.folder.journal, step)
        replaced = [record for record, _ in read_records(path) if isinstance(record, GroupsReplaced)]
        assert [record.round for record in replaced] == list(range(1, len(replaced) + 1)) and len(replaced) <= 2
        assert event.metrics["replaced_groups"] == sum(len(record.slots) for record in replaced)
        chains = read_experiences(path)
        rewards: dict[int, set[float | None]] = {}
        helped = set()
        for chain in chains:
            slot = slot_of(chain.experience_id)
            rewards.setdefault(slot, set()).add(chain["first"].reward)
            helped |= {slot} if (second := chain.sample("second")) and second.reward else set()
        gone = {slot for record in replaced for slot in record.slots}
        assert len(rewards) - len(gone) == 2, "as many groups as the step needs"
        assert all(len(rewards[slot]) == 1 and slot not in helped for slot in gone)
        if len(replaced) < 2:
            assert all(len(rewards[slot]) == 2 or slot in helped for slot in rewards.keys() - gone)
        kept_for_seconds += sum(len(rewards[slot]) == 1 for slot in helped)
        trained = {slot_of(chain.experience_id) for chain in chains if chain.trained}
        assert trained == rewards.keys() - gone
        texts = sum(not sample.is_episode for chain in chains for sample in chain.samples)
        episodes = sum(sample.is_episode for chain in chains for sample in chain.samples)
        assert event.metrics["rollouts"] == texts + episodes, "what was replaced counts in the budget"
        entries = [entry for entry in world.memory.entries if f"-s{step}-" in entry.reflection_id]
        assert not {slot_of(entry.provenance.experience_id) for entry in entries} & gone
    assert world.memory.entries and kept_for_seconds


async def test_the_algorithm_may_say_what_a_signal_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(erl, "has_signal", lambda group, settings: group[0].task_id != "t1", raising=False)
    world = World(tmp_path, **REPLACING)
    await world.run().train()
    replaced = set()
    for step in range(STEPS):
        path = journal_file(world.folder.journal, step)
        tasks = {slot_of(chain.experience_id): chain.task_id for chain in read_experiences(path)}
        slots = [record.slots for record, _ in read_records(path) if isinstance(record, GroupsReplaced)]
        replaced |= {tasks[slot] for each in slots for slot in each}
    assert replaced == {"t1"}


@pytest.mark.parametrize("changes", [REPLACING, MIXED | REPLACING])
async def test_wherever_the_journal_was_cut_the_step_goes_on_as_it_would_have(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Between any two records: also between a round and what it replaces."""
    world = World(tmp_path / "whole", **changes, steps=2)
    await world.run().train()
    whole = world.result()
    ends = [end for _, end in read_records(journal_file(world.folder.journal, 1))]
    for end in [0, *ends]:
        again = World(tmp_path / str(end), **changes, steps=2)
        shutil.copytree(world.folder.journal, again.folder.journal)
        content = journal_file(again.folder.journal, 1).read_bytes()
        journal_file(again.folder.journal, 1).write_bytes(content[:end])
        await again.run().train()
        assert again.result() == whole


async def test_several_environments_are_sampled_measured_and_told_apart(tmp_path: Path) -> None:
    world = World(tmp_path, **MIXED)
    run = world.run()
    await run.train()
    chains = [chain for step in range(STEPS) for chain in read_experiences(journal_file(world.folder.journal, step))]
    assert [chain.environment for chain in chains].count("quiz") == 0.4 * len(chains)
    assert all(chain.task_id[0] == {"fake": "t", "quiz": "q"}[chain.environment] for chain in chains)
    assert {entry.provenance.environment for entry in world.memory.entries} == {"fake", "quiz"}
    for step, event in run.events.steps().items():
        for name, before in (("fake", ""), ("quiz", "quiz/")):
            own = [chain["first"].reward for chain in chains if (chain.step, chain.environment) == (step, name)]
            assert event.metrics.get(f"{before}reward_first") == (sum(own) / len(own) if own else None)  # type: ignore[arg-type]
    assert sorted(run.events.evaluations("quiz")) == sorted(run.events.evaluations()) == [0, 2, 4, 5]
    assert all(event.attempts == 3 for event in run.events.evaluations("quiz").values())
    summary: Any = run.summary()
    assert [point["step"] for point in summary["further_evaluations"]["quiz"]] == [0, 2, 4, 5]
    assert summary["test_success_after"] == run.events.evaluations()[5].success
    assert [entry_from_proto(entry_to_proto(entry)).event for entry in run.events.entries] == [
        entry.event for entry in run.events.entries
    ]


async def test_a_protocol_runs_where_it_can_and_is_refused_where_it_can_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking = {"fake"}
    monkeypatch.setattr(
        pass_at_k, "lacks", lambda info, tasks, settings: "it is one" * (info.name in lacking), raising=False
    )
    evaluation = {"samples": 2, "protocols": [{"name": "pass_at_k", "k": [1]}]}
    world = World(tmp_path, **MIXED, evaluation=evaluation)
    run = world.run()
    await run.train()
    assert not any(event.metrics for event in run.events.evaluations().values())
    assert all(event.metrics for event in run.events.evaluations("quiz").values())
    lacking.add("quiz")
    error = await refused(World(tmp_path / "nowhere", **MIXED, evaluation=evaluation))
    assert error.metadata["field"] == "evaluation.protocols[0].name"
    assert "'pass_at_k' cannot be measured in 'fake': it is one" in error.message


async def test_a_crash_between_two_evaluations_repeats_neither(tmp_path: Path) -> None:
    world = World(tmp_path, **MIXED)
    run = world.run()
    world.quiz.fail = lambda episode: (_ for _ in ()).throw(RuntimeError("switched off"))
    with pytest.raises(RuntimeError):
        await run.train()
    assert sorted(run.events.evaluations()) == [0] and not run.events.evaluations("quiz")
    world.quiz.fail = lambda episode: None
    again = world.run()
    await again.train()
    found = [entry.event for entry in again.events.entries if isinstance(entry.event, EvaluationEvent)]
    assert len(found) == len({(event.step, event.environment) for event in found}) == 8


async def refused(world: World) -> DomainError:
    with pytest.raises(DomainError) as caught:
        await world.run().train()
    assert not world.policy.calls and not world.learner.checkpoints, "nothing was paid for"
    return caught.value


def mixed(**shares: float) -> dict[str, Any]:
    return {"sampler": {"name": "mixture", "shares": shares}}


async def test_an_environment_that_is_not_served_is_refused_by_the_setting_that_names_it(tmp_path: Path) -> None:
    error = await refused(World(tmp_path, **mixed(fake=0.5, quizz=0.5)))
    assert error.reason is Reason.INVALID_SETTING and error.metadata["field"] == "sampler.shares"
    assert error.message == "sampler.shares: there is no environment 'quizz'; did you mean 'quiz'?"
    own = await refused(World(tmp_path / "own", environment="fkae"))
    assert own.reason is Reason.UNKNOWN_ENVIRONMENT and own.metadata["field"] == "environment"
    assert own.message == "environment: there is no environment 'fkae'; did you mean 'fake'?"


@pytest.mark.parametrize(
    ("change", "words"),
    [({"unavailable": "no port"}, "unavailable"), ({"player_count": 2}, "2 players"), ({"answers": {}}, "no training")],
)
async def test_an_environment_that_cannot_be_played_is_refused_by_the_setting_that_names_it(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    world = World(tmp_path, **mixed(fake=0.5, quiz=0.5))
    for name, value in change.items():
        setattr(world.quiz, name, value)
    error = await refused(world)
    assert error.metadata["field"] == "sampler.shares" and words in error.message and "'quiz'" in error.message


async def test_a_filter_that_leaves_no_task_is_refused(tmp_path: Path) -> None:
    shares = {"fake": 0.5, "quiz:q2": 0.5}
    error = await refused(World(tmp_path, **mixed(**shares), rollout={"train_tasks": 2}))
    assert error.metadata["field"] == "sampler.shares"
    assert "none of the 2 training tasks of 'quiz' begins with 'q2'" in error.message
    assert "rollout.train_tasks" in error.message


@pytest.mark.parametrize("place", ["environment", "quiz"])
async def test_a_change_in_either_environment_is_noticed(tmp_path: Path, place: str) -> None:
    world = World(tmp_path, **MIXED)
    run = world.run()
    world.environment.fail = lambda episode: run.stop() if "-s1-" in episode else None
    await run.train()
    assert set(world.folder.further_environments()) == {"quiz"} and world.folder.environment() is not None
    world.folder.write_record(world.folder.record().now(RunState.STOPPED))
    getattr(world, place).turns = 4
    manager = RunManager(tmp_path, world.run().services)
    name = "fake" if place == "environment" else "quiz"
    with pytest.raises(DomainError, match=f"environment '{name}' is not the one .* max_steps was 1 and is 4"):
        await manager.resume("run")
    await manager.close()
    with pytest.raises(EnvironmentChanged, match=f"environment '{name}' is not the one"):
        await world.run().train()
    accepting = world.run()
    accepting.accept_environment = True
    await accepting.train()
    assert accepting.step == STEPS


def test_a_record_of_one_environment_is_as_it_was(tmp_path: Path) -> None:
    world = World(tmp_path)
    asyncio.run(world.run().train())
    journal = StepJournal(world.folder.journal, 0)
    journal.close()
    assert journal.started is not None and not journal.replaced
    assert (journal.started.environments, journal.started.horizon) == ([], None)
    assert "replaced_groups" not in world.run().events.steps()[0].metrics
