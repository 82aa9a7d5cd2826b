"""The tasks that the policy fails at: drawn with a probability in proportion to 1 − success, without replacement.

The success of a task is the share of its last first samples that solved it. Until a task was sampled, it counts as
failed. `floor` is the least weight, so that no task is forgotten.
"""

from __future__ import annotations

import heapq
import random
from math import ceil, log
from typing import NamedTuple

from pydantic import Field

from mulligan.common.rewards import reaches
from mulligan.trainer.samplers import Choice, History, SamplerSettings, Task, TaskRequest
from mulligan.trainer.seeds import derive_seed


class Settings(SamplerSettings):
    """`visits`: how many of the latest groups of a task its success is measured by. `repeats`: how often a task is in
    a step at most, unless there are too few tasks."""

    name: str = "weakest"
    floor: float = Field(0.05, gt=0, le=1)
    visits: int = Field(4, ge=1)
    repeats: int = Field(1, ge=1, le=100)


class _Ticket(NamedTuple):
    key: float
    task: Task


def choose(request: TaskRequest, history: History, settings: Settings) -> Choice:
    """Weighted drawing without replacement by keys log(u) / weight (Efraimidis and Spirakis, 2006): a task has as many
    tickets as it may still be chosen in the step."""
    tasks = [Task(environment, info.task_id) for environment, listed in request.tasks.items() for info in listed]
    already = history.chosen_in(request.step)
    repeats = max(settings.repeats, ceil((request.count + already.total()) / len(tasks)))
    generator = random.Random(derive_seed(request.seed, "weakest", request.step, request.round))
    tickets = (
        _Ticket(log(1 - generator.random()) / weight(task, history, settings, request.success_threshold), task)
        for task in tasks
        for _ in range(repeats - already[task])
    )
    return Choice([ticket.task for ticket in heapq.nlargest(request.count, tickets)])


def weight(task: Task, history: History, settings: Settings, threshold: float) -> float:
    latest = [group for group in history.of(task) if group.rewards][-settings.visits :]
    rewards = [reward for group in latest for reward in group.rewards if reward is not None]
    if not rewards:
        return 1.0
    success = sum(reaches(reward, threshold) for reward in rewards) / len(rewards)
    return max(1 - success, settings.floor)
