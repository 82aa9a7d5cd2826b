"""Every task equally often: passes over all training tasks, each in a new random order."""

from __future__ import annotations

from mulligan.trainer.samplers import Choice, History, SamplerSettings, Task, TaskRequest, others
from mulligan.trainer.seeds import in_passes


class Settings(SamplerSettings):
    name: str = "uniform"


def choose(request: TaskRequest, history: History, settings: SamplerSettings) -> Choice:
    """Replaced tasks are followed by the next ones of the pass; by random ones where steps overlap."""
    environment = request.environment
    tasks = request.tasks[environment]
    if request.overlapping:
        if request.round:
            known = [Task(environment, info.task_id) for info in tasks]
            return Choice(others(known, request, history, request.count, "replaced"))
        chosen = in_passes(len(tasks), request.step * request.tasks_per_step, request.count, request.seed)
        return Choice([Task(environment, tasks[index].task_id) for index in chosen])
    start = (request.step + (request.round > 0)) * request.tasks_per_step + history.replacements.total()
    chosen = in_passes(len(tasks), start, request.count, request.seed)
    return Choice([Task(environment, tasks[index].task_id) for index in chosen])
