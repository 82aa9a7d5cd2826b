"""The episode table: exactly-once steps, leases, forks, capacity. Knows neither gRPC nor any particular environment.

The table runs on one event loop and needs no locks. Environment code runs on the threads of `workers.py`, with one call
at a time into each episode; further calls wait. An episode is live until it is over, and only live episodes count
against `max_episodes`. The answers of a finished episode can be repeated until its lease ends, it is ended, or newer
finished episodes displace it.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import NamedTuple

import structlog

from mulligan.common.callers import current_caller
from mulligan.common.errors import DomainError, Reason
from mulligan.common.suggest import did_you_mean
from mulligan.common.types import EpisodeStep
from mulligan.env import calls
from mulligan.env.base import Environment, Episode, close, fork
from mulligan.env.calls import StartResult, play
from mulligan.env.metrics import UNFINISHED, EpisodeMetrics
from mulligan.env.workers import FunctionJob, Job, TimedOut, WorkerPool

log = structlog.get_logger()
_RETRY_AFTER = timedelta(seconds=0.5)
_ENTRY_BYTES = 256  # of an answer besides its texts


@dataclass(frozen=True, slots=True)
class EpisodeLimits:
    """`max_caller_episodes` limits the live episodes that one caller started, `max_finished` the finished episodes
    whose answers are kept, `max_remembered` the ids of expired episodes, `max_bytes` the memory of all answers:
    finished episodes make room first. Then no episode starts, and one that has more than its share, which is that of
    all live ones, takes no step."""

    max_episodes: int = 4096
    max_caller_episodes: int = 4096
    max_finished: int = 4096
    max_remembered: int = 100_000
    lease_seconds: float = 600.0
    remember_seconds: float = 3600.0
    max_bytes: int = 2**31


class StepRequest(NamedTuple):
    episode_id: str
    step_index: int
    action: str


class StartRequest(NamedTuple):
    episode_id: str
    environment: str
    task_id: str


class Latch:
    """A count-down latch: `opened` completes when all steps that a call waits for have answers."""

    __slots__ = ("left", "opened")

    def __init__(self, opened: asyncio.Future[None], left: int):
        self.opened = opened
        self.left = left

    def count_down(self) -> None:
        self.left -= 1
        if self.left == 0 and not self.opened.done():
            self.opened.set_result(None)


class RunningStep(Job):
    """The job of one step. `answer` is set when it ends, and `latches` are those of the calls that wait for it."""

    __slots__ = ("action", "answer", "latches", "played", "record")

    def __init__(self, record: EpisodeRecord, action: str, played: Callable[[RunningStep, object], None]):
        super().__init__()
        self.record = record
        self.action = action
        self.played = played
        self.answer: EpisodeStep | None = None
        self.latches: list[Latch] = []

    def call(self) -> EpisodeStep:
        return play(_episode_of(self.record), self.action, self.record.players)

    def done(self, result: object) -> None:
        self.played(self, result)


@dataclass(slots=True)
class EpisodeRecord:
    """What the table knows of one episode."""

    episode_id: str
    environment: str
    task_id: str
    players: int
    started: asyncio.Future[StartResult]
    touched: float
    caller: str = ""  # who started it (`common/callers.py`)
    source: tuple[str, int] | None = None  # of a fork: the original episode and its number of steps
    episode: Episode | None = None
    # Hashes of the actions: 64 bits each, salted per process. An action may have megabytes.
    actions: list[int] = field(default_factory=list)
    answers: list[EpisodeStep] = field(default_factory=list)
    size: int = 0  # bytes of the observations and answers, about
    running: RunningStep | None = None
    calling: bool = False  # whether a call into the episode runs
    held: list[Job] = field(default_factory=list)  # calls that wait for the running one
    released: bool = False  # over, ended or expired: the episode is closed, or will be

    @property
    def finished(self) -> bool:
        return bool(self.answers) and self.answers[-1].done

    @property
    def busy(self) -> bool:
        return self.calling or self.running is not None or not self.started.done()


StepAnswer = EpisodeStep | DomainError
StartAnswer = StartResult | DomainError


class EpisodeTable:
    """All episodes of a server.

    `start` and `start_all` put a record among the live episodes and submit a job that makes the episode. `step` looks
    up each request: a repeated step gets the stored answer or joins the running one, a wrong one gets an error, and a
    new one becomes a job. The call then waits on a latch. When a job returns, `_step_done` stores the answer and opens
    the latches; after the last step it moves the record to the finished episodes and closes the episode. Every call
    first drops the episodes whose lease has ended. `clock` returns seconds.
    """

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
        self._metrics = {name: EpisodeMetrics(name) for name in environments}
        self._clock = clock
        self._live: OrderedDict[str, EpisodeRecord] = OrderedDict()  # both: least recently used first
        self._finished: OrderedDict[str, EpisodeRecord] = OrderedDict()
        self._expired: dict[str, float] = {}  # id → time of expiry; oldest first
        self._closing: set[asyncio.Future[None]] = set()
        self._bytes = 0  # of all records, live or finished

    @property
    def live_count(self) -> int:
        return len(self._live)

    @property
    def answer_bytes(self) -> int:
        return self._bytes

    def environment(self, name: str) -> Environment:
        if name not in self.environments:
            offered = ", ".join(sorted(self.environments))
            near = did_you_mean(name, self.environments)
            message = f"no environment {name!r} here{near}; there are: {offered}"
            raise DomainError(Reason.UNKNOWN_ENVIRONMENT, message)
        return self.environments[name]

    async def start(self, episode_id: str, environment: str, task_id: str) -> StartResult:
        """Starts an episode. A repeated call returns the same result, and waits while the start runs.

        Raises EPISODE_CONFLICT when the id belongs to another episode, CAPACITY_REACHED, UNKNOWN_ENVIRONMENT,
        UNKNOWN_TASK, ENVIRONMENT_UNAVAILABLE, ENVIRONMENT_FAILED.
        """
        (begun,) = await self.start_all([StartRequest(episode_id, environment, task_id)])
        if isinstance(begun, DomainError):
            raise begun
        assert begun is not None  # without a time limit there is an answer
        return begun

    async def start_all(
        self, requests: Sequence[StartRequest], max_wait: float | None = None
    ) -> list[StartAnswer | None]:
        """As `start`, for many. Returns an answer per request, in order: None for an episode that still starts after
        `max_wait` seconds."""
        self.expire()
        jobs: list[Job] = []
        found: list[EpisodeRecord | DomainError] = []
        for request in requests:
            try:
                found.append(self._begun(request, jobs))
            except DomainError as error:
                found.append(error)
        if jobs:
            self.workers.submit(jobs)
        starting = [one.started for one in found if isinstance(one, EpisodeRecord) and not one.started.done()]
        if starting:
            await asyncio.wait(starting, timeout=max_wait)  # never cancels them: others may wait, too
        return [one if isinstance(one, DomainError) else _start_answer(one) for one in found]

    def _begun(self, request: StartRequest, jobs: list[Job]) -> EpisodeRecord:
        """The episode. Adds a job for a new one. Raises for a wrong request."""
        episode_id, environment, task_id = request
        record = self._find(episode_id)
        if record is None:
            return self._admit(episode_id, environment, task_id, jobs)
        if record.source is not None or (record.environment, record.task_id) != (environment, task_id):
            raise _in_use(episode_id, record)
        return record

    def _admit(self, episode_id: str, name: str, task_id: str, jobs: list[Job]) -> EpisodeRecord:
        environment = self.environment(name)
        if environment.info.unavailable:
            raise DomainError(Reason.ENVIRONMENT_UNAVAILABLE, f"{name!r}: {environment.info.unavailable}")
        record = self._place(episode_id, name, task_id)

        def done(result: object) -> None:
            if isinstance(result, tuple):
                self._started(record, *result)
            else:
                said = calls.told(result, name, episode_id=episode_id, task_id=task_id)
                self._start_failed(episode_id, record, calls.start_error(name, task_id, result, said))

        job = FunctionJob(lambda: calls.close_if_given_up(calls.begin(environment, task_id), job), done)
        jobs.append(job)
        return record

    async def fork(self, episode_id: str, step_index: int, new_episode_id: str) -> StartResult:
        """Copies an episode after `step_index` steps. Returns its last observation and whose turn it is. A repeated
        call returns the same result, and waits while the fork runs.

        Raises as `start` does, and UNKNOWN_EPISODE, FORK_UNSUPPORTED, EPISODE_FINISHED, STEP_SKIPPED, STEP_CONFLICT.
        """
        self.expire()
        record = self._find(new_episode_id)
        if record is None:
            record = self._copy(episode_id, step_index, new_episode_id)
        elif record.source != (episode_id, step_index):
            raise _in_use(new_episode_id, record)
        return await asyncio.shield(record.started)

    def _copy(self, episode_id: str, step_index: int, new_episode_id: str) -> EpisodeRecord:
        source = self._find(episode_id)
        if source is None or (source.episode is None and not source.finished):
            raise self._unknown(episode_id)
        if not self.environment(source.environment).info.can_fork:
            raise DomainError(Reason.FORK_UNSUPPORTED, f"episodes of {source.environment!r} cannot be forked")
        _check_fork(source, episode_id, step_index)
        record = self._place(new_episode_id, source.environment, source.task_id)
        record.source = (episode_id, step_index)
        record.actions = list(source.actions)
        record.answers = list(source.answers)
        self._add_bytes(record, source.size)  # they may be all that is left of the source
        last = source.answers[-1] if source.answers else source.started.result()

        def done(result: object) -> None:
            if isinstance(result, tuple):
                self._started(record, *result)
            else:
                name = source.environment
                said = calls.told(result, name, episode_id=episode_id, task_id=source.task_id)
                self._start_failed(new_episode_id, record, calls.fork_error(name, episode_id, result, said))
                if isinstance(result, TimedOut) and source.episode is not None:
                    source.episode = calls.stuck(source.episode, result)
            self._call_returned(source)

        begun = StartResult(last.observation, last.player)
        job = FunctionJob(lambda: calls.close_if_given_up((fork(_episode_of(source)), begun), job), done)
        if self._may_call(source, job):
            self.workers.submit([job])
        return record

    def _place(self, episode_id: str, name: str, task_id: str) -> EpisodeRecord:
        """Adds a new record. Raises CAPACITY_REACHED."""
        if len(self._live) >= self.limits.max_episodes:
            message = f"{len(self._live)} episodes are live, the limit of this server"
            raise DomainError(Reason.CAPACITY_REACHED, message, retry_after=_RETRY_AFTER)
        if self._bytes > self.limits.max_bytes:
            raise self._no_memory()
        caller = current_caller.get()
        self._check_share(caller)
        players = self.environments[name].info.player_count
        record = EpisodeRecord(
            episode_id, name, task_id, players, asyncio.get_running_loop().create_future(), self._clock(), caller
        )
        self._live[episode_id] = record
        self._expired.pop(episode_id, None)
        return record

    def _check_share(self, caller: str) -> None:
        limit = self.limits.max_caller_episodes
        if len(self._live) < limit:
            return
        live = sum(record.caller == caller for record in self._live.values())
        if live >= limit:
            message = f"{live} episodes of this caller are live, the limit for one"
            raise DomainError(Reason.CAPACITY_REACHED, message, retry_after=_RETRY_AFTER)

    def _started(self, record: EpisodeRecord, episode: Episode, begun: StartResult) -> None:
        record.episode = episode
        if record.source is None:
            self._add_bytes(record, sys.getsizeof(begun.observation) + _ENTRY_BYTES)
        record.started.set_result(begun)
        self._metrics[record.environment].started()
        if record.released:  # ended while it started
            self._release(record)

    def _start_failed(self, episode_id: str, record: EpisodeRecord, error: DomainError) -> None:
        if self._live.get(episode_id) is record:
            self._drop(self._live, episode_id)
        record.started.set_exception(error)
        record.started.exception()  # mark it as retrieved: no caller may be left

    async def step(self, requests: Sequence[StepRequest], max_wait: float | None = None) -> list[StepAnswer | None]:
        """Returns an answer per request, in order: None for a step that still runs after `max_wait` seconds."""
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
        """Returns the stored answer or the running step. Adds a job for a new step. Raises for a wrong one."""
        record = self._find(request.episode_id)
        if record is None or (record.episode is None and not record.finished):
            raise self._unknown(request.episode_id)
        index = request.step_index
        played = len(record.answers)
        if index < played:
            if hash(request.action) != record.actions[index]:
                raise _step_conflict(request)
            return record.answers[index]
        if record.finished:
            raise DomainError(Reason.EPISODE_FINISHED, f"episode {request.episode_id!r} was over after {played} steps")
        if index > played:
            message = f"step {index} of episode {request.episode_id!r} came before step {played}"
            raise DomainError(Reason.STEP_SKIPPED, message, next_step_index=played)
        if record.running is None:
            share = self.limits.max_bytes / max(1, len(self._live))
            if self._bytes > self.limits.max_bytes and record.size + len(request.action) > share:
                raise self._no_memory()
            record.running = RunningStep(record, request.action, self._step_done)
            if self._may_call(record, record.running):
                jobs.append(record.running)
        elif record.running.action != request.action:
            raise _step_conflict(request)
        return record.running

    def _step_done(self, step: RunningStep, result: object) -> None:
        record = step.record
        answer = result if isinstance(result, EpisodeStep) else _failed_step(record, result)
        record.running = None
        record.actions.append(hash(step.action))
        record.answers.append(answer)
        self._add_bytes(record, _bytes_of(answer))
        self._call_returned(record)
        if answer.done:
            if not record.released:
                self._release(record)
            record.episode = None
            if self._live.get(record.episode_id) is record:
                del self._live[record.episode_id]
                self._finished[record.episode_id] = record
                record.touched = self._clock()
        metrics = self._metrics[record.environment]
        metrics.stepped()
        if answer.done and answer.outcome is not None:
            metrics.ended(answer.outcome)
        step.answer = answer
        for latch in step.latches:
            latch.count_down()

    def _may_call(self, record: EpisodeRecord, job: Job) -> bool:
        """Whether the job may run now. Otherwise it is queued until the running call into the episode returns."""
        if record.calling:
            record.held.append(job)
            return False
        record.calling = True
        return True

    def _call_returned(self, record: EpisodeRecord) -> None:
        record.calling = bool(record.held)
        if record.held:
            self.workers.submit([record.held.pop(0)])

    def _release(self, record: EpisodeRecord) -> None:
        """Closes the episode on a worker thread, after the calls into it have returned. A call that was given up may
        still run."""
        record.released = True
        episode = record.episode
        if episode is None or not hasattr(episode, "close"):
            return
        closed = asyncio.get_running_loop().create_future()
        self._closing.add(closed)

        def done(result: object) -> None:
            if isinstance(result, BaseException):
                log.warning("an episode was not closed", environment=record.environment, error=calls.described(result))
            self._call_returned(record)
            self._closing.discard(closed)
            closed.set_result(None)

        if self._may_call(record, job := FunctionJob(lambda: close(episode), done)):
            self.workers.submit([job])

    def end(self, episode_id: str) -> None:
        if episode_id in self._finished:
            self._drop(self._finished, episode_id)
        if episode_id in self._live:
            self._release(record := self._drop(self._live, episode_id))
            self._metrics[record.environment].ended(UNFINISHED)

    def _add_bytes(self, record: EpisodeRecord, size: int) -> None:
        """Of an answer. The episode may have been ended meanwhile."""
        record.size += size
        episode_id = record.episode_id
        if self._live.get(episode_id) is record or self._finished.get(episode_id) is record:
            self._bytes += size

    def _drop(self, records: OrderedDict[str, EpisodeRecord], episode_id: str) -> EpisodeRecord:
        record = records.pop(episode_id)
        self._bytes -= record.size
        return record

    def _no_memory(self) -> DomainError:
        limit = self.limits.max_bytes
        message = f"the answers of all episodes take {self._bytes} bytes, more than the {limit} of answers_gib"
        return DomainError(Reason.CAPACITY_REACHED, message, retry_after=_RETRY_AFTER)

    async def close(self, seconds: float) -> None:
        """Ends all episodes and closes the environments, within `seconds`. Gives up the calls that run."""
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
            log.warning("an environment was not closed", environment=name, error=calls.described(error))

    def expire(self) -> None:
        """Expires the records that were idle for longer than their lease. Runs at each call and visits expired records
        only."""
        now = self._clock()
        for records in (self._live, self._finished):
            while records:
                episode_id = next(iter(records))
                record = records[episode_id]
                surplus = records is self._finished and (
                    len(records) > self.limits.max_finished or self._bytes > self.limits.max_bytes
                )
                if now - record.touched <= self.limits.lease_seconds and not surplus:
                    break
                if record.busy:
                    record.touched = now
                    records.move_to_end(episode_id)
                    if surplus:  # it is being closed, and all others may be, too
                        break
                else:
                    self._drop(records, episode_id)
                    if records is self._live:
                        self._release(record)
                        self._metrics[record.environment].ended(UNFINISHED)
                    self._expired.pop(episode_id, None)
                    self._expired[episode_id] = now
        while self._expired:
            episode_id = next(iter(self._expired))
            too_old = now - self._expired[episode_id] > self.limits.remember_seconds
            if not too_old and len(self._expired) <= self.limits.max_remembered:
                break
            del self._expired[episode_id]

    async def keep_expiring(self, every_seconds: float) -> None:
        """Expires idle episodes also while no calls arrive. Runs until it is cancelled."""
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


def _bytes_of(answer: EpisodeStep) -> int:
    texts = (answer.observation, answer.action, answer.feedback, answer.error, answer.tool)
    return sum(map(sys.getsizeof, texts)) + _ENTRY_BYTES


def _start_answer(record: EpisodeRecord) -> StartAnswer | None:
    if not record.started.done():
        return None
    failed = record.started.exception()
    assert failed is None or isinstance(failed, DomainError)
    return failed or record.started.result()


def _episode_of(record: EpisodeRecord) -> Episode:
    assert record.episode is not None
    return record.episode


def _check_fork(source: EpisodeRecord, episode_id: str, step_index: int) -> None:
    """Raises unless the episode is live, has played exactly `step_index` steps and runs none."""
    played = len(source.answers)
    if source.finished:
        raise DomainError(Reason.EPISODE_FINISHED, f"episode {episode_id!r} was over after {played} steps")
    if step_index > played:
        message = f"episode {episode_id!r} has played {played} steps, not {step_index}"
        raise DomainError(Reason.STEP_SKIPPED, message, next_step_index=played)
    if step_index < played or source.running is not None:
        state = f"plays step {played}" if source.running is not None else f"has played {played} steps"
        raise DomainError(Reason.STEP_CONFLICT, f"episode {episode_id!r} {state}: no fork after {step_index}")


def _in_use(episode_id: str, record: EpisodeRecord) -> DomainError:
    origin = "" if record.source is None else ", a fork of {!r} after {} steps".format(*record.source)
    message = f"episode {episode_id!r} plays {record.task_id!r} of {record.environment!r}{origin}"
    return DomainError(Reason.EPISODE_CONFLICT, message)


def _failed_step(record: EpisodeRecord, error: object) -> EpisodeStep:
    said = calls.told(error, record.environment, episode_id=record.episode_id, task_id=record.task_id)
    return calls.failed_step(error, said)


def _step_conflict(request: StepRequest) -> DomainError:
    message = f"step {request.step_index} of episode {request.episode_id!r} was played with another action"
    return DomainError(Reason.STEP_CONFLICT, message)
