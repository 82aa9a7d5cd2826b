"""An environment whose task ids say how it misbehaves: `kind = "tests.support.environments"`."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mulligan.env.base import EnvironmentInfo, MissingExtra, PromptSet, Split, StepResult, TaskInfo, UnknownTask

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
    "waits",
    "meets",
)
MEETING = threading.Barrier(8)  # of the steps of "meets": none goes on before all are there
WAITING_SECONDS = 100.0  # for a test that is broken


class AwkwardEpisode:
    def __init__(self, task_id: str, owner: Awkward):
        self.observation = "begin"
        self._task_id = task_id
        self._owner = owner
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
        self._owner.hang()

    def _waits(self) -> None:
        self._owner.begun.set()
        self._owner.go_on.wait(WAITING_SECONDS)

    def _meets(self) -> None:
        MEETING.wait(WAITING_SECONDS)

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
    """`begun` tells that a step of "waits" runs, `go_on` ends it. `began` is a file that tells of a hanging call, to a
    test in another process."""

    def __init__(self, name: str, seconds: float, began: Path | None = None):
        self.begun = threading.Event()
        self.go_on = threading.Event()
        self._began = began
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

    def hang(self) -> None:
        if self._began is not None:
            self._began.touch()
        time.sleep(self._seconds)

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
            self.hang()
        return AwkwardEpisode(task_id, self)


def create(name: str, settings: Mapping[str, Any]) -> Awkward:
    """`hang_seconds` is how long a hanging call takes: longer than the server waits for a step. `began` is a file that
    such a call makes when it begins. `missing` is an extra that is not installed."""
    if "missing" in settings:
        raise MissingExtra(settings["missing"], ImportError("No module named 'ice'"))
    began = Path(settings["began"]) if "began" in settings else None
    return Awkward(name, float(settings.get("hang_seconds", 3.0)), began)
