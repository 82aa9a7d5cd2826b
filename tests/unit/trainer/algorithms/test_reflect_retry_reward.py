"""Reflect, Retry, Reward (arXiv 2505.24726) on numbers computed by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mulligan.common.errors import DomainError, Reason
from mulligan.common.types import Outcome
from mulligan.trainer.algorithms.reflect_retry_reward import NEEDS, Settings
from tests.support.fakes import FakeEnvironment, timeout
from tests.support.loop import Loop, in_turn, lives, refused, trained_text


def loop(
    first: list[str],
    second: list[str],
    *,
    environment: FakeEnvironment | None = None,
    rollout: Any = None,
    **settings: Any,
) -> Loop:
    algorithm = {"name": "reflect_retry_reward", "reflections": 2, "normalize_by_std": False, **settings}
    return Loop(
        in_turn(first, second),
        environment=environment,
        algorithm=algorithm,
        rollout={"rollouts_per_task": 3, **(rollout or {})},
    )


async def test_one_step_of_the_paper() -> None:
    """One attempt succeeds at once; of one's retries the second succeeds, of the last's none does."""
    made = loop(["go", "a", "b"], ["c", "go", "d", "e"])
    solved, mixed, failed = await made.step()
    assert [sample.role for sample in solved.samples] == ["first"]
    assert [sample.role for sample in mixed.samples] == ["first", "reflection", "second", "reflection", "second"]
    first, one, retry, other, better = mixed.samples
    assert one.parent_id == other.parent_id == first.sample_id
    assert (retry.parent_id, better.parent_id) == (one.sample_id, other.sample_id)
    assert better.system == "rule 1\nanswer with a word", "the retry is told the reflection"
    assert (one.reward, other.reward) == (0.0, 1.0)
    assert [sample.reward for sample in failed.samples[1::2]] == [0.0, 0.0]
    assert made.learner.steps and {datum.branch for datum in made.learner.steps[0]} == {"reflection"}
    assert made.advantages("reflection") == [-0.5, 0.5], "zero advantages move nothing, and stay here"
    data = made.runner.training_data([solved, mixed, failed])[0]
    assert [trained_text(datum) for datum in data] == [f"rule {number}]" for number in range(4)]
    assert [datum.weight for datum in data] == [1 / 4] * 4
    assert not any(one.targets for one in (solved, mixed, failed))


async def test_with_one_reflection_each_those_of_the_task_are_compared() -> None:
    made = loop(["a", "a", "a"], ["go", "b", "c"], reflections=1)
    await made.step()
    assert made.advantages("reflection") == pytest.approx([2 / 3, -1 / 3, -1 / 3])


async def test_reflections_can_be_rewarded_for_what_they_improve() -> None:
    environment = FakeEnvironment({"t0": "go"}, turns=2, in_parts=True)
    improvement = {"advantage": "improvement", "advantage_settings": {"base": "dr_grpo"}}
    first, second = ["a", "a", "go", "a", "a", "a"], ["go", "go", "go", "go", "a", "a"]
    made = loop(first, second, environment=environment, reflections=1, **improvement)
    await made.step()
    assert made.advantages("reflection") == pytest.approx([0.5, -0.5]), "of 1, 1/2 and 0; zero moves nothing"


@pytest.mark.parametrize(
    ("first", "second", "reflections", "signal"),
    [
        (["go", "a", "b"], ["c", "d", "e", "f"], 2, 0.0),  # the attempts differ, which teaches nothing
        (["a", "a", "a"], ["go", "go", "b", "c", "d", "e"], 2, 0.0),  # those on one attempt are compared
        (["a", "a", "a"], ["go", "b", "b", "c", "d", "e"], 2, 1.0),
        (["a", "a", "a"], ["go", "b", "c"], 1, 1.0),
    ],
)
async def test_a_group_differs_in_its_reflections(
    first: list[str], second: list[str], reflections: int, signal: float
) -> None:
    made = loop(first, second, reflections=reflections)
    await made.step()
    assert made.metrics["groups_with_signal"] == signal


async def test_a_part_of_the_reward_is_no_success() -> None:
    environment = FakeEnvironment({"t0": "go"}, turns=2, in_parts=True)
    made = loop(["a", "a"], ["go", "b", "go", "go"], environment=environment, rollout={"rollouts_per_task": 1})
    (one,) = await made.step()
    assert [sample.reward for sample in one.samples if sample.role == "second"] == [0.5, 1.0]
    assert [sample.reward for sample in one.samples if sample.role == "reflection"] == [0.0, 1.0]


async def test_a_retry_lost_to_the_infrastructure_leaves_its_reflection_out() -> None:
    environment = FakeEnvironment({"t0": "go"})

    def fail(episode_id: str) -> None:
        if "-second-x-" in episode_id:
            raise timeout()

    environment.fail = fail
    made = loop(
        ["a"], ["x"] * 3 + ["go", "b"], environment=environment, reflections=3, rollout={"rollouts_per_task": 1}
    )
    (one,) = await made.step()
    assert [sample.reward for sample in one.samples if sample.role == "reflection"] == [None, 1.0, 0.0]
    assert made.advantages("reflection") == [0.5, -0.5]


async def test_a_reflection_that_failed_has_no_retry() -> None:
    made = loop(["a"], ["go"], rollout={"rollouts_per_task": 1})
    say = made.policy.answer
    broken = iter([True])

    def answer(system: str, last: str, sampling: Any) -> str:
        if system == "reflect" and next(broken, False):
            raise DomainError(Reason.ENGINE_UNAVAILABLE, "broken")
        return say(system, last, sampling)

    made.policy.answer = answer
    (one,) = await made.step()
    assert [sample.role for sample in one.samples] == ["first", "reflection", "reflection", "second"]
    assert one.samples[1].outcome is Outcome.POLICY_ERROR and one.samples[1].reward is None


@pytest.mark.parametrize("trains_cut", [False, True])
async def test_a_cut_reflection_is_trained_on_only_if_that_is_wanted(trains_cut: bool) -> None:
    rollout = {"reflection_max_tokens": 3, "rollouts_per_task": 1}
    made = loop(["a"], ["go", "b"], rollout=rollout, train_cut_reflections=trains_cut)
    await made.step()
    assert [trained_text(datum) for datum in made.branch("reflection")] == (["rul", "rul"] if trains_cut else [])
    assert made.metrics.get("dropped_cut_reflection", 0) == (0 if trains_cut else 2)


async def test_a_repeated_step_finds_its_samples(tmp_path: Path) -> None:
    first, second = await lives(lambda: loop(["go", "a", "b"], ["c", "go", "d", "e"]), tmp_path)
    assert first == second


def test_settings() -> None:
    assert Settings().reflections == 8 and loop([], []).survive_the_wire()
    assert "own_reflections" in NEEDS, "what another policy wrote would train nothing"
    field, message = refused({"name": "reflect_retry_reward", "reflections": 0})
    assert field == "algorithm.reflections" and "greater than or equal to 1" in message
