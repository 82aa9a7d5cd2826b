"""A small environment with a planted fault: `kind = "tests.support.dice"`, `fault = "unseeded"`.

The agent guesses a number; each wrong guess draws another one.
"""

from __future__ import annotations

import copy
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mulligan.env.base import EnvironmentInfo, Split, StepResult, TaskInfo, UnknownTask
from mulligan.env.prompts import generic_prompts

MAX_STEPS = 5
TASKS = {Split.TRAIN: 30, Split.TEST: 4}
SHARED = random.Random(1)


@dataclass(frozen=True)
class Settings:
    fault: str = ""


class DiceEpisode:
    def __init__(self, task_id: str, fault: str) -> None:
        unseeded = {"unseeded": random.Random(), "by-process": random.Random(os.getpid()), "shared": SHARED}
        self._random = unseeded.get(fault, random.Random(task_id))
        self._fault = fault
        self._steps = 0
        self.observation = self._draw()

    def _draw(self) -> str:
        self._secret = self._random.randint(1, 6)
        return f"A die was cast; its parity is {self._secret % 2}. Sum so far: {self._random.randint(1, 99)}."

    def step(self, action: str) -> StepResult:
        self._steps += 1
        if self._fault == "parses" and action.strip() not in ("1", "2", "3", "4", "5", "6"):
            return StepResult("", "", reward=1 / len(str(int(action))))
        if self._fault == "hangs" and action.startswith("{"):
            time.sleep(1.5)
        right = action.strip() == str(self._secret)
        truncated = self._steps == MAX_STEPS and not right and self._fault != "endless"
        reward = 1.0 if right or self._fault == "generous" else 0.0
        said = StepResult(self._draw(), action[:20] or "nothing", reward, done=right or truncated, truncated=truncated)
        if said.done:
            said = replace(said, feedback=f"{'right' if right else 'wrong'} at last")
        return replace(said, **self._wrongly(said))

    def _wrongly(self, said: StepResult) -> dict[str, Any]:
        changes: dict[str, dict[str, Any]] = {
            "unread": {"action": ""},
            "tool": {"tool": "abacus"},
            "cut-short": {"done": True, "truncated": True},
            "two-players": {"player": 1},
            "reward-none": {"reward": None},
            "reward-huge": {"reward": 1e200},
            "reward-numpy": {"reward": np.float32(0.5)},
        }
        return changes.get(self._fault, {})

    def fork(self) -> DiceEpisode:
        if self._fault == "fork-shares":
            return copy.copy(self)
        copied = copy.deepcopy(self)
        if self._fault == "fork-forgets":
            copied._random = random.Random(0)
        return copied


class Dice:
    def __init__(self, name: str, fault: str) -> None:
        self._fault = fault
        self.info = EnvironmentInfo(
            name=name,
            description="guess the number on a die",
            prompts=generic_prompts("Guess the number on a die.", "Answer with a number from 1 to 6."),
            max_steps=MAX_STEPS,
            max_reward=1.0,
            deterministic=True,
            task_counts=TASKS,
            can_fork=True,
        )
        wrong: dict[str, dict[str, Any]] = {
            "counts": {"task_counts": {Split.TRAIN: 31, Split.TEST: 4}},
            "no-train": {"task_counts": {Split.TRAIN: 0, Split.TEST: 4}},
            "no-test": {"task_counts": {Split.TRAIN: 30, Split.TEST: 0}},
            "types": {"max_steps": "5"},
            "undescribed": {"description": ""},
            "no-prompts": {"prompts": replace(self.info.prompts, trace_turn="a turn")},
        }
        self.info = replace(self.info, **wrong.get(fault, {}))
        if fault == "no-info":
            del self.info

    def list_tasks(self, split: Split, offset: int, limit: int) -> Sequence[TaskInfo]:
        if self._fault == "list-raises":
            raise RuntimeError("the list is torn")
        odd_tags: dict[str, Any] = {"answerable": True}
        odd: dict[str, Any] = {"long-id": "x" * 201, "empty-id": "", "number-id": 7, "unsendable-id": "a\ud800"}
        if self._fault in odd:
            return [TaskInfo(odd[self._fault], split, 1.0)] * TASKS[split]
        if f"no-{split}" == self._fault:
            return []
        prefix = "both" if self._fault == "both-splits" else split
        tasks = [TaskInfo(f"{prefix}/{n}", split, 1.0) for n in range(TASKS[split])]
        if self._fault == "odd-tags":
            tasks = [replace(task, tags=odd_tags) for task in tasks]
        if self._fault == "twice":
            tasks[3] = tasks[1]
        if self._fault == "no-offset":
            return tasks[:limit]
        return tasks[offset : offset + limit]

    def start(self, task_id: str) -> DiceEpisode:
        split, _, number = task_id.partition("/")
        if self._fault == "anything-goes":
            return DiceEpisode(task_id, self._fault)
        if self._fault == "key-error":
            {f"{name}/{n}": n for name in TASKS for n in range(TASKS[name])}[task_id]
        known = {"both": 30} if self._fault == "both-splits" else {str(name): count for name, count in TASKS.items()}
        if not number.isdecimal() or int(number) >= known.get(split, 0) or str(int(number)) != number:
            raise UnknownTask(task_id)
        return DiceEpisode(task_id, self._fault)


def create(name: str, settings: Settings) -> Dice:
    return Dice(name, settings.fault)
