"""The episode table: exactly-once steps, leases, capacity. Knows neither gRPC nor any particular environment.

All of it runs on one event loop and needs no locks; environment code alone runs elsewhere, on the threads of
`workers.py`, and of each episode one call at a time: what arrives meanwhile is held back. An episode is live until it
is over. Only live episodes take a place; the answers of one that is over stay repeatable until its lease ends, it is
ended, or newer ones that are over push it out.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import structlog

from mulligan.common.errors import DomainError, Reason
from mulligan.common.suggest import did_you_mean
from mulligan.common.types import EpisodeStep
from mulligan.env import calls
from mulligan.env.base import Environment, Episode, close, fork
from mulligan.env.calls import StartResult
from mulligan.env.records import (
    EpisodeRecord,
    Latch,
    RunningStep,
    StepRequest,
    check_place,
    conflict,
    episode_of,
    in_use,
)
from mulligan.env.workers import FunctionJob, Job, TimedOut, WorkerPool

log = structlog.get_logger()
_RETRY_AFTER = timedelta(seconds=0.5)


@dataclass(frozen=True, slots=True)
class EpisodeLimits:
    """`max_finished` bounds the stored answers of episodes that are over; `max_remembered` the ids of expired ones."""

    max_episodes: int = 4096
    max_finished: int = 4096
    max_remembered: int = 100_000
    lease_seconds: float = 600.0
    remember_seconds: float = 3600.0


StepAnswer = EpisodeStep | DomainError


class EpisodeTable:
    def __init__(
        self,
        environments: dict[str, Environment],
        workers: WorkerPool,
        limits: EpisodeLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.environments = environments
        self.workers = workers
        self.limits = limits or EpisodeLimits()
        self._clock = clock
        self._live: OrderedDict[str, EpisodeRecord] = OrderedDict()  # both: longest untouched first
        self._finished: OrderedDict[str, EpisodeRecord] = OrderedDict()
        self._expired: dict[str, float] = {}  # id → when; oldest first
        self._closing: set[asyncio.Future[None]] = set()

    @property
    def live_count(self) -> int:
        return len(self._live)

    def environment(self, name: str) -> Environment:
        if name not in self.environments:
            offered = ", ".join(sorted(self.environments))
            near = did_you_mean(name, self.environments)
            message = f"no environment {name!r} here{near}; there are: {offered}"
            raise DomainError(Reason.UNKNOWN_ENVIRONMENT, message)
        return self.environments[name]

    async def start(self, episode_id: str, environment: str, task_id: str) -> StartResult:
        """Repeatable; a start under way is waited for. The id of a copy is in use for something else."""
        self.expire()
        record = self._find(episode_id)
        if record is None:
            record = self._admit(episode_id, environment, task_id)
        elif record.source is not None or (record.environment, record.task_id) != (environment, task_id):
            raise in_use(episode_id, record)
        return await asyncio.shield(record.started)

    def _admit(self, episode_id: str, name: str, task_id: str) -> EpisodeRecord:
        environment = self.environment(name)
        if environment.info.unavailable:
            raise DomainError(Reason.ENVIRONMENT_UNAVAILABLE, f"{name!r}: {environment.info.unavailable}")
        record = self._place(episode_id, name, task_id)

        def done(result: object) -> None:
            if isinstance(result, tuple):
                self._begun(record, *result)
            else:
                self._not_begun(episode_id, record, calls.start_error(name, task_id, result))

        job = FunctionJob(lambda: calls.kept(calls.begin(environment, task_id), job), done)
        self.workers.submit([job])
        return record

    async def fork(self, episode_id: str, step_index: int, new_episode_id: str) -> StartResult:
        """What the agent saw last, and whose turn it is. Repeatable; a fork under way is waited for."""
        self.expire()
        record = self._find(new_episode_id)
        if record is None:
            record = self._copy(episode_id, step_index, new_episode_id)
        elif record.source != (episode_id, step_index):
            raise in_use(new_episode_id, record)
        return await asyncio.shield(record.started)

    def _copy(self, episode_id: str, step_index: int, new_episode_id: str) -> EpisodeRecord:
        source = self._find(episode_id)
        if source is None or (source.episode is None and not source.finished):
            raise self._unknown(episode_id)
        if not self.environment(source.environment).info.can_fork:
            raise DomainError(Reason.FORK_UNSUPPORTED, f"episodes of {source.environment!r} cannot be forked")
        check_place(source, episode_id, step_index)
        record = self._place(new_episode_id, source.environment, source.task_id)
        record.source = (episode_id, step_index)
        record.actions = list(source.actions)
        record.answers = list(source.answers)
        last = source.answers[-1] if source.answers else source.started.result()

        def done(result: object) -> None:
            if isinstance(result, tuple):
                self._begun(record, *result)
            else:
                self._not_begun(new_episode_id, record, calls.fork_error(source.environment, episode_id, result))
                if isinstance(result, TimedOut) and source.episode is not None:
                    source.episode = calls.stuck(source.episode, result)
            self._returned(source)

        begun = StartResult(last.observation, last.player)
        job = FunctionJob(lambda: calls.kept((fork(episode_of(source)), begun), job), done)
        if self._may_call(source, job):
            self.workers.submit([job])
        return record

    def _place(self, episode_id: str, name: str, task_id: str) -> EpisodeRecord:
        """A new record; raises CAPACITY_REACHED."""
        if len(self._live) >= self.limits.max_episodes:
            message = f"{len(self._live)} episodes are live, which is this server's limit"
            raise DomainError(Reason.CAPACITY_REACHED, message, retry_after=_RETRY_AFTER)
        players = self.environments[name].info.player_count
        record = EpisodeRecord(
            episode_id, name, task_id, players, asyncio.get_running_loop().create_future(), self._clock()
        )
        self._live[episode_id] = record
        self._expired.pop(episode_id, None)
        return record

    def _begun(self, record: EpisodeRecord, episode: Episode, begun: StartResult) -> None:
        record.episode = episode
        record.started.set_result(begun)
        if record.released:  # ended meanwhile
            self._release(record)

    def _not_begun(self, episode_id: str, record: EpisodeRecord, error: DomainError) -> None:
        if self._live.get(episode_id) is record:
            del self._live[episode_id]
        record.started.set_exception(error)
        record.started.exception()  # retrieved here: every caller may have gone

    async def step(self, requests: Sequence[StepRequest], max_wait: float | None = None) -> list[StepAnswer | None]:
        """An answer per request, in order: None for a step that still runs after `max_wait` seconds."""
        self.expire()
        jobs: list[Job] = []
        found: list[StepAnswer | RunningStep] = []
        for request in requests:
            try:
                found.append(self._take(request, jobs))
            except DomainError as error:
                found.append(error)
        if jobs:
            self.workers.submit(jobs)
        running = [step for step in found if isinstance(step, RunningStep) and step.answer is None]
        if running:
            latch = Latch(asyncio.get_running_loop().create_future(), len(running))
            for step in running:
                step.latches.append(latch)
            await asyncio.wait((latch.opened,), timeout=max_wait) if max_wait is not None else await latch.opened
        return [step.answer if isinstance(step, RunningStep) else step for step in found]

    def _take(self, request: StepRequest, jobs: list[Job]) -> EpisodeStep | RunningStep:
        """The stored answer, or the running step; adds a job when the step is a new one."""
        record = self._find(request.episode_id)
        if record is None or (record.episode is None and not record.finished):
            raise self._unknown(request.episode_id)
        index = request.step_index
        played = len(record.answers)
        if index < played:
            if hash(request.action) != record.actions[index]:
                raise conflict(request)
            return record.answers[index]
        if record.finished:
            raise DomainError(Reason.EPISODE_FINISHED, f"episode {request.episode_id!r} was over after {played} steps")
        if index > played:
            message = f"step {index} of episode {request.episode_id!r} came before step {played}"
            raise DomainError(Reason.STEP_SKIPPED, message, next_step_index=played)
        if record.running is None:
            record.running = RunningStep(record, request.action, self._played)
            if self._may_call(record, record.running):
                jobs.append(record.running)
        elif record.running.action != request.action:
            raise conflict(request)
        return record.running

    def _played(self, step: RunningStep, result: object) -> None:
        record = step.record
        answer = result if isinstance(result, EpisodeStep) else calls.failed_step(result)
        record.running = None
        record.actions.append(hash(step.action))
        record.answers.append(answer)
        self._returned(record)
        if answer.done:
            if not record.released:
                self._release(record)
            record.episode = None
            if self._live.get(record.episode_id) is record:
                del self._live[record.episode_id]
                self._finished[record.episode_id] = record
                record.touched = self._clock()
        step.answer = answer
        for latch in step.latches:
            latch.count_down()

    def _may_call(self, record: EpisodeRecord, job: Job) -> bool:
        """Whether the job may run now; otherwise it is held back until the call that is under way has returned."""
        if record.calling:
            record.held.append(job)
            return False
        record.calling = True
        return True

    def _returned(self, record: EpisodeRecord) -> None:
        record.calling = bool(record.held)
        if record.held:
            self.workers.submit([record.held.pop(0)])

    def _release(self, record: EpisodeRecord) -> None:
        """Frees what the episode holds: on a worker's thread, after the calls into it that are under way. One that was
        given up may still run then."""
        record.released = True
        episode = record.episode
        if episode is None or not hasattr(episode, "close"):
            return
        closed = asyncio.get_running_loop().create_future()
        self._closing.add(closed)

        def done(result: object) -> None:
            if isinstance(result, BaseException):
                log.warning("an episode was not closed", environment=record.environment, error=calls.describe(result))
            self._returned(record)
            self._closing.discard(closed)
            closed.set_result(None)

        if self._may_call(record, job := FunctionJob(lambda: close(episode), done)):
            self.workers.submit([job])

    def end(self, episode_id: str) -> None:
        self._finished.pop(episode_id, None)
        record = self._live.pop(episode_id, None)
        if record is not None:
            self._release(record)

    async def close(self, seconds: float) -> None:
        """Ends every episode and closes the environments; waits for what they hold to be freed, at most this long.
        Calls under way are given up."""
        for episode_id, record in tuple(self._live.items()):
            record.calling = False
            self.end(episode_id)
        try:
            async with asyncio.timeout(seconds):
                if self._closing:
                    await asyncio.wait(self._closing)
                for name, environment in self.environments.items():
                    await self._close_environment(name, environment)
        except TimeoutError:
            log.warning("not all episodes and environments were closed", seconds=seconds)

    async def _close_environment(self, name: str, environment: Environment) -> None:
        try:
            await self.workers.run(lambda: close(environment))
        except Exception as error:  # noqa: BLE001 - foreign code may raise anything
            log.warning("an environment was not closed", environment=name, error=calls.describe(error))

    def expire(self) -> None:
        """Forgets what was not called for longer than its lease. Every call does this; each episode is met once."""
        now = self._clock()
        for records in (self._live, self._finished):
            while records:
                episode_id = next(iter(records))
                record = records[episode_id]
                surplus = records is self._finished and len(records) > self.limits.max_finished
                if now - record.touched <= self.limits.lease_seconds and not surplus:
                    break
                if record.busy:
                    record.touched = now
                    records.move_to_end(episode_id)
                else:
                    del records[episode_id]
                    if records is self._live:
                        self._release(record)
                    self._expired.pop(episode_id, None)
                    self._expired[episode_id] = now
        while self._expired:
            episode_id = next(iter(self._expired))
            too_old = now - self._expired[episode_id] > self.limits.remember_seconds
            if not too_old and len(self._expired) <= self.limits.max_remembered:
                break
            del self._expired[episode_id]

    async def keep_expiring(self, every_seconds: float) -> None:
        """Frees what idle episodes hold also while nobody calls. Runs until it is cancelled."""
        while True:
            await asyncio.sleep(every_seconds)
            self.expire()

    def _find(self, episode_id: str) -> EpisodeRecord | None:
        records = self._live if episode_id in self._live else self._finished
        record = records.get(episode_id)
        if record is not None:
            record.touched = self._clock()
            records.move_to_end(episode_id)
        return record

    def _unknown(self, episode_id: str) -> DomainError:
        if episode_id in self._expired:
            lease = f"idle for longer than its lease of {self.limits.lease_seconds:g} s"
            return DomainError(Reason.EPISODE_EXPIRED, f"episode {episode_id!r} was {lease}, or over long ago")
        return DomainError(Reason.UNKNOWN_EPISODE, f"episode {episode_id!r} was not started here, or was lost or ended")
