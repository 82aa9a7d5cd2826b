"""An environment: count down to 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mulligan.env import EnvironmentInfo, Split, StepResult, TaskInfo, UnknownTask, generic_prompts


@dataclass(frozen=True, slots=True)
class Settings:
    first: int = 5

    def __post_init__(self) -> None:
        if self.first < 2:
            raise ValueError(f"first must be at least 2, not {self.first}")


class CountdownEpisode:
    def __init__(self, first: int) -> None:
        self.observation = str(first)
        self._left = first

    def step(self, action: str) -> StepResult:
        said = action.strip()
        if said != str(self._left - 1):
            return StepResult("wrong", "wrong", done=True, feedback=f"{self._left - 1} comes after {self._left}.")
        self._left -= 1
        if self._left == 1:
            return StepResult("done", said, reward=1.0, done=True, feedback="The end was reached.")
        return StepResult(said, said)


class Countdown:
    def __init__(self, name: str, settings: Settings) -> None:
        self._firsts = {
            Split.TRAIN: range(2, settings.first + 1),
            Split.TEST: range(settings.first + 1, 8 + settings.first),
        }
        self.info = EnvironmentInfo(
            name=name,
            description="count down to 1",
            prompts=generic_prompts("Count down to 1.", "Say the next number, and nothing else."),
            max_steps=self._firsts[Split.TEST].stop,
            max_reward=1.0,
            deterministic=True,
            task_counts={split: len(firsts) for split, firsts in self._firsts.items()},
        )

    def list_tasks(self, split: Split, offset: int, limit: int) -> Sequence[TaskInfo]:
        firsts = self._firsts[split][offset : offset + limit]
        return [TaskInfo(f"{split}/{first:05d}", split, float(first)) for first in firsts]

    def start(self, task_id: str) -> CountdownEpisode:
        for split, firsts in self._firsts.items():
            for first in firsts:
                if task_id == f"{split}/{first:05d}":
                    return CountdownEpisode(first)
        raise UnknownTask(task_id)


def create(name: str, settings: Settings) -> Countdown:
    return Countdown(name, settings)
