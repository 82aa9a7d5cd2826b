"""Keeps a run in the environment that it began with.

Attempts at one task are compared with each other. If the env server restarts with another seed, or one of several
servers has other settings, the same task id means another task. Then the run must end.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace

from mulligan.common.errors import CallFailed, DomainError, Reason, ServiceUnavailable
from mulligan.common.types import EnvironmentInfo, Split, TaskInfo
from mulligan.trainer.fingerprint import Fingerprint, brief, fingerprint
from mulligan.trainer.folder import RunFolder
from mulligan.trainer.interfaces import EnvironmentPort, EpisodeHandle
from mulligan.trainer.journal import journaled_steps, sampled_experiences, set_aside
from mulligan.trainer.preflight import check_tasks
from mulligan.trainer.settings import RunSettings

ADVICE = (
    "Start the env server with its former settings and resume the run, or go on in the new environment with `mulligan "
    "resume RUN --accept-environment`"
)
_CHECK_SECONDS = 10.0  # while the caller of a resume waits


class EnvironmentChanged(Exception):
    """The environment is not the one that the run began with; the message says what differs. It ends the run."""


@dataclass(frozen=True)
class RunTasks:
    """What the environment says of itself, and the tasks that the run uses."""

    info: EnvironmentInfo
    train: list[TaskInfo]
    test: list[TaskInfo]


class KnownEnvironment:
    """An `EnvironmentPort` that compares each task's first observation with the one before, in a deterministic
    environment. `start` raises EnvironmentChanged when they differ."""

    def __init__(self, environment: EnvironmentPort):
        self._environment = environment
        self._deterministic = False
        self._first: dict[str, str] = {}

    async def describe(self, environment: str) -> EnvironmentInfo:
        info = await self._environment.describe(environment)
        self._deterministic = info.deterministic
        return info

    async def list_tasks(self, environment: str, split: Split, limit: int) -> list[TaskInfo]:
        return await self._environment.list_tasks(environment, split, limit)

    async def start(self, environment: str, task_id: str, episode_id: str) -> EpisodeHandle:
        episode = await self._environment.start(environment, task_id, episode_id)
        if self._deterministic:
            now = brief(episode.observation)
            before = self._first.setdefault(task_id, now)
            if now != before:
                with contextlib.suppress(DomainError, CallFailed):
                    await episode.end()
                raise EnvironmentChanged(
                    f"environment {environment!r} says that it is deterministic, but task {task_id!r} showed "
                    f"{before!r} first and now {now!r}: its server has restarted with another seed or other settings, "
                    "or one of several servers has others"
                )
        return episode


class RunEnvironment:
    """The environment of one run. Attempts use `port`.

    `open` reads the description and tasks. `settle` compares them with the fingerprint in the run's folder, or writes
    it at the run's start. `check` does the same after each step's sampling, `refuse_another` before a resume.
    """

    def __init__(self, run_id: str, settings: RunSettings, folder: RunFolder, environment: EnvironmentPort):
        self.port = KnownEnvironment(environment)
        self._run_id = run_id
        self._settings = settings
        self._folder = folder

    async def open(self) -> RunTasks:
        """Raises DomainError UNKNOWN_ENVIRONMENT, or INVALID_SETTING for an environment without tasks."""
        name = self._settings.environment
        settings = self._settings
        info = await self.port.describe(name)
        train = await self.port.list_tasks(name, Split.TRAIN, settings.rollout.train_tasks)
        test = await self.port.list_tasks(name, Split.TEST, settings.evaluation.tasks)
        check_tasks(info, {Split.TRAIN: train, Split.TEST: test})
        return RunTasks(info, train, test)

    async def settle(self, tasks: RunTasks, notice: Callable[[str], None], *, accept: bool) -> None:
        """Writes the fingerprint at the start of a run and compares it later.

        Raises EnvironmentChanged on differences, unless `accept`: then the new fingerprint replaces the old one.
        """
        now = await self._fingerprint(tasks)
        before = self._folder.environment()
        differences = before.differences(now) if before is not None else []
        if differences and not accept:
            raise EnvironmentChanged(self._told(differences))
        if differences:
            notice(f"the run goes on in another environment, which was accepted: {'; '.join(differences)}")
            self._forget_unfinished()
        if before is None or differences:
            self._folder.write_environment(now)

    async def check(self, tasks: RunTasks) -> None:
        """Compares the environment again. Raises EnvironmentChanged."""
        info = await self.port.describe(self._settings.environment)
        await self.settle(replace(tasks, info=info), lambda text: None, accept=False)

    async def refuse_another(self) -> None:
        """Called before a resume. Raises DomainError ENVIRONMENT_CHANGED when the environment differs.

        If the comparison fails or takes too long, nothing is raised: training compares again.
        """
        before = self._folder.environment()
        if before is None:
            return
        try:
            async with asyncio.timeout(_CHECK_SECONDS):
                differences = before.differences(await self._fingerprint(await self.open()))
        except (TimeoutError, DomainError, CallFailed, ServiceUnavailable):
            return
        if differences:
            name = self._settings.environment
            message = f"{self._told(differences)}. {ADVICE}"
            raise DomainError(Reason.ENVIRONMENT_CHANGED, message, environment=name)

    async def _fingerprint(self, tasks: RunTasks) -> Fingerprint:
        return await fingerprint(self.port, tasks.info, {Split.TRAIN: tasks.train, Split.TEST: tasks.test})

    def _told(self, differences: list[str]) -> str:
        name = self._settings.environment
        return f"environment {name!r} is not the one that the run began in: {'; '.join(differences)}"

    def _forget_unfinished(self) -> None:
        """Sets the last step's journal aside if it is incomplete: it must not mix attempts in two environments."""
        rollout = self._settings.rollout
        journal = self._folder.journal
        for step in journaled_steps(journal)[-1:]:
            if sampled_experiences(journal, step) < rollout.tasks_per_step * rollout.rollouts_per_task:
                set_aside(journal, step)
