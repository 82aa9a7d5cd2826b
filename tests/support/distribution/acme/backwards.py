"""A sampler of another package: the last tasks of the list first."""

from __future__ import annotations

from itertools import cycle, islice

from mulligan.trainer.samplers import Choice, History, SamplerSettings, Task, TaskRequest


class Settings(SamplerSettings):
    name: str = "backwards"


def choose(request: TaskRequest, history: History, settings: Settings) -> Choice:
    tasks = [Task(request.environment, info.task_id) for info in request.tasks[request.environment]]
    return Choice(list(islice(cycle(reversed(tasks)), request.count)))
