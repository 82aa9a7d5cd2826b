"""RLTF-SD (arXiv 2602.02482) on numbers computed by hand."""

from __future__ import annotations

from itertools import repeat
from math import sqrt
from pathlib import Path
from typing import Any

import pytest

from mulligan.trainer.algorithms.rltf import Settings
from mulligan.trainer.objectives.transfer import Transfer
from tests.support.fakes import FakeEnvironment, FakePolicy, timeout
from tests.support.loop import Loop, in_turn, lives, near, refused, trained_text, whole_text

FIRST = ["a", "b", "go", "c"]
SECOND = ["go", "x", "go"]


def loop(first: list[str] = FIRST, second: list[str] = SECOND, *, environment: Any = None, **more: Any) -> Loop:
    say = in_turn(first, second, repeat("too short"))
    policies = more.pop("policies", {})
    return Loop(say, environment=environment, algorithm={"name": "rltf"} | more, policies=policies)


async def test_second_turns_are_distilled_against_the_first_turns() -> None:
    """First turns 0, 0, 1, 0: the baseline is 1/4. Second turns 1, 0 and 1."""
    made = loop(distillation_weight=0.5, second_weight=2.0)
    experiences = await made.step()
    assert [[sample.role for sample in one.samples] for one in experiences] == [
        ["first", "second"] if place != 2 else ["first"] for place in range(4)
    ]
    second = experiences[0]["second"]
    assert second.parent_id == experiences[0]["first"].sample_id
    assert second.system == "last time: board t0>A;after a wrong", "the attempt and the environment's feedback"
    data = made.branch("distilled")
    assert [datum.objective for datum in data] == [Transfer(0.75), Transfer(-0.25), Transfer(0.75)]
    assert [datum.weight for datum in data] == pytest.approx([0.5 / 3] * 3)
    assert whole_text(data[0]) == "[system:solve][user:board t0][assistant:go]" and trained_text(data[1]) == "x]"
    assert made.advantages("second") == pytest.approx([1 / sqrt(3), -2 / sqrt(3), 1 / sqrt(3)], abs=1e-5)
    assert [datum.weight for datum in made.branch("second")] == pytest.approx([2 / 3] * 3)
    assert made.advantages("first") == pytest.approx([-0.5, -0.5, 1.5, -0.5], abs=1e-5)


async def test_second_turns_can_be_rewarded_for_what_they_improve() -> None:
    environment = FakeEnvironment({"t0": "go"}, turns=2, in_parts=True)
    first, second = ["go", "b", "a", "b", "go", "go", "a", "b"], ["go", "b", "go", "go", "a", "b"]
    improvement = {"advantage": "improvement", "advantage_settings": {"base": "dr_grpo"}}
    made = loop(first, second, environment=environment, **improvement)
    experiences = await made.step()
    rewards = [[sample.reward for sample in one.samples] for one in experiences]
    assert rewards == [[0.5, 0.5], [0.0, 1.0], [1.0], [0.0, 0.0]]
    assert made.advantages("second") == pytest.approx([-1 / 3, 2 / 3, -1 / 3]), "of the improvements 0, 1 and 0"
    assert made.advantages("first") == pytest.approx([0.125, -0.375, 0.625, -0.375])


async def test_the_judge_can_give_the_feedback() -> None:
    made = loop(feedback="judge")
    (one, *_) = await made.step()
    assert [sample.role for sample in one.samples] == ["first", "critique", "second"]
    assert one["second"].system == "last time: board t0>A;after a too short"
    assert one["second"].parent_id == one["critique"].sample_id and not one["critique"].policy
    made = loop(feedback="judge", policies={"judge": "wise"})
    made.policy.others["wise"] = FakePolicy(lambda system, last, _: "say go")
    (one, *_) = await made.step()
    assert one["second"].system.endswith(" say go") and one["critique"].policy == "wise"
    assert {datum.branch for step in made.learner.steps for datum in step} == {"first", "second", "distilled"}


async def test_what_is_lost_to_the_infrastructure_is_left_out() -> None:
    environment = FakeEnvironment({"t0": "go"})

    def fail(episode_id: str) -> None:
        if "-r0-first-" in episode_id or "-r1-second-" in episode_id:
            raise timeout()

    environment.fail = fail
    made = loop(["z"] * 3 + ["b", "go", "c"], ["z"] * 3 + ["go"], environment=environment)
    experiences = await made.step()
    assert [len(one.samples) for one in experiences] == [1, 2, 1, 2]
    (datum,) = made.branch("distilled")
    assert datum.objective == Transfer(near(2 / 3)), "of the three first turns one solved the task"


async def test_a_repeated_step_finds_its_samples(tmp_path: Path) -> None:
    first, second = await lives(lambda: loop(feedback="judge"), tmp_path)
    assert first == second


def test_settings() -> None:
    assert Settings().distillation_weight == 1.0 and loop(feedback="judge").survive_the_wire()
    field, message = refused({"name": "rltf", "feedback": "judgement"})
    assert field == "algorithm.feedback" and "'environment' or 'judge'" in message
    assert refused({"name": "rltf", "distillation_weight": -1})[0] == "algorithm.distillation_weight"
