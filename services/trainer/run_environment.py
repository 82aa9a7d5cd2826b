"""Keeps a run in the environments that it began with.

Attempts at one task are compared with each other. If the env server restarts with another seed, or one of several
servers has other settings, the same task id means another task. Then the run must end.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from mulligan.common.errors import CallFailed, DomainError, Reason, ServiceUnavailable
from mulligan.common.types import EnvironmentInfo, Split, TaskInfo
from mulligan.trainer.fingerprint import Fingerprint, brief, fingerprint
from mulligan.trainer.folder import RunFolder
from mulligan.trainer.interfaces import EnvironmentPort, EpisodeHandle
from mulligan.trainer.journal import is_sampled, journaled_steps, set_aside
from mulligan.trainer.preflight import check_tasks, named_by
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


class RunEnvironments:
    """The environments of one run, by name; its own comes first. Attempts use `ports`.

    `open` reads the descriptions and tasks. `settle` compares them with the fingerprints in the run's folder, or writes
    them at the run's start. `check` does the same after each step's sampling, `refuse_others` before a resume.
    """

    def __init__(self, settings: RunSettings, folder: RunFolder, environment: EnvironmentPort):
        self.ports = {name: KnownEnvironment(environment) for name in settings.environments}
        self._settings = settings
        self._folder = folder

    async def open(self) -> dict[str, RunTasks]:
        """Raises DomainError UNKNOWN_ENVIRONMENT for the run's own, and INVALID_SETTING for a further one that is not
        served and for one without tasks."""
        return {name: await self._open(name, field) for name, field in self._settings.environments.items()}

    async def _open(self, name: str, field: str) -> RunTasks:
        port = self.ports[name]
        settings = self._settings
        try:
            with named_by(field):
                info = await port.describe(name)
        except DomainError as error:
            if error.reason is not Reason.UNKNOWN_ENVIRONMENT or name == settings.environment:
                raise
            raise DomainError(Reason.INVALID_SETTING, error.message, field=field) from error
        train = await port.list_tasks(name, Split.TRAIN, settings.rollout.train_tasks)
        test = await port.list_tasks(name, Split.TEST, settings.evaluation.tasks)
        check_tasks(info, {Split.TRAIN: train, Split.TEST: test}, field)
        return RunTasks(info, train, test)

    async def settle(self, tasks: Mapping[str, RunTasks], notice: Callable[[str], None], *, accept: bool) -> None:
        """Writes the fingerprints at the start of a run and compares them later.

        Raises EnvironmentChanged on differences, unless `accept`: then the new fingerprints replace the old ones.
        """
        now = {name: await self._fingerprint(name, listed) for name, listed in tasks.items()}
        before = self._before()
        told = self._differences(before, now)
        if told and not accept:
            raise EnvironmentChanged("; ".join(told))
        if told:
            notice(f"the run goes on in another environment, which was accepted: {'; '.join(told)}")
            self._forget_unfinished()
        if told or now.keys() != before.keys():
            self._write(now)

    async def check(self, tasks: Mapping[str, RunTasks]) -> None:
        """Compares the environments again. Raises EnvironmentChanged."""
        again = {name: replace(known, info=await self.ports[name].describe(name)) for name, known in tasks.items()}
        await self.settle(again, lambda text: None, accept=False)

    async def refuse_others(self) -> None:
        """Called before a resume. Raises DomainError ENVIRONMENT_CHANGED when an environment differs.

        If the comparison fails or takes too long, nothing is raised: training compares again.
        """
        before = self._before()
        try:
            async with asyncio.timeout(_CHECK_SECONDS):
                tasks = await self.open() if before else {}
                now = {name: await self._fingerprint(name, listed) for name, listed in tasks.items()}
        except (TimeoutError, DomainError, CallFailed, ServiceUnavailable):
            return
        if told := self._differences(before, now):
            message = f"{'; '.join(told)}. {ADVICE}"
            raise DomainError(Reason.ENVIRONMENT_CHANGED, message, environment=self._settings.environment)

    async def _fingerprint(self, name: str, tasks: RunTasks) -> Fingerprint:
        return await fingerprint(self.ports[name], tasks.info, {Split.TRAIN: tasks.train, Split.TEST: tasks.test})

    def _before(self) -> dict[str, Fingerprint]:
        own = self._folder.environment()
        return ({self._settings.environment: own} if own else {}) | self._folder.further_environments()

    def _write(self, fingerprints: dict[str, Fingerprint]) -> None:
        further = dict(fingerprints)
        self._folder.write_environment(further.pop(self._settings.environment))
        if further:
            self._folder.write_further_environments(further)

    @staticmethod
    def _differences(before: Mapping[str, Fingerprint], now: Mapping[str, Fingerprint]) -> list[str]:
        """A sentence for each environment that is not as it was."""
        return [
            f"environment {name!r} is not the one that the run began in: {'; '.join(differences)}"
            for name, old in before.items()
            if name in now and (differences := old.differences(now[name]))
        ]

    def _forget_unfinished(self) -> None:
        """Sets the journals of the last steps aside that are incomplete: none may mix attempts in two environments."""
        journal = self._folder.journal
        for step in journaled_steps(journal)[-(self._settings.rollout.max_staleness + 1) :]:
            if not is_sampled(journal, step, self._settings.rollout.rollouts_per_task):
                set_aside(journal, step)
