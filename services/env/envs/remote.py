"""An environment of another environment server. Servers can be chained.

    [environments.sokoban]
    kind = "remote"
    address = "games.example.org:50051"     # or several servers, as in the trainer's `env_address`
    environment = "sokoban"                 # its name there; without it, the same name

Its episodes run on the other server, each under a new id. That server stores the answer of each step, and the client
repeats a step that was lost on the way, so a step is executed exactly once across the chain. One client, with its own
event loop, sends the steps of all episodes in batches.

The other server may start later. Until it answers, the environment is listed as unavailable and the server is asked
again. Its description of the environment is then kept until this server is restarted.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from mulligan.common.channel import Endpoint, check_protection
from mulligan.common.errors import CallFailed, DomainError, Reason, ServiceUnavailable
from mulligan.common.foreign import kept
from mulligan.common.tasks import LoopThread
from mulligan.common.tls import BadTls, ClientTls, read_client_tls
from mulligan.common.types import Outcome
from mulligan.env.base import EnvironmentInfo, Faulted, Split, StepResult, TaskInfo, UnknownTask
from mulligan.env.client import RemoteEpisode
from mulligan.env.load import Unavailable
from mulligan.env.replicas import connect
from mulligan.env.workers import TimedOut

T = TypeVar("T")
_FIRST_SECONDS = 3.0  # for the first answer, before this server starts without it
_AGAIN_SECONDS = 2.0  # between two questions to a server that is away
_END_SECONDS = 5.0  # for the end of an episode, and of the client


@dataclass(frozen=True, slots=True)
class Settings:
    """`token_env` names the variable with the other server's token; what begins with `tls_` is as in `ClientTls`.

    The token goes to another machine over TLS alone, unless `insecure` is set.

    A call takes at most `timeout_seconds`. A server that is away has `outage_seconds` of these to come back.
    """

    address: str
    environment: str = ""
    token_env: str = ""
    tls: bool = False
    tls_ca: Path | None = None
    tls_name: str = ""
    tls_cert: Path | None = None
    tls_key: Path | None = None
    insecure: bool = False
    timeout_seconds: float = 50.0
    outage_seconds: float = 10.0

    def __post_init__(self) -> None:
        for setting, seconds in (("timeout_seconds", self.timeout_seconds), ("outage_seconds", self.outage_seconds)):
            if seconds <= 0:
                raise ValueError(f"{setting} must be above 0, not {seconds}")
        if self.token_env and self.token_env not in os.environ:
            raise ValueError(f"token_env: there is no variable {self.token_env}")
        try:
            check_protection(self.endpoint)
        except BadTls as error:
            raise ValueError(f"tls_…: {error}") from error

    @property
    def endpoint(self) -> Endpoint:
        """Raises ValueError and BadTls for bad TLS settings."""
        token = os.environ[self.token_env] if self.token_env else None
        tls = read_client_tls(self.tls_ca, self.tls_name, self.tls_cert, self.tls_key)
        if tls is None and self.tls:
            tls = ClientTls()
        return Endpoint(self.address, token=token, tls=tls, insecure=self.insecure, outage_seconds=self.outage_seconds)


class Remote:
    def __init__(self, name: str, settings: Settings) -> None:
        self._name = name
        self._settings = settings
        self._there = settings.environment or name
        self._loop = LoopThread("remote environment")
        self._client = self._loop.run(self._connect(), _END_SECONDS)
        self._tasks: dict[Split, list[TaskInfo]] = {}
        self._listing = threading.Lock()
        self.info = Unavailable(name, f"{settings.address} has not answered yet").info
        if not self._learn_within(_FIRST_SECONDS):
            self._loop.later(self._keep_learning())

    def list_tasks(self, split: Split, offset: int, limit: int) -> Sequence[TaskInfo]:
        with self._listing:
            if self.info.unavailable:
                return ()
            if split not in self._tasks:
                self._tasks[split] = self.call(self._client.list_tasks(self._there, split, 0))
            first = max(offset, 0)
            return self._tasks[split][first : first + max(limit, 0)]

    def start(self, task_id: str) -> RemoteGame:
        if self.info.unavailable:
            raise Faulted(self.info.unavailable)
        try:
            begun = self.call(self._client.start(self._there, task_id, f"chained-{uuid4()}"))
        except DomainError as error:
            if error.reason is Reason.UNKNOWN_TASK:
                raise UnknownTask(str(error)) from error
            raise self.passed_on(error) from error
        return RemoteGame(begun, self)

    def close(self) -> None:
        with suppress(TimeoutError):
            self._loop.run(self._client.close(), _END_SECONDS)
        self._loop.close()

    def call(self, coroutine: Coroutine[Any, Any, T], seconds: float | None = None) -> T:
        """Runs a coroutine on the loop; called from any other thread. Raises DomainError, Faulted or TimedOut."""
        limit = seconds or self._settings.timeout_seconds
        try:
            return self._loop.run(coroutine, limit)
        except ServiceUnavailable as error:
            if error.refusal is not None:  # its hint when to come again is this server's
                raise error.refusal from error
            raise Faulted(str(error)) from error
        except TimeoutError as error:
            raise TimedOut(f"{self._settings.address} did not answer within {limit:g} s") from error
        except CallFailed as error:
            told = kept(self._settings.address, str(error))
            message = f"{self._settings.address} fails with {error.code}: {told}"
            raise (TimedOut if error.timed_out else Faulted)(message) from error

    def keep(self, begun: RemoteEpisode) -> Future[None]:
        """Keeps an episode of the other server from expiring, until cancelled. Leases there are not those of this
        server."""

        async def keeping() -> None:
            async with begun.kept_alive():
                await asyncio.Event().wait()

        return self._loop.later(keeping())

    def passed_on(self, error: DomainError) -> Exception:
        """The error to raise here for one of the other server. If it says when to retry, as a full server does, it is
        passed on; any other becomes Faulted, since it may be about ids that mean nothing here."""
        return error if error.retry_after is not None else Faulted(f"{self._settings.address}: {error}")

    async def _connect(self) -> Any:
        return connect(self._settings.endpoint, timeout=self._settings.timeout_seconds)

    def _learn_within(self, seconds: float) -> bool:
        try:
            self._loop.run(self._learn(), seconds)
        except TimeoutError:
            self._unavailable("no answer yet")
        except (DomainError, ServiceUnavailable, CallFailed) as error:
            self._unavailable(str(error))
        return not self.info.unavailable

    async def _learn(self) -> None:
        found: EnvironmentInfo = await self._client.describe(self._there)
        if found.unavailable:
            self._unavailable(found.unavailable)
        else:
            self.info = replace(found, name=self._name)

    async def _keep_learning(self) -> None:
        while self.info.unavailable:
            await asyncio.sleep(_AGAIN_SECONDS)
            try:
                await self._learn()
            except (DomainError, ServiceUnavailable, CallFailed) as error:
                self._unavailable(str(error))

    def _unavailable(self, reason: str) -> None:
        self.info = replace(self.info, unavailable=f"environment {self._there!r} at {self._settings.address}: {reason}")


class RemoteGame:
    """An episode of the other server, kept alive as long as ours."""

    reads_thoughts = True  # that server knows whether its environment does

    def __init__(self, begun: RemoteEpisode, environment: Remote) -> None:
        self.observation = begun.observation
        self.player = begun.player
        self._begun = begun
        self._environment = environment
        self._keeping = environment.keep(begun)

    def step(self, action: str) -> StepResult:
        try:
            step = self._environment.call(self._begun.step(action))
        except DomainError as error:
            raise self._environment.passed_on(error) from error
        if step.outcome is Outcome.TIMEOUT:
            raise TimedOut(step.error)
        if step.reward is None:
            raise Faulted(step.error)
        return StepResult(
            step.observation,
            step.action,
            step.reward,
            step.done,
            step.outcome is Outcome.TRUNCATED,
            step.feedback,
            step.tool,
            step.player,
            step.rewards,
        )

    def fork(self) -> RemoteGame:
        try:
            copied = self._environment.call(self._begun.fork(f"chained-{uuid4()}"))
        except DomainError as error:
            raise self._environment.passed_on(error) from error
        return RemoteGame(copied, self._environment)

    def close(self) -> None:
        self._keeping.cancel()
        self._environment.call(self._begun.end(), _END_SECONDS)


def create(name: str, settings: Settings) -> Remote:
    """The environment; the other server may be away."""
    return Remote(name, settings)
