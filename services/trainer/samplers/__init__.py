"""Samplers, a module each: which tasks a training step plays, how many of each environment, and for how many turns.

A module exports `Settings`, a `SamplerSettings` (the table `[sampler]` of a run), and

    choose(request: TaskRequest, history: History, settings: Settings) -> Choice

a pure function: with equal arguments it chooses the same tasks. The run journals what was chosen, and the history is
what the journal tells of earlier steps. So a resumed run goes on as if nothing had been.

In a run with `rollout.max_staleness` = S, up to S + 1 steps are sampled at once. The history of step j has the steps
before j - S as a whole: these are certainly trained when j begins. Of the S steps before j it has the tasks of round 0
without rewards (`rewards` is empty), whether or not they are known by then. So a choice never depends on what is ready
first.

`sampler.name` is the name of a module here, of an entry point of the group `mulligan.samplers`, or of any importable
module. `choose` raises `UnfitSetting` for a setting that does not fit the tasks. It is called once before the run
begins, so that such a setting is refused then.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle, islice, takewhile
from statistics import fmean
from typing import NamedTuple

import msgspec
from pydantic import ConfigDict

from mulligan.common.plugins import Plugins, PluginSettings
from mulligan.common.types import TaskInfo
from mulligan.trainer.seeds import in_passes


class SamplerSettings(PluginSettings):
    """What every sampler has. A sampler's own `Settings` add to it."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str

    @property
    def environments(self) -> Mapping[str, str]:
        """The environments that the sampler takes tasks of, each with the setting that names it. The run opens them
        beside its own."""
        return {}


SAMPLERS = Plugins(
    noun="sampler",
    package=__name__,
    group="mulligan.samplers",
    exports=("Settings", "choose"),
    default="uniform",
    settings=SamplerSettings,
    reserved=("settings",),  # the field that holds them on the wire
)


class UnfitSetting(ValueError):
    """A setting of the sampler does not fit the tasks of the run."""

    def __init__(self, setting: str, problem: str):
        super().__init__(f"sampler.{setting}: {problem}")
        self.field = f"sampler.{setting}"


class Task(NamedTuple):
    environment: str
    task_id: str


@dataclass(frozen=True)
class TaskRequest:
    """What a step needs: `count` tasks.

    `step` counts from 0 to `steps` - 1. `tasks` are the training tasks of each environment of the run, its own first.
    In round 0 `count` is `tasks_per_step`. In later rounds it is the number of `replaced` tasks: those of this step
    whose groups gave no signal. `success_threshold` is the reward that solves a task. `overlapping` is S, the number of
    earlier steps of which the history has the first tasks alone.
    """

    step: int
    steps: int
    seed: int
    tasks_per_step: int
    tasks: Mapping[str, Sequence[TaskInfo]]
    round: int = 0
    replaced: tuple[Task, ...] = ()
    success_threshold: float = 1.0
    overlapping: int = 0

    @property
    def count(self) -> int:
        return len(self.replaced) if self.round else self.tasks_per_step

    @property
    def environment(self) -> str:
        """The run's own."""
        return next(iter(self.tasks))


@dataclass(frozen=True)
class Choice:
    """`count` tasks, which may repeat. `horizon` is how many turns an episode has at most, beside the limit of its
    environment; None: only that limit."""

    tasks: Sequence[Task]
    horizon: int | None = None


class Group(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A task that was sampled, and the reward of the first sample of each member; None where it has none. No rewards
    at all: the group may still be sampled."""

    environment: str
    task_id: str
    rewards: tuple[float | None, ...]

    @property
    def task(self) -> Task:
        return Task(self.environment, self.task_id)


@dataclass(frozen=True)
class Round:
    """What was sampled at a time. A step has one round with `number` 0, and others where groups were replaced."""

    step: int
    number: int
    groups: tuple[Group, ...]
    horizon: int | None = None

    @cached_property
    def mean_reward(self) -> float | None:
        """Of the first samples; None if none of them has a reward."""
        found = [reward for group in self.groups for reward in group.rewards if reward is not None]
        return fmean(found) if found else None


class History:
    """The rounds of a run so far, in order: those of all earlier steps, and the earlier ones of the present step.

    `replacements` is how often each task was chosen in place of another, in rounds after the first of a step.
    """

    def __init__(self) -> None:
        self.rounds: list[Round] = []
        self.replacements: Counter[Task] = Counter()
        self._groups: defaultdict[Task, list[Group]] = defaultdict(list)

    def add(self, one: Round) -> None:
        self.rounds.append(one)
        for group in one.groups:
            self._groups[group.task].append(group)
        if one.number:
            self.replacements.update(group.task for group in one.groups)

    def drop(self, count: int) -> None:
        """Takes back the last `count` rounds."""
        for one in [self.rounds.pop() for _ in range(count)]:
            for group in one.groups:
                self._groups[group.task].pop()
            if one.number:
                self.replacements.subtract(group.task for group in one.groups)

    def of(self, task: Task) -> Sequence[Group]:
        """How the task was sampled, each time, in order."""
        return self._groups.get(task, ())

    def chosen_in(self, step: int) -> Counter[Task]:
        """How often the rounds of the last step chose each task; nothing if `step` is another one."""
        rounds = takewhile(lambda one: one.step == step, reversed(self.rounds))
        return Counter(group.task for one in rounds for group in one.groups)


def others(tasks: Sequence[Task], request: TaskRequest, history: History, count: int, *seed: object) -> list[Task]:
    """`count` of these tasks in place of replaced ones, in an order of the step's own. Those that the step has chosen
    already come only where there are no others.

    For steps that overlap: how many tasks the steps beside this one replace is not known, so replaced tasks cannot be
    followed by the next ones of a sequence that all steps share.
    """
    chosen = history.chosen_in(request.step)
    order = [tasks[index] for index in in_passes(len(tasks), 0, len(tasks), request.seed, *seed, request.step)]
    order.sort(key=lambda task: chosen[task])  # stable
    return list(islice(cycle(order), count))
