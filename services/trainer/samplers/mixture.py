"""Exact shares of tasks, by environment and by the beginning of a task's id.

    [sampler]
    name = "mixture"
    shares = { "frozenlake-3x3" = 0.9, "unanswerable" = 0.1 }

A key is `ENVIRONMENT`, or `ENVIRONMENT:PREFIX` for the tasks whose ids begin so; without `ENVIRONMENT`, that of the
run. A task belongs to the longest prefix that fits. Tasks that no key fits are not sampled. Shares count in proportion
to their sum.

The shares are kept by a schedule, not by chance: after any number n of tasks, a part with share s has been given more
than s·n − 1 and less than s·n + 1 of them. Within a part, tasks come as in `uniform`. A task that is replaced is
replaced by one of its part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import ceil
from typing import Annotated

from pydantic import Field

from mulligan.common.suggest import did_you_mean
from mulligan.trainer.samplers import Choice, History, SamplerSettings, Task, TaskRequest, UnfitSetting, others
from mulligan.trainer.seeds import in_passes

_SEPARATOR = ":"


class Settings(SamplerSettings):
    name: str = "mixture"
    shares: dict[str, Annotated[float, Field(gt=0)]] = Field(min_length=1)

    @property
    def environments(self) -> Mapping[str, str]:
        names = (key.partition(_SEPARATOR)[0] for key in self.shares)
        return {name: "sampler.shares" for name in names if name}


def choose(request: TaskRequest, history: History, settings: Settings) -> Choice:
    keys = sorted(settings.shares)  # the wire has no order
    parts = _parts(request, keys)
    sampled = [sum(len(history.of(task)) for task in tasks) for tasks in parts]
    instead = [sum(history.replacements[task] for task in tasks) for tasks in parts]
    given = [count - replaced for count, replaced in zip(sampled, instead, strict=True)]
    if request.round:
        part_of = {task: part for part, tasks in enumerate(parts) for task in tasks}
        order = [part_of[task] for task in request.replaced]
    else:
        weights = [Fraction(str(settings.shares[key])) for key in keys]
        order = schedule([weight / sum(weights) for weight in weights], given, request.count)
    streams = []
    for part, (key, tasks) in enumerate(zip(keys, parts, strict=True)):
        count = order.count(part)
        if request.overlapping and request.round:
            streams.append(iter(others(tasks, request, history, count, "replaced", key)))
            continue
        start = given[part] if request.overlapping else sampled[part]
        passes = in_passes(len(tasks), start, count, request.seed, key)
        streams.append(iter([tasks[index] for index in passes]))
    return Choice([next(streams[part]) for part in order])


def schedule(shares: Sequence[Fraction], given: Sequence[int], count: int) -> list[int]:
    """The part that each of the next `count` tasks is of. `shares` sum to 1; `given` is how many tasks each part has
    had.

    A part with share s may have its (k + 1)-th task as soon as it had fewer than s·n of n, and must have it when s·n
    reaches k + 1. The earliest deadline comes first; so no deadline is missed (Steiner and Yeomans, 1993).
    """
    counts = list(given)
    order = []
    for total in range(sum(counts) + 1, sum(counts) + count + 1):
        due = [part for part, share in enumerate(shares) if counts[part] < share * total]
        chosen = min(due, key=lambda part: (ceil((counts[part] + 1) / shares[part]), -shares[part]))
        counts[chosen] += 1
        order.append(chosen)
    return order


def _parts(request: TaskRequest, keys: Sequence[str]) -> list[list[Task]]:
    """The tasks of each key. Raises UnfitSetting."""
    places = [_place(key, request.environment) for key in keys]
    if request.environment not in (environment for environment, _ in places):
        near = did_you_mean(request.environment, (environment for environment, _ in places))
        raise UnfitSetting("shares", f"it has no share of {request.environment!r}, the environment of the run{near}")
    parts: list[list[Task]] = [[] for _ in keys]
    for environment, listed in request.tasks.items():
        fitting = [(prefix, part) for part, (name, prefix) in enumerate(places) if name == environment]
        fitting.sort(key=lambda pair: -len(pair[0]))
        for info in listed:
            part = next((part for prefix, part in fitting if info.task_id.startswith(prefix)), None)
            if part is not None:
                parts[part].append(Task(environment, info.task_id))
    for key, (environment, prefix), tasks in zip(keys, places, parts, strict=True):
        if not tasks:
            ids = [info.task_id for info in request.tasks[environment]]
            raise UnfitSetting("shares", _empty(key, environment, prefix, ids))
    return parts


def _place(key: str, own: str) -> tuple[str, str]:
    """The environment and the prefix of a key."""
    environment, _, prefix = key.partition(_SEPARATOR)
    return environment or own, prefix


def _empty(key: str, environment: str, prefix: str, ids: Sequence[str]) -> str:
    fitting = [task_id for task_id in ids if task_id.startswith(prefix)]
    if fitting:
        return f"{key!r} has no task: all {len(fitting)} of its tasks are those of longer prefixes or of an equal key"
    near = did_you_mean(prefix, dict.fromkeys(task_id[: len(prefix)] for task_id in ids))
    return (
        f"{key!r} has no task: none of the {len(ids)} training tasks of {environment!r} begins with {prefix!r}{near} "
        f"(rollout.train_tasks may leave some out; the first is {ids[0]!r})"
    )
