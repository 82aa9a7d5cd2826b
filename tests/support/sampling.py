"""Samplers without a run: what they are asked, and a simulated policy that earns rewards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

from mulligan.common.types import Split, TaskInfo
from mulligan.trainer.samplers import Choice, Group, History, Round, SamplerSettings, Task, TaskRequest


def tasks(*ids: str, difficulty: float = 1.0) -> list[TaskInfo]:
    return [TaskInfo(task_id, Split.TRAIN, difficulty) for task_id in ids]


def numbered(count: int, prefix: str = "t") -> list[TaskInfo]:
    return tasks(*(f"{prefix}{number:04}" for number in range(count)))


def request(
    listed: Mapping[str, Sequence[TaskInfo]] | Sequence[TaskInfo], step: int = 0, **changes: Any
) -> TaskRequest:
    by_name = listed if isinstance(listed, Mapping) else {"lake": listed}
    return replace(TaskRequest(step, steps=100, seed=0, tasks_per_step=4, tasks=by_name), **changes)


def sampled(choice: Choice, step: int, rewards: Callable[[Task], Sequence[float | None]], number: int = 0) -> Round:
    groups = tuple(Group(*task, tuple(rewards(task))) for task in choice.tasks)
    return Round(step, number, groups, choice.horizon)


def play(
    sampler: ModuleType,
    settings: SamplerSettings,
    listed: Mapping[str, Sequence[TaskInfo]] | Sequence[TaskInfo],
    count: int,
    rewards: Callable[[Task], Sequence[float | None]] = lambda task: (1.0, 0.0),
    **changes: Any,
) -> Iterator[Choice]:
    """The choices of the first `count` steps of a run."""
    history = History()
    for step in range(count):
        choice = sampler.choose(request(listed, step, **changes), history, settings)
        history.add(sampled(choice, step, rewards))
        yield choice
