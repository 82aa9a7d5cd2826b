"""Episodes grow longer with the run."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from mulligan.trainer.samplers import horizon, uniform
from mulligan.trainer.samplers.horizon import Settings
from tests.support.sampling import numbered, play


def test_it_grows_in_equal_parts_of_the_run_and_stays_at_the_last() -> None:
    choices = list(play(horizon, Settings(), numbered(9), 10, steps=10))
    assert [choice.horizon for choice in choices] == [10] * 4 + [20] * 4 + [30] * 2
    choices = list(play(horizon, Settings(turns=(2, 4), steps_each=1), numbered(9), 4, steps=10))
    assert [choice.horizon for choice in choices] == [2, 4, 4, 4]


def test_the_tasks_are_those_of_uniform() -> None:
    other = play(uniform, uniform.Settings(), numbered(9), 10)
    assert [c.tasks for c in play(horizon, Settings(), numbered(9), 10)] == [c.tasks for c in other]


@pytest.mark.parametrize("wrong", [{"turns": []}, {"turns": [0]}, {"steps_each": 0}])
def test_a_horizon_has_at_least_one_turn(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Settings.model_validate(wrong)
