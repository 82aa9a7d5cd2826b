"""RLEF (arXiv 2410.02089) on numbers computed by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mulligan.common.experience import Sample, Turn
from mulligan.common.types import Outcome
from mulligan.trainer.algorithms.rlef import Settings, turn_rewards
from mulligan.trainer.data import PolicyGradient
from tests.support.fakes import FakeEnvironment, timeout
from tests.support.loop import Loop, lives, refused, trained_text

# Three conversations of at most two answers: right at once, right at the second, never.
SAID = ["go", "a", "go", "b", "c"]


def loop(said: list[str] = SAID, *, environment: FakeEnvironment | None = None, **settings: Any) -> Loop:
    answers = iter(said)
    algorithm = {"name": "rlef", "tries": 2, "advantage_settings": {"whiten": False}, **settings}
    return Loop(
        lambda system, last: next(answers),
        environment=environment,
        algorithm=algorithm,
        rollout={"rollouts_per_task": 3},
    )


def token_advantages(made: Loop) -> list[tuple[float, ...]]:
    objectives = [datum.objective for datum in made.branch("first")]
    return [each.advantages for each in objectives if isinstance(each, PolicyGradient)]


async def test_one_step_of_the_paper() -> None:
    """Returns 1; 1, 1; −1, −1. So V of the first answer is 1/3, and V of the second is 0."""
    made = loop()
    experiences = await made.step()
    assert [one["first"].turns[-1].observation for one in experiences] == [
        "board t0",
        *["wrong\nGive it another try.\nboard t0"] * 2,
    ]
    assert [trained_text(datum) for datum in made.branch("first")] == ["go]", "a]go]", "b]c]"]
    right, corrected, wrong = token_advantages(made)
    assert right == pytest.approx((2 / 3,) * 3)
    assert corrected == pytest.approx((2 / 3,) * 2 + (1.0,) * 3)
    assert wrong == pytest.approx((-4 / 3,) * 2 + (-1.0,) * 2)
    assert [datum.weight for datum in made.branch("first")] == [1 / 3] * 3


async def test_advantages_are_whitened_unless_told_otherwise() -> None:
    made = loop(advantage_settings={})
    await made.step()
    values = [value for each in token_advantages(made) for value in each]
    assert sum(values) == pytest.approx(0.0, abs=1e-9) and sum(value**2 for value in values) == pytest.approx(11)


async def test_another_estimator_has_one_advantage_per_conversation() -> None:
    made = loop(advantage="grpo", advantage_settings={}, normalize_by_std=False)
    await made.step()
    assert made.advantages("first") == pytest.approx([2 / 3, 2 / 3, -4 / 3])


def test_defaults_are_the_papers() -> None:
    settings = Settings()
    assert (settings.tries, settings.invalid_penalty, settings.advantage) == (3, 0.2, "turn_level")
    assert loop().survive_the_wire()


@pytest.mark.parametrize(
    ("actions", "reward", "expected"),
    [
        (["U"], 1.0, [1.0]),
        (["U", "invalid", "D"], 1.0, [0.0, -0.2, 1.0]),
        (["U (invalid)", "invalid"], 0.0, [-0.2, -1.0]),
        (["U", "D"], 0.5, [0.0, -1.0]),
    ],
)
def test_the_rewards_of_answers(actions: list[str], reward: float, expected: list[float]) -> None:
    turns = tuple(Turn("board", action, action, 0.25) for action in actions)
    sample = Sample("a", "first", Outcome.COMPLETED, (), 1.0, reward, turns=turns)
    assert turn_rewards(sample, Settings()) == pytest.approx(expected)


@pytest.mark.parametrize(("said", "signal"), [(["a", "go"] * 3, 0.0), (["a", "b"] * 3, 0.0), (SAID, 1.0)])
async def test_a_group_differs_in_its_shaped_rewards(said: list[str], signal: float) -> None:
    made = loop(said)
    await made.step()
    assert made.metrics["groups_with_signal"] == signal


async def test_a_conversation_lost_to_the_infrastructure_is_no_member_of_its_group() -> None:
    """Without the first one, V of both answers is 0."""
    environment = FakeEnvironment({"t0": "go"})

    def fail(episode_id: str) -> None:
        if "-r0-" in episode_id:
            raise timeout()

    environment.fail = fail
    made = loop(["lost", "lost", "lost", "a", "go", "b", "c"], environment=environment)
    await made.step()
    assert made.metrics["excluded"] == 1 and [datum.weight for datum in made.branch("first")] == [1 / 2] * 2
    assert token_advantages(made) == [pytest.approx((1.0,) * 5), pytest.approx((-1.0,) * 4)]


async def test_a_repeated_step_finds_its_samples(tmp_path: Path) -> None:
    first, second = await lives(loop, tmp_path)
    assert first == second


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tries": 0}, "greater than or equal to 1"),
        ({"invalid_penalty": -0.2}, "greater than or equal to 0"),
        ({"advantage_settings": {"discount": 1}}, "discount: no such setting of advantage estimator 'turn_level'"),
    ],
)
def test_settings_out_of_range_are_named(changes: dict[str, Any], words: str) -> None:
    field, message = refused({"name": "rlef", **changes})
    assert field.startswith(f"algorithm.{next(iter(changes))}") and words in message
