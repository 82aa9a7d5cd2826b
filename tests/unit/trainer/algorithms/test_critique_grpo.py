"""Critique-GRPO (arXiv 2506.03106) on numbers computed by hand."""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from mulligan.common.errors import DomainError, Reason
from mulligan.common.experience import Sample
from mulligan.common.types import Outcome
from mulligan.trainer.algorithms.critique_grpo import Settings, train
from mulligan.trainer.objectives.transfer import Transfer
from tests.support.fakes import FakeEnvironment, FakePolicy, timeout
from tests.support.loop import Loop, in_turn, lives, near, refused, trained_text, whole_text

FIRST = ["a", "b", "go", "c"]
REFINED = ["x", "go", "go", "y"]


def loop(
    first: list[str] = FIRST, refined: list[str] = REFINED, *, environment: Any = None, rollout: Any = None, **more: Any
) -> Loop:
    say = in_turn(first, refined, map("critique {}".format, count()))
    policies = more.pop("policies", {})
    table = {"name": "critique_grpo"} | more
    return Loop(say, environment=environment, algorithm=table, policies=policies, rollout=rollout or {})


async def test_one_step_of_the_paper() -> None:
    """Rewards 0, 0, 1, 0 and 1 of the best refinement: their mean is 0.4."""
    made = loop()
    experiences = await made.step()
    for one in experiences:
        first, critique, refinement = one.samples
        assert [sample.role for sample in one.samples] == ["first", "critique", "refinement"]
        assert (critique.parent_id, refinement.parent_id) == (first.sample_id, critique.sample_id)
        assert critique.reward is None and critique.system == "reflect"
        assert refinement.system == f"last time: board t0>{first.turns[0].action};after {first.turns[0].text} " + (
            critique.text
        )
    assert made.advantages("first") == pytest.approx([-0.4, -0.4, 0.6, -0.4])
    assert [datum.weight for datum in made.branch("first")] == [0.2] * 4
    (datum,) = made.branch("refinement")
    assert datum.objective == Transfer(near(0.6), 0.1) and datum.weight == 0.2
    assert datum.datum_id == experiences[1].targets[0].target_id, "of equally good ones the first"
    assert whole_text(datum) == "[system:solve][user:board t0][assistant:go]" and trained_text(datum) == "go]"


async def test_a_mean_over_tokens_is_over_attempts_and_refinement() -> None:
    made = loop(["go", "a"], ["abcd", "x"], rollout={"rollouts_per_task": 2}, aggregation="token_mean")
    await made.step()
    data = [*made.branch("first"), *made.branch("refinement")]
    assert [sum(datum.loss_mask) for datum in data] == [3, 2, 5]
    assert [datum.weight for datum in data] == pytest.approx([1 / 10] * 3)


async def test_a_bad_refinement_is_trained_away_from() -> None:
    made = loop(["go", "a"], ["x", "y"], rollout={"rollouts_per_task": 2}, refinement_weight=3.0, shape=0.0)
    await made.step()
    (datum,) = made.branch("refinement")
    assert datum.objective == Transfer(near(-1 / 3)) and datum.weight == pytest.approx(1.0)


async def test_the_refinement_can_be_shown_the_critique_alone() -> None:
    made = loop(show_attempt=False, refine_successes=False)
    experiences = await made.step()
    assert experiences[0]["refinement"].system == "critique 0\nanswer with a word"
    assert [sample.role for sample in experiences[2].samples] == ["first"], "it solved the task"


async def test_a_judge_writes_the_critiques() -> None:
    made = loop(policies={"judge": "wise"})
    made.policy.others["wise"] = FakePolicy(lambda system, last, _: f"{system}: {last}")
    (one, *_) = await made.step()
    critique = one["critique"]
    assert critique.policy == "wise"
    assert critique.text == "reflect: trace=board t0>A;after a feedback=wrong reward=0 memory=nothing yet"


async def test_what_is_lost_to_the_infrastructure_is_left_out() -> None:
    environment = FakeEnvironment({"t0": "go"})

    def fail(episode_id: str) -> None:
        if "-r0-first-" in episode_id or "-r1-refinement-" in episode_id:
            raise timeout()

    environment.fail = fail
    made = loop(["x"] * 3 + ["b", "go", "c"], ["z"] * 3 + ["go", "y"], environment=environment)
    experiences = await made.step()
    assert [len(one.samples) for one in experiences] == [1, 3, 3, 3] and not experiences[1].targets
    assert made.advantages("first") == pytest.approx([-0.5, 0.5, -0.5])
    (datum,) = made.branch("refinement")
    assert datum.datum_id.startswith("run-s0-t0-r2-") and datum.objective == Transfer(0.5, 0.1)


async def test_a_divisor_counts_what_gives_data() -> None:
    """The refinement is too long with the critique in its prompt, and not under the bare one."""
    made = loop(["go", "a"], ["x", "y"], rollout={"rollouts_per_task": 2})
    experiences = await made.step()
    settings = Settings(first_weight=1.0, refinement_weight=1.0)
    assert {datum.weight for datum in train([experiences], settings)} == {1 / 3}

    def without_tokens(sample: Sample) -> Sample:
        return replace(sample, sequences=()) if sample.role == "refinement" else sample

    group = [replace(one, samples=tuple(map(without_tokens, one.samples))) for one in experiences]
    data = train([group], settings)
    assert {datum.branch for datum in data} == {"first", "refinement"}
    assert {datum.weight for datum in data} == {1 / 3}


async def test_a_critique_that_failed_has_no_refinement() -> None:
    made = loop(["a"], [], rollout={"rollouts_per_task": 1})
    say = made.policy.answer

    def answer(system: str, last: str, sampling: Any) -> str:
        if system == "reflect":
            raise DomainError(Reason.ENGINE_UNAVAILABLE, "broken")
        return say(system, last, sampling)

    made.policy.answer = answer
    (one,) = await made.step()
    assert [sample.role for sample in one.samples] == ["first", "critique"]
    assert one["critique"].outcome is Outcome.POLICY_ERROR and made.learner.steps == []


async def test_a_repeated_step_finds_its_samples(tmp_path: Path) -> None:
    first, second = await lives(loop, tmp_path)
    assert first == second


def test_settings() -> None:
    settings = Settings()
    assert (settings.shape, settings.normalize_by_std, settings.refine_successes) == (0.1, False, True)
    assert loop(shape=0.5).survive_the_wire()
    assert refused({"name": "critique_grpo", "shape": -0.1})[0] == "algorithm.shape"
    assert "did you mean 'show_attempt'?" in refused({"name": "critique_grpo", "show_attemt": True})[1]
