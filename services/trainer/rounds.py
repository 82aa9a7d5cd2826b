"""The rounds of a step's sampling: the sampler chooses tasks, their groups are played, and groups without signal are
replaced by others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import index
from types import ModuleType

from mulligan.common.errors import DomainError, Reason
from mulligan.common.experience import Experience
from mulligan.common.suggest import did_you_mean
from mulligan.common.types import TaskInfo
from mulligan.trainer.foreign import blaming
from mulligan.trainer.history import rounds_of
from mulligan.trainer.journal import GroupsReplaced, StepJournal, StepStarted, slot_of
from mulligan.trainer.samplers import SAMPLERS, Choice, Group, History, Round, Task, TaskRequest, UnfitSetting
from mulligan.trainer.settings import RunSettings
from mulligan.trainer.step import StepRunner


class SamplerFailed(RuntimeError):
    """The sampler's own code raised, or chose what there is not; the message says which."""


class Chooser:
    """Asks the run's sampler for tasks. `tasks` are the training tasks of each environment, the run's own first.
    `history` has those of the steps before `trained`.

    `begin` and `add` tell of the steps that are sampled now, `settle` of those that are trained. A choice for step j
    knows the steps before j - S as a whole, of the S steps before j the first tasks, and j's own rounds. S is
    `rollout.max_staleness`.
    """

    def __init__(
        self, settings: RunSettings, tasks: Mapping[str, Sequence[TaskInfo]], history: History, trained: int = 0
    ):
        self._history = history  # of the steps before `trained` - S
        self._rounds: dict[int, list[Round]] = {}  # of later ones, as far as they were sampled
        self._first: dict[int, Round] = {}  # the first tasks of these steps
        self._overlapping = settings.rollout.max_staleness
        for one in [one for one in history.rounds if one.step >= trained - self._overlapping]:
            self._rounds.setdefault(one.step, []).append(one)
            if one.number == 0:
                self._first[one.step] = _without_rewards(one)
        history.drop(sum(map(len, self._rounds.values())))
        self._settings = settings
        self._tasks = tasks
        self._known = {Task(name, info.task_id) for name, listed in tasks.items() for info in listed}
        self._sampler: ModuleType = SAMPLERS.find(settings.sampler.name)

    def begin(self, started: StepStarted) -> None:
        """A step begins. Steps begin in order."""
        (first,) = rounds_of([started], [], self._settings.environment)
        self._first[started.step] = first
        self._rounds[started.step] = []

    def add(self, one: Round) -> None:
        """A round was sampled."""
        self._rounds[one.step].append(one)

    def settle(self, trained: int) -> None:
        """The steps before `trained` are trained, and no choice is made for them any more."""
        for step in sorted(step for step in self._rounds if step < trained - self._overlapping):
            for one in self._rounds.pop(step):
                self._history.add(one)
            del self._first[step]

    def _beside(self, step: int) -> list[Round]:
        """What a choice for this step knows besides the history."""
        known = []
        for earlier in sorted(self._rounds):
            if earlier < step - self._overlapping or earlier == step:
                known += self._rounds[earlier]
            elif earlier < step:
                known.append(self._first[earlier])
        return known

    def choose(self, step: int, number: int = 0, replaced: tuple[Task, ...] = ()) -> Choice:
        """The tasks of a round. Raises SamplerFailed, and DomainError INVALID_SETTING for a setting of the sampler that
        does not fit the tasks."""
        settings = self._settings
        request = TaskRequest(
            step=step,
            steps=settings.steps,
            seed=settings.seed,
            tasks_per_step=settings.rollout.tasks_per_step,
            tasks=self._tasks,
            round=number,
            replaced=replaced,
            success_threshold=settings.algorithm.success_threshold,
            overlapping=self._overlapping,
        )
        beside = self._beside(step)
        for one in beside:
            self._history.add(one)
        try:
            with blaming(f"sampler {settings.sampler.name!r}", SamplerFailed, (UnfitSetting,)):
                choice = _plain(self._sampler.choose(request, self._history, settings.sampler))
                problem = self._problem(choice, request.count)
        except UnfitSetting as error:
            raise DomainError(Reason.INVALID_SETTING, str(error), field=error.field) from error
        finally:
            self._history.drop(len(beside))
        if problem:
            raise SamplerFailed(f"sampler {settings.sampler.name!r} chose {problem}")
        return choice

    def named(self, choice: Choice) -> tuple[list[str], list[str]]:
        """The ids of the tasks, and their environments; none if all are the run's own."""
        names = [task.environment for task in choice.tasks]
        several = set(names) != {self._settings.environment}
        return [task.task_id for task in choice.tasks], names if several else []

    def _problem(self, choice: Choice, count: int) -> str:
        """What is wrong with a choice; empty if nothing is."""
        if len(choice.tasks) != count:
            return f"{len(choice.tasks)} tasks, and the step needs {count}"
        if choice.horizon is not None and choice.horizon < 1:
            return f"a horizon of {choice.horizon} turns; expected at least 1, or None"
        for task in choice.tasks:
            if task not in self._known:
                name, task_id = task
                near = did_you_mean(task_id, (info.task_id for info in self._tasks.get(name, ())))
                return f"task {task_id!r} of environment {name!r}, which is no training task of the run{near}"
        return ""


