"""UFO (arXiv 2507.14295, eq. 9 to 11) on numbers computed by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mulligan.common.experience import Sample, Turn
from mulligan.common.types import Outcome
from mulligan.trainer.algorithms.ufo import Settings, worth
from mulligan.trainer.data import ModelLimits
from tests.support.fakes import FakeEnvironment, timeout
from tests.support.loop import Loop, lives, refused, trained_text, whole_text

# Four conversations of at most three tries: solved at once, at the second, at the third after a repetition, never.
SAID = ["go", "a", "go", "b", "b", "go", "c", "c", "c"]
WORTH = [1.0, 0.5, 0.25 - 0.5 / 3, -0.5 * 2 / 3]


def loop(said: list[str] = SAID, *, environment: FakeEnvironment | None = None, **settings: Any) -> Loop:
    answers = iter(said)
    algorithm = {"name": "ufo", "tries": 3, "normalize_by_std": False, **settings}
    return Loop(lambda system, last: next(answers), environment=environment, algorithm=algorithm)


async def test_one_step_of_the_paper() -> None:
    made = loop(first_weight=0.5)
    experiences = await made.step()
    firsts = [one["first"] for one in experiences]
    assert [len(one.samples) for one in experiences] == [1] * 4 and not any(one.targets for one in experiences)
    assert [sample.try_turns for sample in firsts] == [(1,), (1, 1), (1, 1, 1), (1, 1, 1)]
    assert [worth(sample, Settings(tries=3)) for sample in firsts] == pytest.approx(WORTH)
    mean = sum(WORTH) / 4
    assert made.advantages("first") == pytest.approx([each - mean for each in WORTH])
    assert [datum.weight for datum in made.branch("first")] == [0.5 / 4] * 4
    assert made.metrics["success_first"] == 0.75 and made.metrics["rollouts"] == 9


async def test_a_conversation_is_one_sequence_whose_answers_are_trained() -> None:
    made = loop()
    await made.step()
    third = made.branch("first")[2]
    again = "[user:Incorrect. Please think again.\nboard t0][assistant:"
    assert whole_text(third) == f"[system:solve][user:board t0][assistant:b]{again}b]{again}go]"
    assert trained_text(third) == "b]b]go]"


def test_defaults_are_the_papers() -> None:
    settings = Settings()
    assert (settings.tries, settings.decay, settings.repetition_penalty, settings.first_weight) == (5, 0.5, 0.5, 1.0)
    assert loop().survive_the_wire()


@pytest.mark.parametrize(
    ("actions", "tries", "reward", "expected"),
    [
        (["U", "D"], (2,), 1.0, 1.0),
        (["U", "D", "D", "U"], (2, 2), 1.0, 0.5),  # other orders are other answers
        (["U", "D", "U", "D"], (2, 2), 0.0, -0.25),
        (["U", "D", "U", "D"], (2, 2), 0.9, -0.25),  # a part of the reward solves nothing
        (["U", "U", "U"], (1, 1, 1, 0), 0.0, -1 / 3),  # there was no room for a fourth
        (["invalid", "U (invalid)"], (1, 1), 1.0, 0.5 - 2 * 0.1),
    ],
)
def test_the_worth_of_a_conversation(
    actions: list[str], tries: tuple[int, ...], reward: float, expected: float
) -> None:
    turns = tuple(Turn("board", action, action, 0.0) for action in actions)
    sample = Sample("a", "first", Outcome.COMPLETED, (), 1.0, reward, turns=turns, try_turns=tries)
    assert worth(sample, Settings(invalid_penalty=0.1)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("said", "signal"),
    [(["go", "a", "go", "go", "go"], 1.0), (["go"] * 4, 0.0), (["a"] * 12, 0.0), (["a", "a", "a"] * 3 + [*"bcd"], 1.0)],
)
async def test_a_group_differs_in_its_shaped_rewards(said: list[str], signal: float) -> None:
    """All that succeed may need a different number of tries, and all that fail may repeat themselves or not."""
    made = loop(said)
    await made.step()
    assert made.metrics["groups_with_signal"] == signal


async def test_a_single_try_is_an_ordinary_episode() -> None:
    made = loop(["go", "a", "go", "a"], tries=1)
    await made.step()
    assert made.advantages("first") == [0.5, -0.5, 0.5, -0.5]


async def test_a_conversation_lost_to_the_infrastructure_is_no_member_of_its_group() -> None:
    environment = FakeEnvironment({"t0": "go"})

    def fail(episode_id: str) -> None:
        if "-r0-" in episode_id:
            raise timeout()

    environment.fail = fail
    made = loop(["lost", "lost", "lost", "go", "a", "b", "go", "c", "c", "c"], environment=environment)
    lost, *_ = await made.step()
    assert lost["first"].outcome is Outcome.TIMEOUT and lost["first"].restarts == 2
    assert made.metrics["excluded"] == 1 and [datum.weight for datum in made.branch("first")] == [1 / 3] * 3
    assert made.advantages("first") == pytest.approx([each - (1 + 0.25 - 1 / 3) / 3 for each in (1, 0.25, -1 / 3)])


async def test_one_that_no_learner_takes_counts_in_its_group_alone() -> None:
    made = loop()
    made.learner.limits = ModelLimits(2**16, 150)
    await made.step()
    mean = sum(WORTH) / 4
    assert made.metrics["dropped_too_long"] == 2
    assert made.advantages("first") == pytest.approx([each - mean for each in WORTH[:2]])
    assert [datum.weight for datum in made.branch("first")] == [1 / 2] * 2


@pytest.mark.parametrize("rewrites", [False, True])
async def test_each_answer_is_a_sequence_where_the_template_rewrites_history(rewrites: bool) -> None:
    answers = iter(SAID)
    made = Loop(lambda system, last: next(answers), rewrites=rewrites, algorithm={"name": "ufo", "tries": 3})
    await made.step()
    assert len(made.branch("first")) == (len(SAID) if rewrites else 4)


async def test_a_repeated_step_finds_its_samples(tmp_path: Path) -> None:
    first, second = await lives(loop, tmp_path)
    assert first == second


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tries": 0}, "greater than or equal to 1"),
        ({"decay": 0}, "greater than 0"),
        ({"decay": 1.5}, "less than or equal to 1"),
        ({"repetition_penalty": -1}, "greater than or equal to 0"),
        ({"repitition_penalty": 1}, "did you mean 'repetition_penalty'?"),
    ],
)
def test_settings_out_of_range_are_named(changes: dict[str, Any], words: str) -> None:
    field, message = refused({"name": "ufo", **changes})
    assert field == f"algorithm.{next(iter(changes))}" and words in message
