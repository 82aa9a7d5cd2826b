"""True and false are no numbers in settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, ValidationError

from mulligan.common.number_settings import NumberSettings
from mulligan.common.suggest import problems
from mulligan.env.config import EnvSettings
from mulligan.env.load import load
from mulligan.policy.config import PolicySettings
from mulligan.trainer.settings import RunSettings


class Settings(NumberSettings):
    count: int = 1
    share: float | None = Field(None, ge=0)
    several: tuple[Annotated[float, Field(ge=0)], ...] = ()
    whether: bool = False
    either: bool | int = 0
    anything: Any = None
    off: Literal[False] | float = False
    by_name: Mapping[str, bool] = Field(default_factory=dict)


class Further(Settings):
    more: float = 0.0


@pytest.mark.parametrize("field", ["count", "share", "several", "more"])
@pytest.mark.parametrize("value", [True, False])
def test_a_number_is_not_given_as_true_or_false(field: str, value: bool) -> None:
    with pytest.raises(ValidationError) as raised:
        Further.model_validate({field: [1, value] if field == "several" else value})
    assert problems(raised.value, Further) == {field: f"expected a number, got {str(value).lower()}"}


def test_what_may_be_true_or_false_is_taken() -> None:
    found = Further(whether=True, either=True, anything=True, off=False, by_name={"a": True}, count=2, several=(1, 0.5))
    assert found.whether is found.either is found.anything is found.by_name["a"] is True
    assert (found.count, found.several) == (2, (1, 0.5))


@pytest.mark.parametrize(
    ("model", "given", "where"),
    [
        (RunSettings, {"environment": "game", "rollout": {"max_staleness": True}}, "rollout.max_staleness"),
        (RunSettings, {"environment": "game", "algorithm": {"name": "erl", "first_weight": True}}, "algorithm"),
        (RunSettings, {"environment": "game", "loss": {"clip_low": False}}, "loss"),
        (RunSettings, {"environment": "game", "steps": True}, "steps"),
        (PolicySettings, {"threads": True}, "threads"),
        (EnvSettings, {"write_seconds": True}, "write_seconds"),
    ],
)
def test_all_settings_of_the_services_refuse_it(model: type[Any], given: dict[str, Any], where: str) -> None:
    with pytest.raises(ValidationError) as raised:
        model.model_validate(given)
    (said,) = problems(raised.value, model).items()
    assert said[0].startswith(where) and "expected a number, got" in said[1]


@pytest.mark.parametrize(
    ("kind", "given", "said"),
    [
        ("frozenlake", {"max_steps": True}, "max_steps: expected a number, got true"),
        ("sokoban", {"seed": False}, "seed: expected a number, got false"),
        ("reasoning_gym", {"train_tasks": True}, "train_tasks: expected a number, got true"),
    ],
)
def test_environments_refuse_it(kind: str, given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load("x", {"kind": kind, **given})
