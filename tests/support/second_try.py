"""An environment in which every other episode of a task succeeds, whatever its actions are: `kind = "tests.support.…"`.

With one chain at a time, each first attempt fails and each second one succeeds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mulligan.env.base import EnvironmentInfo, PromptSet, Split, StepResult, TaskInfo, UnknownTask

MAX_STEPS = 8
TASKS = {Split.TRAIN: ("dad", "cab"), Split.TEST: ("bad",)}


class SecondTryEpisode:
    def __init__(self, task_id: str, succeeds: bool):
        self.observation = f"{task_id} begins"
        self._succeeds = succeeds
        self._steps = 0

    def step(self, action: str) -> StepResult:
        self._steps += 1
        done = self._steps == MAX_STEPS
        return StepResult(
            observation=f"add a bed {self._steps}",
            action="faced",
            reward=float(done and self._succeeds),
            done=done,
            truncated=done,
            feedback="good" if self._succeeds else "bad",
        )


class SecondTry:
    def __init__(self, name: str):
        self.info = EnvironmentInfo(
            name=name,
            description="rewards the second episode of a task, the fourth, …",
            prompts=PromptSet(
                solver="decide",
                action_reminder="be brief",
                reflection_system="reflect",
                reflection="{trace} {feedback} {reward} {memory}",
                memory_empty="nothing",
                trace_turn="{observation}: {action}\n",
                retry="{trace} {feedback}",
                try_again="again",
            ),
            max_steps=MAX_STEPS,
            max_reward=1.0,
            deterministic=False,
            task_counts={split: len(tasks) for split, tasks in TASKS.items()},
        )
        self._started: Counter[str] = Counter()

    def list_tasks(self, split: Split, offset: int, limit: int) -> Sequence[TaskInfo]:
        return [TaskInfo(task_id, split, 1.0) for task_id in TASKS[split]][offset : offset + limit]

    def start(self, task_id: str) -> SecondTryEpisode:
        if not any(task_id in tasks for tasks in TASKS.values()):
            raise UnknownTask(task_id)
        self._started[task_id] += 1
        return SecondTryEpisode(task_id, self._started[task_id] % 2 == 0)


def create(name: str, settings: Mapping[str, Any]) -> SecondTry:
    return SecondTry(name)
