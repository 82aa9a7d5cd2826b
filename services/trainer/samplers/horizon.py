"""Episodes that grow longer: first at most 10 turns, then 20, then 30, as in test-time interaction (arXiv 2506.07976).

Tasks are those of `uniform`. Evaluations play to the environment's own limit.
"""

from __future__ import annotations

from math import ceil

from pydantic import Field, PositiveInt

from mulligan.trainer.samplers import Choice, History, SamplerSettings, TaskRequest, uniform


class Settings(SamplerSettings):
    """`steps_each`: how many training steps each number of turns holds for; None: the run's steps in equal parts. The
    last number holds to the end."""

    name: str = "horizon"
    turns: tuple[PositiveInt, ...] = Field((10, 20, 30), min_length=1)
    steps_each: int | None = Field(None, ge=1)


def choose(request: TaskRequest, history: History, settings: Settings) -> Choice:
    each = settings.steps_each or ceil(request.steps / len(settings.turns))
    stage = min(request.step // each, len(settings.turns) - 1)
    return Choice(uniform.choose(request, history, settings).tasks, settings.turns[stage])
