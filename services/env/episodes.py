"""The episode table: exactly-once steps, leases, capacity. Knows neither gRPC nor any particular environment.

All of it runs on one event loop and needs no locks; environment code alone runs elsewhere, on the threads of
`workers.py`. An episode is live until it is over. Only live episodes take a place; the answers of one that is over stay
repeatable until its lease ends, it is ended, or newer ones that are over push it out.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

from services.common.errors import DomainError, Reason
from services.common.types import EpisodeStep, Outcome
from services.env.base import Environment, Episode, StepResult, UnknownTask
from services.env.workers import Job, TimedOut, WorkerPool

_ERROR_LENGTH = 500
_RETRY_AFTER = timedelta(seconds=0.5)


@dataclass(frozen=True, slots=True)
class Limits:
    """`max_finished` bounds the stored answers of episodes that are over; `max_remembered` the ids of expired ones."""

    max_episodes: int = 4096
    max_finished: int = 4096
    max_remembered: int = 100_000
    lease_seconds: float = 600.0
    remember_seconds: float = 3600.0


@dataclass(frozen=True, slots=True)
class StepRequest:
    episode_id: str
    step_index: int
    action: str


StepAnswer = EpisodeStep | DomainError


class _Gate:
    """Opens once all the steps that a call waits for have their answers."""

    __slots__ = ("left", "opened")

    def __init__(self, opened: asyncio.Future[None]):
        self.opened = opened
        self.left = 0

    def pass_one(self) -> None:
        self.left -= 1
        if self.left == 0 and not self.opened.done():
            self.opened.set_result(None)


class _RunningStep:
    __slots__ = ("action", "answer", "gates")

    def __init__(self, action: str):
        self.action = action
        self.answer: EpisodeStep | None = None
        self.gates: list[_Gate] = []


@dataclass(slots=True)
class _Record:
    environment: str
    task_id: str
    started: asyncio.Future[str]  # the first observation
    touched: float
    episode: Episode | None = None
    # Actions as their hashes: Python's are 64 bits with a key of the process, and an action may be megabytes.
    actions: list[int] = field(default_factory=list)
    answers: list[EpisodeStep] = field(default_factory=list)
    running: _RunningStep | None = None

    @property
    def finished(self) -> bool:
        return bool(self.answers) and self.answers[-1].done

    @property
    def busy(self) -> bool:
        return self.running is not None or not self.started.done()


class EpisodeTable:
    def __init__(
        self,
        environments: dict[str, Environment],
        workers: WorkerPool,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.environments = environments
        self.workers = workers
        self.limits = limits or Limits()
        self._clock = clock
        self._live: OrderedDict[str, _Record] = OrderedDict()  # both: longest untouched first
        self._finished: OrderedDict[str, _Record] = OrderedDict()
        self._expired: dict[str, float] = {}  # id → when; oldest first

    @property
    def live_count(self) -> int:
        return len(self._live)

    def environment(self, name: str) -> Environment:
        if name not in self.environments:
            offered = ", ".join(sorted(self.environments))
            raise DomainError(Reason.UNKNOWN_ENVIRONMENT, f"no environment {name!r} here; there are: {offered}")
        return self.environments[name]

    async def start(self, episode_id: str, environment: str, task_id: str) -> str:
        """The first observation. Repeatable; a start under way is waited for."""
        self.expire()
        record = self._find(episode_id)
        if record is None:
            record = self._admit(episode_id, environment, task_id)
        elif (record.environment, record.task_id) != (environment, task_id):
            message = f"episode {episode_id!r} plays {record.task_id!r} of {record.environment!r}"
            raise DomainError(Reason.EPISODE_CONFLICT, message)
        return await asyncio.shield(record.started)

    def _admit(self, episode_id: str, name: str, task_id: str) -> _Record:
        environment = self.environment(name)
        if environment.info.unavailable:
            raise DomainError(Reason.ENVIRONMENT_UNAVAILABLE, f"{name!r}: {environment.info.unavailable}")
        if len(self._live) >= self.limits.max_episodes:
            message = f"{len(self._live)} episodes are live, which is this server's limit"
            raise DomainError(Reason.CAPACITY_REACHED, message, retry_after=_RETRY_AFTER)
        record = _Record(name, task_id, asyncio.get_running_loop().create_future(), self._clock())
        self._live[episode_id] = record
        self._expired.pop(episode_id, None)

        def done(result: object) -> None:
            if isinstance(result, _Started):
                record.episode = result.episode
                record.started.set_result(result.observation)
                return
            if self._live.get(episode_id) is record:
                del self._live[episode_id]
            record.started.set_exception(_start_error(name, task_id, result))
            record.started.exception()  # retrieved here: every caller may have gone

        self.workers.submit([Job(lambda: _begin(environment, task_id), done)])
        return record

    async def step(self, requests: Sequence[StepRequest], max_wait: float | None = None) -> list[StepAnswer | None]:
        """An answer per request, in order: None for a step that still runs after `max_wait` seconds."""
        self.expire()
        gate = _Gate(asyncio.get_running_loop().create_future())
        jobs: list[Job] = []
        pending: list[StepAnswer | _RunningStep] = []
        for request in requests:
            try:
                found = self._take(request, jobs)
            except DomainError as error:
                pending.append(error)
                continue
            if isinstance(found, _RunningStep):
                gate.left += 1
                found.gates.append(gate)
            pending.append(found)
        if jobs:
            self.workers.submit(jobs)
        if gate.left:
            await asyncio.wait((gate.opened,), timeout=max_wait) if max_wait is not None else await gate.opened
        return [item.answer if isinstance(item, _RunningStep) else item for item in pending]

    def _take(self, request: StepRequest, jobs: list[Job]) -> EpisodeStep | _RunningStep:
        """The stored answer, or the running step; adds a job when the step is a new one."""
        record = self._find(request.episode_id)
        if record is None or (record.episode is None and not record.finished):
            raise self._unknown(request.episode_id)
        index, played = request.step_index, len(record.answers)
        if index < played:
            if hash(request.action) != record.actions[index]:
                raise _conflict(request)
            return record.answers[index]
        if record.finished:
            raise DomainError(Reason.EPISODE_FINISHED, f"episode {request.episode_id!r} was over after {played} steps")
        if index > played:
            message = f"step {index} of episode {request.episode_id!r} came before step {played}"
            raise DomainError(Reason.STEP_SKIPPED, message, next_step_index=played)
        if record.running is None:
            record.running = _RunningStep(request.action)
            jobs.append(self._step_job(request.episode_id, record, record.running))
        elif record.running.action != request.action:
            raise _conflict(request)
        return record.running

    def _step_job(self, episode_id: str, record: _Record, running: _RunningStep) -> Job:
        episode, action = record.episode, running.action
        assert episode is not None

        def done(result: object) -> None:
            answer = result if isinstance(result, EpisodeStep) else _failed_step(result)
            record.running = None
            record.actions.append(hash(action))
            record.answers.append(answer)
            if answer.done:
                record.episode = None
                if self._live.get(episode_id) is record:
                    del self._live[episode_id]
                    self._finished[episode_id] = record
                    record.touched = self._clock()
            running.answer = answer
            for gate in running.gates:
                gate.pass_one()

        return Job(lambda: _checked_step(episode, action), done)

    def end(self, episode_id: str) -> None:
        self._live.pop(episode_id, None)
        self._finished.pop(episode_id, None)

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

    def _find(self, episode_id: str) -> _Record | None:
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


@dataclass(frozen=True, slots=True)
class _Started:
    episode: Episode
    observation: str


def _begin(environment: Environment, task_id: str) -> _Started:
    """On a worker's thread."""
    episode = environment.start(task_id)
    return _Started(episode, _text("observation", episode.observation))


