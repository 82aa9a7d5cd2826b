"""What algorithms say of the work of a member (`PLAYS`), for estimates."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import pytest

from mulligan.trainer.settings import ALGORITHMS
from tests.support.loop import Loop, in_turn

# With these an algorithm does all that it can.
MOST: dict[str, dict[str, Any]] = {
    "context_distillation": {"knowledge": "reflection"},
    "rltf": {"feedback": "judge"},
    "ruscarl": {"hints": ["rule"]},
}
TOLD = [name for name in ALGORITHMS.built_in if hasattr(ALGORITHMS.find(name), "PLAYS")]


def test_most_algorithms_say_it() -> None:
    assert {"erl", "rlvr", "raw_retry", "try_again", "sdpo"} <= set(TOLD)


@pytest.mark.parametrize("name", TOLD)
async def test_no_member_plays_more_and_one_plays_as_much(name: str) -> None:
    say = in_turn(cycle(["a", "b", "go", "c"]), cycle(["go", "x"]), cycle(["rule"]))
    experiences = await Loop(say, algorithm={"name": name} | MOST.get(name, {})).step()
    found = [
        (
            sum(sample.is_episode for sample in one.samples),
            sum(not sample.is_episode for sample in one.samples),
            len(one.targets),
        )
        for one in experiences
    ]
    plays = ALGORITHMS.find(name).PLAYS
    most = tuple(max(column) for column in zip(*found, strict=True))
    assert most == (plays.episodes, plays.texts, plays.copies)
