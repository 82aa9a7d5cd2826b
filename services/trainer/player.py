"""What an evaluation plays with: the policy that is measured, in one environment."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any, TypeVar

from mulligan.common.experience import Sample
from mulligan.common.inference import SamplingParams
from mulligan.common.rewards import reaches
from mulligan.common.tasks import PrioritySlots, gather_in_turn
from mulligan.common.types import EnvironmentInfo, TaskInfo
from mulligan.trainer.harness import Harness, Plan
from mulligan.trainer.metrics import EvaluationProgress
from mulligan.trainer.recall import Reader, Recall
from mulligan.trainer.roles import check_role
from mulligan.trainer.sampling import NamedPolicy
from mulligan.trainer.seeds import derive_seed
from mulligan.trainer.settings import EvaluationSettings, RolloutSettings
from mulligan.trainer.texts import first_system

Item = TypeVar("Item")
Found = TypeVar("Found")
_BEFORE_ROLLOUTS = -1  # priority: those of rollouts are the numbers of their steps


@dataclass
class Player:
    """Plays the measured policy on `tasks`, at most `rollout.concurrency` attempts and texts at a time.

    `name` begins the ids of all that is sampled and is unique for each evaluation. Random numbers derive from `seed`,
    the task and the number of the sample alone. So an evaluation can be repeated, and two attempts with the same task
    and number differ by what the policy is shown. An attempt that was played in this evaluation is not played again.
    Of attempts there are no token ids: a large evaluation keeps all of them to its end.

    `writers` are other policies that write texts, by the protocol for which they do. `tell` gets the progress when
    something has ended. `slots` are shared with the rollouts of training, and evaluations come first; own ones if None.
    `recall` is where first attempts read the memory; None if they read nothing.
    """

    harness: Harness
    tasks: Sequence[TaskInfo]
    settings: EvaluationSettings
    rollout: RolloutSettings
    seed: int
    threshold: float = 1.0
    writers: Mapping[str, NamedPolicy] = field(default_factory=dict)
    name: str = "evaluation"
    tell: Callable[[EvaluationProgress], None] = lambda progress: None
    slots: PrioritySlots | None = None
    recall: Recall | None = None
    progress: EvaluationProgress = field(init=False)
    _slots: PrioritySlots = field(init=False)
    _places: dict[str, int] = field(init=False)
    _systems: dict[str, str] = field(init=False, default_factory=dict)  # of first attempts that read, by task
    _played: dict[tuple[Plan, str], Sample] = field(init=False, default_factory=dict)
    _count: Counter[str] = field(init=False, default_factory=Counter)

    def __post_init__(self) -> None:
        self._slots = self.slots or PrioritySlots(self.rollout.concurrency)
        self._places = {task.task_id: place for place, task in enumerate(self.tasks)}
        self.progress = EvaluationProgress(0, self.threshold)

    async def read(self) -> None:
        """Retrieves what first attempts read. Called before they are played."""
        if self.recall is None:
            return
        readers = [Reader(self.harness, task.task_id, self._new_id(task, "o")) for task in self.tasks]
        found = await self.recall.read(readers, self._slots, _BEFORE_ROLLOUTS)
        for task, one in zip(self.tasks, found, strict=True):
            texts = [entry.text for entry in one.reflections]
            self._systems[task.task_id] = first_system(texts, self.info.prompts)

    def begin(self, protocol: str = "", expected: int = 0) -> None:
        """The progress is now that of this protocol, which samples at least `expected` times."""
        self.progress = EvaluationProgress(expected, self.threshold, protocol)
        self.tell(self.progress)

    async def attempts(self, tasks: Sequence[TaskInfo], samples: int, **how: Any) -> list[Sample]:
        """So many attempts at each of the tasks, in their order; `how` is as in `attempt`."""
        is_plain = all(value is None for value in how.values())  # then the evaluation has played the first ones
        known = min(samples, self.settings.samples) * len(tasks) if is_plain and self.progress.protocol else 0

        def attempt(number: int) -> Coroutine[Any, Any, Sample]:
            return self.attempt(tasks[number // samples], number % samples, **how)

        return await self.each(range(len(tasks) * samples), attempt, known=known)

    async def each(
        self, items: Sequence[Item], play: Callable[[Item], Coroutine[Any, Any, Found]], *, known: int = 0
    ) -> list[Found]:
        """What `play` gives for each item, in their order. They begin in that order as slots become free. The progress
        expects an attempt of each from the start, but for those that are `known`: that were played before."""
        expected = self.progress.asked + len(items) - known
        if expected > self.progress.total:
            self.progress.expected = expected
            self.tell(self.progress)
        return await gather_in_turn(map(play, items), self.rollout.begun_at_once)

    @property
    def info(self) -> EnvironmentInfo:
        return self.harness.info

    def solves(self, sample: Sample) -> bool:
        """Whether its reward reaches the success threshold."""
        return sample.reward is not None and reaches(sample.reward, self.threshold)

    async def attempt(
        self,
        task: TaskInfo,
        sample: int = 0,
        *,
        system: str | None = None,
        shown: str | None = None,
        said: Callable[[str], str] | None = None,
        tries: int = 1,
        again: str = "{observation}",
        until_solved: bool = True,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
    ) -> Sample:
        """Attempt number `sample` at the task. Its reward is None where the infrastructure failed.

        `system` is the system prompt; if None, that of a first attempt: the environment's solver prompt, unless first
        attempts read the memory. `shown` stands in the place of the
        first observation. `said` changes each answer of the policy before the environment reads it. The evaluation's
        settings decide how tokens are sampled, unless `temperature`, `top_p` or `top_k` are given.

        With `tries` above 1, an attempt that did not solve the task is followed by another in the same conversation,
        with `until_solved` false also one that did; `again` is its first message, with `{feedback}` and
        `{observation}`. The reward is that of the last try, `Sample.try_rewards` has all.

        Raises ServiceUnavailable when a service stays unreachable.
        """
        own = self.settings
        sampling = SamplingParams(
            own.temperature if temperature is None else temperature,
            own.top_p if top_p is None else top_p,
            own.top_k if top_k is None else top_k,
            self.rollout.max_tokens,
        )
        seed = derive_seed(self.seed, "evaluation", task.task_id, sample)
        solved_at = self.threshold if until_solved else inf
        plan = Plan(task.task_id, sampling, seed, tries, again, solved_at, shown=shown, said=said)
        system = self._systems.get(task.task_id, self.info.prompts.solver) if system is None else system
        if (plan, system) in self._played:
            return self._played[plan, system]
        blank = Sample.planned(self._new_id(task, f"r{sample}"), "first", system)
        self._asked()
        async with self._slots.held(_BEFORE_ROLLOUTS):
            attempt = replace(await self.harness.attempt(blank, plan), sequences=())
        if self.settings.protocols:  # without any, nothing is played twice
            self._played[plan, system] = attempt
        self._ended(attempt)
        return attempt

    async def write(
        self, task: TaskInfo, purpose: str, user: str, *, system: str = "", temperature: float = 0.7, top_p: float = 1.0
    ) -> Sample:
        """A text: the answer to the message `user`, without its thoughts. `purpose` tells the texts for a task apart.

        It is complete only with Outcome.COMPLETED, and empty where the infrastructure failed. Raises ValueError for a
        `purpose` that is not a name of letters, digits and '_'.
        """
        check_role(purpose, "purpose")
        blank = Sample.planned(self._new_id(task, purpose), purpose, system)
        sampling = SamplingParams(temperature, top_p, max_tokens=self.rollout.max_tokens)
        seed = derive_seed(self.seed, "evaluation", task.task_id, purpose)
        self._asked()
        async with self._slots.held(_BEFORE_ROLLOUTS):
            text = await self.harness.write(blank, user, sampling, seed, self.writers.get(self.progress.protocol))
        self._ended(text)
        return text

    async def observe(self, task: TaskInfo) -> str | None:
        """The first observation of the task. None where the environment failed, which counts as excluded."""
        async with self._slots.held(_BEFORE_ROLLOUTS):
            observation = await self.harness.observe(task.task_id, self._new_id(task, "o"))
        self.progress.excluded += observation is None
        return observation

    def _asked(self) -> None:
        self.progress.asked += 1

    def _ended(self, sample: Sample) -> None:
        self.progress.add(sample)
        self.tell(self.progress)

    def _new_id(self, task: TaskInfo, part: str) -> str:
        """A task's id may be as long as an attempt's, so its place stands for it."""
        sample_id = f"{self.name}-t{self._places[task.task_id]}-{part}"
        self._count[sample_id] += 1
        return sample_id if self._count[sample_id] == 1 else f"{sample_id}-n{self._count[sample_id]}"