def _checked_step(episode: Episode, action: str) -> EpisodeStep:
    """On a worker's thread. What an environment answers is checked here, so that a bad answer fails this step alone."""
    result = episode.step(action)
    if not isinstance(result, StepResult):
        raise TypeError(f"step returned {type(result).__name__}, not StepResult")
    if not math.isfinite(result.reward):
        raise ValueError(f"step returned reward {result.reward}")
    if result.truncated and not result.done:
        raise ValueError("step returned truncated without done")
    outcome = None
    if result.done:
        outcome = Outcome.TRUNCATED if result.truncated else Outcome.COMPLETED
    return EpisodeStep(
        _text("observation", result.observation),
        _text("action", result.action),
        float(result.reward),
        result.done,
        outcome,
        _text("feedback", result.feedback) if result.done else "",
        tool=_text("tool", result.tool),
        player=result.player,
        rewards=result.rewards,
    )


def _text(name: str, value: object) -> str:
    """Text that can travel: raises TypeError for what is no string, UnicodeEncodeError for lone surrogates."""
    if not isinstance(value, str):
        raise TypeError(f"{name} is {type(value).__name__}, not str")
    if not value.isascii():
        value.encode()
    return value


def _failed_step(result: object) -> EpisodeStep:
    outcome = Outcome.TIMEOUT if isinstance(result, TimedOut) else Outcome.ENV_ERROR
    return EpisodeStep("", "", None, True, outcome, error=_describe(result))


def _start_error(environment: str, task_id: str, error: object) -> DomainError:
    if isinstance(error, UnknownTask):
        return DomainError(Reason.UNKNOWN_TASK, f"{environment!r} has no task {task_id!r}")
    return DomainError(Reason.ENVIRONMENT_FAILED, f"{environment!r} could not start {task_id!r}: {_describe(error)}")


def _describe(error: object) -> str:
    text = f"{type(error).__name__}: {error}"[:_ERROR_LENGTH]
    return text.encode("utf-8", "replace").decode()


def _conflict(request: StepRequest) -> DomainError:
    message = f"step {request.step_index} of episode {request.episode_id!r} was played with another action"
    return DomainError(Reason.STEP_CONFLICT, message)
