"""What an environment answers is checked, and a wrong answer named."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from mulligan.common.types import EpisodeStep, Outcome
from mulligan.env.base import Faulted, StepResult
from mulligan.env.calls import play


@dataclass
class Scripted:
    result: Any
    observation: str = ""

    def step(self, action: str) -> Any:
        return self.result


def result(**changes: Any) -> StepResult:
    return StepResult(**{"observation": "o", "action": "a", **changes})


def test_a_good_answer_is_passed_on() -> None:
    assert play(Scripted(result(reward=1)), "x", 1) == EpisodeStep("o", "a", 1.0, False)
    ended = result(done=True, truncated=True, feedback="f", player=1, rewards=[1, 0.5])
    assert play(Scripted(ended), "x", 2) == EpisodeStep(
        "o", "a", 0.0, True, Outcome.TRUNCATED, "f", player=1, rewards=(1.0, 0.5)
    )


@pytest.mark.parametrize(
    ("wrong", "players", "words"),
    [
        (result(player=1), 1, "player is 1, not one of 1 from 0"),
        (result(player=2, rewards=(0, 0)), 2, "player is 2, not one of 2 from 0"),
        (result(player=-1, rewards=(0, 0)), 2, "player is -1"),
        (result(player="1", rewards=(0, 0)), 2, "player is '1'"),
        (result(rewards=(1.0,)), 1, "not none, as there is one player"),
        (result(), 2, r"rewards are \(\), not 2 finite numbers"),
        (result(rewards=(1.0, 2.0, 3.0)), 2, "not 2 finite numbers"),
        (result(rewards=(1.0, float("nan"))), 2, "not 2 finite numbers"),
        (result(rewards=("one", 1.0)), 2, "reward 'one' is not a number"),
        (result(rewards=(1.0, -1e200)), 2, r"reward -1e\+200 is not a number"),
        (result(rewards=7), 2, "rewards are 7"),
        (result(reward=float("inf")), 1, "reward inf is not a number from -1e"),
        (result(reward=float("nan")), 1, "reward nan"),
        (result(reward=1e200), 1, r"reward 1e\+200"),
        (result(reward=None), 1, "reward None"),
        (result(reward="1"), 1, "reward '1'"),
        (result(truncated=True), 1, "truncated without done"),
        (result(observation=b"o"), 1, "observation is bytes, not str"),
        (result(tool=None), 1, "tool is NoneType, not str"),
        (result(observation="x" * (2**24 + 1)), 1, "observation has 16777217 bytes; the limit is 16777216"),
        (result(action="√" * 2**23), 1, "action has 25165824 bytes"),
        (None, 1, "step returned NoneType, not StepResult"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_answer_is_named(wrong: Any, players: int, words: str) -> None:
    with pytest.raises(Faulted, match=words):
        play(Scripted(wrong), "x", players)
