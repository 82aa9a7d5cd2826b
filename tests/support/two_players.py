"""A game of two for tests: each names a number in turn; the second wins by naming the first one's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mulligan.env.base import EnvironmentInfo, Split, StepResult, TaskInfo, Tool, UnknownTask
from mulligan.env.prompts import generic_prompts


class Round:
    observation = "Name a number."
    player = 1

    def __init__(self) -> None:
        self._named = ""

    def step(self, action: str) -> StepResult:
        if action == "raise":
            raise KeyError("the dice are lost")
        if action == "look":
            return StepResult("\x1b[2Jnothing", "look()", tool="look", player=1, rewards=(0.0, 0.0))
        if not self._named:
            self._named = action
            return StepResult("Which one was it?", repr(action), player=0, rewards=(0.0, 0.5))
        won = action == self._named
        rewards = (1.0, -1.0) if won else (-1.0, 1.0)
        return StepResult("Over.", repr(action), rewards[0], done=True, feedback="That was all.", rewards=rewards)


class Game:
    info = EnvironmentInfo(
        name="two-players",
        description="A number in turn",
        prompts=generic_prompts("Play.", "Name a number."),
        max_steps=4,
        max_reward=1.0,
        deterministic=True,
        task_counts={Split.TRAIN: 1, Split.TEST: 0},
        tools=(Tool("look", "Look at the table", '{"type": "object", "properties": {}}'),),
        player_count=2,
    )

    def list_tasks(self, split: Split, offset: int, limit: int) -> Sequence[TaskInfo]:
        return [TaskInfo("only", split, 1.0)][offset : offset + limit] if split is Split.TRAIN else []

    def start(self, task_id: str) -> Round:
        if task_id != "only":
            raise UnknownTask(task_id)
        return Round()


def create(name: str, settings: Mapping[str, object]) -> Game:
    return Game()