def _plain(choice: Choice) -> Choice:
    """The choice in the types that a journal takes, whatever a sampler has made it of."""
    tasks = [Task(*map(str, task)) for task in choice.tasks]
    return Choice(tasks, None if choice.horizon is None else index(choice.horizon))


def _without_rewards(one: Round) -> Round:
    return Round(one.step, one.number, tuple(Group(*group.task, ()) for group in one.groups), one.horizon)


@dataclass(frozen=True)
class SampledStep:
    """What a step sampled: all its experiences, those that are trained on, its rounds, and metrics of these."""

    experiences: list[Experience]
    kept: list[Experience]
    rounds: list[Round]
    metrics: dict[str, float]

    @property
    def replaced(self) -> list[Experience]:
        """Those that are not trained on."""
        kept = {experience.experience_id for experience in self.kept}
        return [experience for experience in self.experiences if experience.experience_id not in kept]


async def sample_rounds(runner: StepRunner, journal: StepJournal, chooser: Chooser) -> SampledStep:
    """Plays the rounds of the step that the journal says was started. What the journal has is neither chosen nor
    sampled again."""
    started = journal.started
    assert started is not None
    rollout = runner.settings.rollout
    own = runner.settings.environment
    experiences: list[Experience] = []
    kept: dict[int, list[Experience]] = {}  # by slot
    records: list[StepStarted | GroupsReplaced] = []
    record: StepStarted | GroupsReplaced | None = started
    while record is not None:
        records.append(record)
        sampled = await runner.sample(
            started.step,
            record.task_ids,
            started.memory_version,
            environments=record.environments,
            first_slot=len(experiences) // rollout.rollouts_per_task,
            horizon=record.horizon,
        )
        experiences += sampled
        for experience in sampled:
            kept.setdefault(slot_of(experience.experience_id), []).append(experience)
        rounds = rounds_of(records, experiences, own)
        chooser.add(rounds[-1])
        record = None
        if len(rounds) <= rollout.replace_rounds:
            silent = [slot for slot, group in kept.items() if not runner.has_signal(group)]
            record = _next_round(journal, chooser, rounds, silent)
        for slot in record.slots if record is not None else ():
            del kept[slot]
    metrics = {}
    if rollout.replace_rounds:
        metrics["replaced_groups"] = float(sum(len(one.groups) for one in rounds[1:]))
    if started.horizon is not None:
        metrics["horizon"] = float(started.horizon)
    return SampledStep(experiences, [experience for group in kept.values() for experience in group], rounds, metrics)


def _next_round(
    journal: StepJournal, chooser: Chooser, rounds: Sequence[Round], silent: Sequence[int]
) -> GroupsReplaced | None:
    """Other tasks for the groups without signal, at these slots; None if there are none."""
    number = len(rounds)
    if number not in journal.replaced:
        if not silent:
            return None
        groups = [group for one in rounds for group in one.groups]
        step = rounds[0].step
        choice = chooser.choose(step, number, tuple(groups[slot].task for slot in silent))
        task_ids, environments = chooser.named(choice)
        journal.replace(GroupsReplaced(step, number, list(silent), task_ids, environments, choice.horizon))
    return journal.replaced[number]
