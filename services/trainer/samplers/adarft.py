"""AdaRFT: tasks of the difficulty at which the policy earns half of the reward (arXiv 2504.05520, section 3).

    T ← clip(T + η · tanh(α · (R̄ − β)), d_min, d_max)    after each step; R̄: its mean reward of first samples
    the tasks with least |d − T|                          for the next one

Difficulties d are those that the environment gives its tasks. Constants of the paper: β ½, α 2, η half of the range of
difficulties (50 of 0 to 100), T at first the least difficulty. Deviations:

1. Among tasks that are equally near, a random order decides, drawn from the run's seed.
2. A task rests until others were chosen, as many as `rest` of all tasks, and until its step is over. The reference
   chooses the same tasks again while T stays where it is. With a large `rest`, few tasks near T are left, and with 1
   all tasks are equally frequent.
"""

from __future__ import annotations

import random
from itertools import chain, cycle, islice
from math import tanh

from pydantic import Field

from mulligan.trainer.samplers import Choice, History, SamplerSettings, Task, TaskRequest, UnfitSetting
from mulligan.trainer.seeds import derive_seed


class Settings(SamplerSettings):
    """`move` is η and `start` the first T, in the unit of the environment's difficulties; None: as in the paper."""

    name: str = "adarft"
    target_reward: float = 0.5
    sensitivity: float = Field(2.0, gt=0)
    move: float | None = Field(None, gt=0)
    start: float | None = None
    rest: float = Field(0.1, ge=0, le=1)


def choose(request: TaskRequest, history: History, settings: Settings) -> Choice:
    difficulty = {
        Task(environment, info.task_id): info.difficulty
        for environment, listed in request.tasks.items()
        for info in listed
    }
    aim = target_difficulty(request, history, settings)
    generator = random.Random(derive_seed(request.seed, "adarft", request.step, request.round))
    ties = {task: generator.random() for task in difficulty}
    chosen = history.chosen_in(request.step)
    longest = max(int(settings.rest * len(difficulty)), chosen.total())
    resting = _latest(history, min(longest, len(difficulty) - request.count))
    order = sorted(difficulty, key=lambda task: (task in resting, abs(difficulty[task] - aim), ties[task]))
    return Choice(list(islice(cycle(order), request.count)))


def target_difficulty(request: TaskRequest, history: History, settings: Settings) -> float:
    """T of the request's step. Raises UnfitSetting where a run would begin beyond the difficulties of its tasks."""
    difficulties = [info.difficulty for listed in request.tasks.values() for info in listed]
    low, high = min(difficulties), max(difficulties)
    size = (high - low) / 2 if settings.move is None else settings.move
    if settings.start is not None and not history.rounds and not low <= settings.start <= high:
        raise UnfitSetting("start", f"expected {low:g} to {high:g}, as the tasks are difficult; got {settings.start:g}")
    aim = low if settings.start is None else settings.start
    for one in history.rounds:
        if one.step < request.step and one.number == 0 and one.mean_reward is not None:
            moved = aim + size * tanh(settings.sensitivity * (one.mean_reward - settings.target_reward))
            aim = min(max(moved, low), high)
    return aim


def _latest(history: History, count: int) -> set[Task]:
    """The tasks of the last `count` groups."""
    groups = chain.from_iterable(reversed(one.groups) for one in reversed(history.rounds))
    return {group.task for group in islice(groups, max(count, 0))}
