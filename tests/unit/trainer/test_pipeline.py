"""Steps that are sampled ahead of the learner: how old samples are, what is chosen, and what a crash costs."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mulligan.common.errors import DomainError, Reason, ServiceUnavailable
from mulligan.common.experience import Sample, Segment, SegmentKind, TokenSequence
from mulligan.common.inference import (
    CallOptions,
    Completion,
    Prompt,
    SamplingParams,
    VersionSpan,
)
from mulligan.common.types import Outcome
from mulligan.trainer.data import Datum
from mulligan.trainer.journal import (
    GroupsReplaced,
    SamplingBegan,
    StepStarted,
    journal_file,
    journaled_steps,
    read_experiences,
    read_records,
)
from mulligan.trainer.pipeline import TooStale, ages
from mulligan.trainer.run_environment import EnvironmentChanged
from mulligan.trainer.settings import LossSettings, RunSettings
from mulligan.trainer.wire import settings_from_proto, settings_to_proto, validated
from tests.support.effort import examples
from tests.support.fakes import FakePolicy
from tests.support.virtual_time import run_in_virtual_time
from tests.unit.trainer.test_run import CHOOSY, STEPS, World, crash, notices, sampled_parts

QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


class SlowWorld(World):
    """Everything takes a random time of the virtual clock. A completion during an update spans both versions."""

    def __init__(self, folder: Path, ahead: int, timing: int = 0, **changes: Any):
        self.random = random.Random(timing)
        self.longest = 8.0
        self.learning = 3.0
        self.order: list[tuple[str, int]] = []  # what the learner and the environment were asked for
        rollout = {"max_staleness": ahead, "concurrency": 3} | changes.pop("rollout", {})
        super().__init__(folder, deterministic=False, rollout=rollout, **changes)
        for policy in (self.policy, *self.policy.others.values()):
            self._slow(policy)
        self._learn = self.learner.forward_backward
        self.learner.forward_backward = self._forward_backward  # type: ignore[method-assign]
        self._snapshot = self.memory.snapshot
        self.memory.snapshot = self._late_snapshot  # type: ignore[method-assign]

    def _slow(self, policy: FakePolicy) -> None:
        inner = policy.generate

        async def generate(
            prompt: Prompt, sampling: SamplingParams, options: CallOptions = CallOptions()
        ) -> Completion:
            if options.policy not in ("", "actor"):
                return await inner(prompt, sampling, options)
            completion = await inner(prompt, sampling, options)
            before = policy.version
            await asyncio.sleep(self.random.uniform(0, self.longest))
            count = len(completion.token_ids)
            if policy.version == before or count < 2:
                return completion
            spans = (VersionSpan(before, 1), VersionSpan(policy.version, count - 1))
            return replace(completion, policy_versions=spans)

        policy.generate = generate  # type: ignore[method-assign]

    async def _forward_backward(self, data: Sequence[Datum], loss: LossSettings) -> dict[str, float]:
        await asyncio.sleep(self.random.uniform(0, self.learning))
        self.order.append(("learned", self.learner.state))
        return await self._learn(data, loss)

    async def _late_snapshot(self, scope: str) -> int:
        await asyncio.sleep(self.random.uniform(0, self.longest))
        return await self._snapshot(scope)

    def oldest(self, step: int) -> int:
        """The oldest version that sampled a token of the step."""
        return min(
            span.policy_version
            for experience in read_experiences(journal_file(self.folder.journal, step))
            for sample in experience.samples
            for sequence in sample.sequences
            for segment in sequence.segments
            for span in segment.policy_versions
        )


def train(world: World) -> None:
    run_in_virtual_time(world.run().train())


@settings(max_examples=examples(25), suppress_health_check=QUIET)
@given(ahead=st.integers(0, 4), timing=st.integers(0, 10**6), longest=st.sampled_from([0.1, 3.0, 30.0]))
def test_no_token_is_older_than_the_bound(
    tmp_path_factory: pytest.TempPathFactory, ahead: int, timing: int, longest: float
) -> None:
    world = SlowWorld(tmp_path_factory.mktemp("run"), ahead, timing)
    world.longest = longest
    train(world)
    steps = world.run().events.steps()
    assert sorted(steps) == list(range(STEPS))
    for step, event in steps.items():
        age = step + 1 - world.oldest(step)  # version 1 are the first weights, and each step publishes one
        assert 0 <= age <= ahead
        if ahead:
            assert event.metrics["staleness_max"] == age >= event.metrics["staleness_mean"]
            assert event.metrics["waiting_for_rollouts_seconds"] >= 0 <= event.metrics["waiting_for_learner_seconds"]
        else:
            assert "staleness_max" not in event.metrics


def test_a_step_ahead_is_sampled_while_the_one_before_is_learned(tmp_path: Path) -> None:
    world = SlowWorld(tmp_path, 1)
    world.learning = 100.0
    begun: list[tuple[int, int]] = []
    world.environment.fail = lambda episode: (
        begun.append((int(episode.split("-s")[1][0]), world.learner.state)) if ("-s" in episode) else None
    )
    train(world)
    assert {step - trained for step, trained in begun} == {0, 1}, "never more than one step ahead"
    assert max(event.metrics["waiting_for_learner_seconds"] for event in world.run().events.steps().values()) > 10


@pytest.mark.parametrize("ahead", [1, 2])
@pytest.mark.parametrize("changes", [{}, *CHOOSY])
def test_another_timing_changes_nothing_that_is_chosen_or_trained(
    tmp_path: Path, ahead: int, changes: dict[str, Any]
) -> None:
    results = []
    for timing in range(3):
        world = SlowWorld(tmp_path / str(timing), ahead, timing, **changes)
        world.longest = 10.0**timing
        train(world)
        results.append(world.result())
    assert results[0] == results[1] == results[2]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], Any]:
    """What the uninterrupted runs give, by number of CHOOSY and bound."""
    found = {}
    for number, changes in enumerate(CHOOSY):
        for ahead in (1, 2):
            world = SlowWorld(tmp_path_factory.mktemp("whole"), ahead, **changes)
            train(world)
            found[number, ahead] = world.result()
    return found


@settings(max_examples=examples(40), suppress_health_check=QUIET)
@given(
    number=st.integers(0, len(CHOOSY) - 1),
    ahead=st.integers(1, 2),
    timing=st.integers(0, 10**6),
    crashes=st.lists(st.integers(0, 150), min_size=1, max_size=4),
    torn=st.integers(0, 40),
)
def test_a_crash_anywhere_loses_nothing_and_trains_nothing_twice(
    tmp_path_factory: pytest.TempPathFactory,
    whole: dict[tuple[int, int], Any],
    number: int,
    ahead: int,
    timing: int,
    crashes: list[int],
    torn: int,
) -> None:
    world = SlowWorld(tmp_path_factory.mktemp("cut"), ahead, timing, **CHOOSY[number])
    crash(world, crashes, torn, run_in_virtual_time)
    assert world.result() == whole[number, ahead]
    sampled = sampled_parts(world)
    assert len(sampled) == len(set(sampled)), "what was journaled before a crash is not sampled again after it"
    assert all(event.metrics["staleness_max"] <= ahead for event in world.run().events.steps().values())


def test_what_was_sampled_ahead_is_used_after_a_stop(tmp_path: Path) -> None:
    uninterrupted = SlowWorld(tmp_path / "whole", 2)
    train(uninterrupted)
    world = SlowWorld(tmp_path / "stopped", 2)

    async def stopped() -> int:
        run = world.run()
        learn = world.learner.forward_backward

        async def learn_and_stop(data: Any, loss: Any) -> dict[str, float]:
            if world.learner.state == 1:
                run.stop()
            return await learn(data, loss)

        world.learner.forward_backward = learn_and_stop  # type: ignore[method-assign]
        await run.train()
        assert run.stopped
        world.learner.forward_backward = learn  # type: ignore[method-assign]
        return run.step

    assert run_in_virtual_time(stopped()) == 2
    ahead = [step for step in journaled_steps(world.folder.journal) if step >= 2]
    before = sampled_parts(world)
    assert ahead == [2, 3] and any("-s2-" in part for part in before)
    train(world)
    assert world.result() == uninterrupted.result()
    assert len(sampled_parts(world)) == len(set(sampled_parts(world)))


def test_a_failure_of_a_step_ahead_ends_all_and_leaves_nothing_running(tmp_path: Path) -> None:
    uninterrupted = SlowWorld(tmp_path / "whole", 2)
    train(uninterrupted)
    world = SlowWorld(tmp_path / "failed", 2)

    def fail(episode: str) -> None:
        if "-s3-" in episode:
            raise ServiceUnavailable("10.0.0.1:1", 120, "connection refused")

    async def failing() -> None:
        with pytest.raises(ServiceUnavailable):
            await world.run().train()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    world.environment.fail = fail
    run_in_virtual_time(failing())
    world.environment.fail = lambda episode: None
    train(world)
    assert world.result() == uninterrupted.result()


def test_a_lost_learner_and_a_full_disk_are_survived_as_in_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uninterrupted = SlowWorld(tmp_path / "whole", 2)
    train(uninterrupted)
    world = SlowWorld(tmp_path / "lost", 2)
    world.learner.lose_at = 3
    failures = iter(range(2))
    add = world.memory.add

    async def full(*arguments: Any, **more: Any) -> str:
        if next(failures, None) is not None:
            raise DomainError(Reason.DISK_FULL, "the disk is full", folder="/elsewhere", free_bytes=0, needed_bytes=0)
        return await add(*arguments, **more)

    monkeypatch.setattr(world.memory, "add", full)
    train(world)
    assert world.result() == uninterrupted.result()
    told = notices(world.run())
    assert any("learner was lost" in text for text in told) and any("paused: the disk is full" in text for text in told)


def test_a_changed_environment_sets_all_unchecked_steps_aside(tmp_path: Path) -> None:
    world = SlowWorld(tmp_path, 2)
    world.longest = 50.0

    def change(episode: str) -> None:
        if "-s2-" in episode:
            world.environment.shows["t0"] = world.environment.shows["t1"] = "another board"

    world.environment.fail = change
    with pytest.raises(EnvironmentChanged):
        train(world)
    kept = journaled_steps(world.folder.journal)
    aside = sorted(path.name.partition(".")[0] for path in world.folder.journal.glob("*.set-aside-*"))
    assert aside and not {int(name) for name in aside} & set(kept)
    for step in kept:
        started = [record for record, _ in read_records(journal_file(world.folder.journal, step))]
        assert isinstance(started[0], StepStarted)
        assert len(read_experiences(journal_file(world.folder.journal, step))) == 4, "only what was sampled to its end"


def test_chains_of_older_steps_come_first(tmp_path: Path) -> None:
    """A second round of step 0 is asked for when step 1 already waits."""
    world = SlowWorld(tmp_path, 1, rollout={"concurrency": 1, "replace_rounds": 2}, steps=2)
    order: list[str] = []
    world.environment.fail = lambda episode: order.append(episode) if "-s" in episode else None
    train(world)
    chains = list(dict.fromkeys(episode.split("-s")[1][:7] for episode in order))
    later = [chain for chain in chains if chain.startswith(("0-t2", "0-t3"))]
    first = [chain for chain in chains if chain.startswith(("1-t0", "1-t1"))]
    assert later, "step 0 replaces groups"
    overtaken = [chain for chain in first if chains.index(chain) < chains.index(later[-1])]
    assert len(overtaken) <= 2, "one for each round that ended, before the next one was chosen"


def sampled_by(*versions: int, policy: str = "") -> Sample:
    spans = tuple(VersionSpan(version, 1) for version in versions)
    segment = Segment(SegmentKind.SAMPLED, (1,) * len(versions), (0.0,) * len(versions), spans)
    return Sample("s", "first", Outcome.COMPLETED, (TokenSequence((segment,)),), 1.0, policy=policy)


def test_ages_count_steps_also_where_a_resumed_run_published_a_checkpoint_anew() -> None:
    """The first process had learned 3 steps with version 11; the second one 2 steps with version 20."""
    begun = [SamplingBegan(4, 11, 3), SamplingBegan(4, 20, 2)]
    samples = [sampled_by(11), sampled_by(12, 11), sampled_by(12), sampled_by(20), sampled_by(22)]
    assert ages(4, samples, begun) == [1, 1, 0, 2, 0]
    assert ages(4, [sampled_by(5, policy="judge"), sampled_by()], begun) == []


def test_a_violated_bound_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mulligan.trainer.pipeline.ages", lambda step, samples, begun: [0, 2])
    with pytest.raises(TooStale, match=r"step 0 has a sample that is 2 steps old, and rollout\.max_staleness is 1"):
        train(SlowWorld(tmp_path, 1))


@settings(max_examples=examples(10), suppress_health_check=QUIET)
@given(ahead=st.integers(1, 3), timing=st.integers(0, 10**6))
def test_overlapping_steps_keep_passes_and_shares(
    tmp_path_factory: pytest.TempPathFactory, ahead: int, timing: int
) -> None:
    """Whatever is replaced beside them: of the tasks that steps begin with, no other step takes any."""
    begun: dict[str, list[str]] = {}
    for name, changes in (("uniform", {"rollout": CHOOSY[0]["rollout"]}), ("mixture", CHOOSY[2])):
        world = SlowWorld(tmp_path_factory.mktemp(name), ahead, timing, **changes)
        train(world)
        begun[name] = []
        for step in range(STEPS):
            records = [record for record, _ in read_records(journal_file(world.folder.journal, step))]
            started = records[0]
            assert isinstance(started, StepStarted)
            begun[name] += started.task_ids
            replaced = [record.task_ids for record in records if isinstance(record, GroupsReplaced)]
            if name == "uniform" and replaced:
                assert not set(started.task_ids) & set(replaced[0]), "others than the step has already"
    assert sorted(begun["uniform"][:4]) == sorted(begun["uniform"][4:8]) == ["t0", "t1", "t2", "t3"]
    quiz = [task for task in begun["mixture"] if task.startswith("q")]
    assert len(quiz) == 0.4 * len(begun["mixture"]) and sorted(quiz[:3]) == ["q0", "q1", "q2"]


def test_a_deterministic_run_refuses_to_overlap() -> None:
    for table, field in (
        ({"rollout": {"max_staleness": 1}}, "rollout.max_staleness"),
        ({"policies": {"evaluator": "second"}}, "policies.evaluator"),
    ):
        with pytest.raises(DomainError) as caught:
            validated(RunSettings, {"environment": "fake", "deterministic": True} | table)
        assert (caught.value.reason, caught.value.metadata) == (Reason.INVALID_SETTING, {"field": field})
        run = validated(RunSettings, {"environment": "fake"} | table)
        assert settings_from_proto(settings_to_proto(run)) == run
    with pytest.raises(DomainError, match=r"policies\.evaluator: expected another policy than the actor"):
        validated(RunSettings, {"environment": "fake", "policies": {"actor": "one", "evaluator": "one"}})
