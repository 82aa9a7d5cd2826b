"""An environment that pays for every step, whatever the action is: `kind = "tests.support.paying"`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mulligan.env.base import EnvironmentInfo, Split, StepResult, TaskInfo, UnknownTask, read_settings
from mulligan.env.prompts import generic_prompts


@dataclass(frozen=True, slots=True)
class PayingSettings:
    """Each of `max_steps` steps pays `reward`. `solver_letters`: length of the system prompt of a first attempt."""

    tasks: tuple[str, ...] = ("a", "b")
    max_steps: int = 10
    reward: float = 0.1
    solver_letters: int = 10


class PayingEpisode:
    observation = "a"

    def __init__(self, settings: PayingSettings):
        self._settings = settings
        self._steps = 0

    def step(self, action: str) -> StepResult:
        self._steps += 1
        done = self._steps == self._settings.max_steps
        return StepResult("b", "paid", self._settings.reward, done=done, feedback="over" if done else "")


class Paying:
    def __init__(self, name: str, settings: PayingSettings):
        self._settings = settings
        prompts = generic_prompts("d" * settings.solver_letters, "e")
        self.info = EnvironmentInfo(
            name=name,
            description="pays for every step",
            prompts=prompts,
            max_steps=settings.max_steps,
            max_reward=settings.max_steps * settings.reward,
            deterministic=True,
            task_counts={split: len(settings.tasks) for split in Split},
        )

    def list_tasks(self, split: Split, offset: int, limit: int) -> Sequence[TaskInfo]:
        return [TaskInfo(task_id, split, 1.0) for task_id in self._settings.tasks][offset : offset + limit]

    def start(self, task_id: str) -> PayingEpisode:
        if task_id not in self._settings.tasks:
            raise UnknownTask(task_id)
        return PayingEpisode(self._settings)


def create(name: str, settings: Mapping[str, Any]) -> Paying:
    return Paying(name, read_settings(PayingSettings, settings))
