"""An environment whose task ids say how it misbehaves: `kind = "tests.support.environments"`."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from services.env.base import EnvironmentInfo, MissingExtra, PromptSet, Split, StepResult, TaskInfo, UnknownTask

MAX_STEPS = 4
TASKS = (
    "good",
    "raises",
    "raises-at-start",
    "hangs",
    "hangs-at-start",
    "exits",
    "no-result",
    "reward-nan",
    "surrogates",
    "truncated-not-done",
    "sleeps",
)


class AwkwardEpisode:
    def __init__(self, task_id: str, seconds: float):
        self.observation = "begin"
        self._task_id = task_id
        self._seconds = seconds
        self._steps = 0

    def step(self, action: str) -> StepResult:
        self._steps += 1
        if action == "well":
            return StepResult("fine", action)
        good = StepResult(
            f"{self._steps}: {action[:20]}", "good", reward=0.25, done=self._steps == MAX_STEPS, feedback="over"
        )
        answer: Any = getattr(self, "_" + self._task_id.replace("-", "_"), lambda: good)()
        return good if answer is None and self._task_id != "no-result" else answer

    def _raises(self) -> None:
        raise RuntimeError("the ice \ud800 broke")

    def _hangs(self) -> None:
        time.sleep(self._seconds)

    def _sleeps(self) -> None:
        time.sleep(0.2)

    def _exits(self) -> None:
        sys.exit("bye")

    def _no_result(self) -> None:
        return None

    def _reward_nan(self) -> StepResult:
        return StepResult("x", "x", float("nan"))

    def _surrogates(self) -> StepResult:
        return StepResult("\ud800", "x")

    def _truncated_not_done(self) -> StepResult:
        return StepResult("x", "x", truncated=True)


class Awkward:
    def __init__(self, name: str, seconds: float):
        text = "{trace} {feedback} {reward} {memory}"
        self.info = EnvironmentInfo(
            name=name,
            description="misbehaves on request",
            prompts=PromptSet("play", "play", "reflect", text, "nothing", "{observation} {action}", text, "again"),
            max_steps=MAX_STEPS,
            max_reward=1.0,
            deterministic=True,
            task_counts={Split.TRAIN: len(TASKS), Split.TEST: 0},
        )
        self._seconds = seconds

    def list_tasks(self, split: Split, offset: int, limit: int) -> Sequence[TaskInfo]:
        if split is Split.TEST:
            raise RuntimeError("the list is torn")
        tasks = [TaskInfo(task_id, split, 1.0) for task_id in TASKS]
        return tasks[offset : offset + limit]

    def start(self, task_id: str) -> AwkwardEpisode:
        if task_id not in TASKS:
            raise UnknownTask(task_id)
        if task_id == "raises-at-start":
            raise RuntimeError("no ice today")
        if task_id == "hangs-at-start":
            time.sleep(self._seconds)
        return AwkwardEpisode(task_id, self._seconds)


def create(name: str, settings: Mapping[str, Any]) -> Awkward:
    """`hang_seconds` is how long a hanging call takes: longer than the server waits for a step. `missing` is an extra
    that is not installed."""
    if "missing" in settings:
        raise MissingExtra(settings["missing"], ImportError("No module named 'ice'"))
    return Awkward(name, float(settings.get("hang_seconds", 3.0)))
