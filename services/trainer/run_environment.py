"""The environment of a run, which stays the one that the run began with.

Attempts at one task are compared with each other. After a restart of the env server with another seed, or with several
servers of which one has other settings, they would be attempts at different tasks under one name.
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
from mulligan.trainer.journal import journaled_steps, sampled_chains, set_aside
from mulligan.trainer.preflight import check_tasks
from mulligan.trainer.settings import RunSettings

ADVICE = (
    "Start the env server with its former settings and resume the run, or go on in the new environment with `mulligan "
    "resume RUN --accept-environment`"
)
_CHECK_SECONDS = 10.0  # while the caller of a resume waits


class EnvironmentChanged(Exception):
    """The message says in what. No attempt is to blame, so the run ends."""


@dataclass(frozen=True)
class RunTasks:
    """What attempts are made in."""

    info: EnvironmentInfo
    train: list[TaskInfo]
    test: list[TaskInfo]


class KnownEnvironment:
    """An `EnvironmentPort` that compares what a task shows first with what it showed before, where the environment says
    that it is deterministic. `start` raises EnvironmentChanged."""

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
                    f"environment {environment!r} is deterministic, as it says, but task {task_id!r} showed {before!r} "
                    f"first and now {now!r}: its server was started again with another seed or other settings, or one "
                    "of several servers has others"
                )
        return episode


class RunEnvironment:
    """Of one run. `port` is for its attempts."""

    def __init__(self, run_id: str, settings: RunSettings, folder: RunFolder, environment: EnvironmentPort):
        self.port = KnownEnvironment(environment)
        self._run_id = run_id
        self._settings = settings
        self._folder = folder

    async def open(self) -> RunTasks:
        """Raises DomainError UNKNOWN_ENVIRONMENT, or INVALID_SETTING where there is nothing to train or measure on."""
        name = self._settings.environment
        settings = self._settings
        info = await self.port.describe(name)
        train = await self.port.list_tasks(name, Split.TRAIN, settings.rollout.train_tasks)
        test = await self.port.list_tasks(name, Split.TEST, settings.evaluation.tasks)
        check_tasks(info, {Split.TRAIN: train, Split.TEST: test})
        return RunTasks(info, train, test)

    async def settle(self, tasks: RunTasks, notice: Callable[[str], None], *, accept: bool) -> None:
        """Keeps the fingerprint of the environment that a run begins in. Raises EnvironmentChanged when it goes on in
        another one, unless that is to be accepted."""
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
        """That it is still the one that the run began in. Raises EnvironmentChanged."""
        info = await self.port.describe(self._settings.environment)
        await self.settle(replace(tasks, info=info), lambda text: None, accept=False)

    async def refuse_another(self) -> None:
        """Before a run is taken up again: raises DomainError ENVIRONMENT_CHANGED. Where it cannot be found out soon, it
        says nothing, and training will."""
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
        """A step whose chains are not all there would be finished with attempts of the new environment."""
        rollout = self._settings.rollout
        journal = self._folder.journal
        for step in journaled_steps(journal)[-1:]:
            if sampled_chains(journal, step) < rollout.tasks_per_step * rollout.rollouts_per_task:
                set_aside(journal, step)
