"""NFT (arXiv 2505.18116) on numbers computed by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mulligan.common.inference import Feature
from mulligan.trainer.algorithms.nft import Settings
from mulligan.trainer.objectives.negative_aware import NegativeAware
from tests.support.fakes import FakeEnvironment, timeout
from tests.support.loop import Loop, lives, refused, trained_text

SAID = ["go", "a", "b", "go"]


def loop(
    said: list[str] = SAID, *, environment: FakeEnvironment | None = None, restarts: int = 2, **settings: Any
) -> Loop:
    answers = iter(said)
    rollout = {"rollouts_per_task": len(said) // (environment.turns if environment else 1), "max_restarts": restarts}
    table = {"name": "nft"} | settings
    return Loop(lambda system, last: next(answers), environment=environment, algorithm=table, rollout=rollout)


async def test_right_and_wrong_answers_have_the_share_of_right_ones() -> None:
    made = loop(first_weight=0.5)
    await made.step()
    data = made.branch("first")
    assert [datum.objective for datum in data] == [NegativeAware(right, 0.5) for right in (1.0, 0.0, 0.0, 1.0)]
    assert [trained_text(datum) for datum in data] == ["go]", "a]", "b]", "go]"]
    assert [datum.weight for datum in data] == pytest.approx([0.5 / 10] * 4), "a mean over the branch's ten tokens"


@pytest.mark.parametrize(("said", "share"), [(["go"] * 4, 1.0), (["a"] * 4, 0.0)])
async def test_groups_without_a_difference_are_trained_too(said: list[str], share: float) -> None:
    made = loop(said, aggregation="sequence_mean_token_sum")
    await made.step()
    assert [datum.objective for datum in made.branch("first")] == [NegativeAware(share, share)] * 4
    assert [datum.weight for datum in made.branch("first")] == [0.25] * 4


async def test_a_part_of_the_reward_is_wrong_unless_it_reaches_the_threshold() -> None:
    for threshold, right in ((1.0, 0.0), (0.5, 1.0)):
        environment = FakeEnvironment({"t0": "go"}, turns=2, in_parts=True)
        made = loop(["go", "a"], environment=environment, success_threshold=threshold)
        await made.step()
        assert [datum.objective for datum in made.branch("first")] == [NegativeAware(right, right)]


@pytest.mark.parametrize(("threshold", "signal"), [(1.0, 0.0), (0.5, 1.0)])
async def test_a_group_differs_in_right_and_wrong(threshold: float, signal: float) -> None:
    """Rewards of 1/2 and 0 are both wrong, unless 1/2 solves the task."""
    environment = FakeEnvironment({"t0": "go"}, turns=2, in_parts=True)
    made = loop(["go", "a", "b", "c"], environment=environment, success_threshold=threshold)
    await made.step()
    assert made.metrics["groups_with_signal"] == signal


async def test_an_attempt_lost_to_the_infrastructure_is_neither_right_nor_wrong() -> None:
    environment = FakeEnvironment({"t0": "go"})

    def fail(episode_id: str) -> None:
        if "-r1-first-" in episode_id:
            raise timeout()

    environment.fail = fail
    made = loop(["go", "x", "b", "c"], environment=environment, restarts=0)
    await made.step()
    data = made.branch("first")
    assert [datum.objective for datum in data] == [NegativeAware(right, 1 / 3) for right in (1.0, 0.0, 0.0)]


async def test_an_attempt_without_tokens_counts_but_trains_nothing() -> None:
    made = loop()
    made.policy.features = frozenset(Feature) - {Feature.TOKEN_IDS}
    await made.step()
    assert made.learner.steps == [] and made.metrics["dropped"] == 4


async def test_several_optimizer_steps_have_the_learner_as_the_old_policy() -> None:
    made = loop(optimizer_steps=2)
    await made.step()
    (asked,) = made.learner.forwards
    assert len(asked) == 4
    objectives = [datum.objective for datum in made.branch("first")]
    assert all(isinstance(one, NegativeAware) and set(one.old_log_probs) == {-0.25} for one in objectives)


async def test_a_repeated_step_finds_its_samples(tmp_path: Path) -> None:
    first, second = await lives(loop, tmp_path)
    assert first == second


def test_settings() -> None:
    assert Settings().aggregation == "token_mean" and loop().survive_the_wire()
    assert refused({"name": "nft", "first_weight": -1})[0] == "algorithm.first_weight"
    assert "no such setting" in refused({"name": "nft", "beta": 0.1})[1]
