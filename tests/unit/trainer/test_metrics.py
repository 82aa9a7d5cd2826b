"""The metrics of a step name samples and targets by the roles that an algorithm gives them."""

from __future__ import annotations

from itertools import repeat
from typing import Any

from mulligan.trainer.trainable import _MEANINGS, drop_notices
from tests.support.loop import Loop, in_turn


async def counts(algorithm: str, **settings: Any) -> dict[str, float]:
    made = Loop(in_turn(["a", "go"], repeat("x"), repeat("a text")), algorithm={"name": algorithm}, **settings)
    await made.step()
    return {name: value for name, value in made.metrics.items() if name.partition("_")[0] in COUNTED}


COUNTED = ("texts", "targets", "reflections", "distilled")
PAIR = {"rollouts_per_task": 2}


async def test_texts_and_targets_are_counted_by_role() -> None:
    assert await counts("critique_grpo", rollout=PAIR) == {
        "texts": 2.0,
        "texts_critique": 2.0,
        "reflections": 2.0,
        "targets": 2.0,
        "targets_transferred": 2.0,
        "distilled": 2.0,
    }
    assert await counts("hindsight", rollout=PAIR) == {
        "texts": 0.0,
        "reflections": 0.0,
        "targets": 1.0,
        "targets_bad": 1.0,
        "distilled": 1.0,
    }


async def test_the_names_of_erl_stay() -> None:
    assert await counts("erl", rollout=PAIR) == {
        "texts": 1.0,
        "texts_reflection": 1.0,
        "reflections": 1.0,
        "targets": 0.0,
        "distilled": 0.0,
    }


def test_notices_are_of_any_algorithm() -> None:
    told = drop_notices({f"dropped_{problem}": 1.0 for problem in _MEANINGS})
    assert len(told) == len(_MEANINGS) > 5
    for notice in told:
        assert "first" not in notice and "second" not in notice and "distilled" not in notice, notice
