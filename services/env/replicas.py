"""Several environment servers as one `EnvironmentPort`.

An episode starts at the server that its id ranks first (`by_rank`), or at the next one if that is full or away. It
stays there: its steps go to no other server. A client that only knows the id asks the servers in the same order and
skips those that do not know it. When a server stays away, its episodes are lost and reported as UNKNOWN_EPISODE. Steps
are batched per server.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import fields, replace
from functools import partial
from typing import NoReturn, TypeVar

from cachetools import LRUCache

from mulligan.common.addresses import Addresses, by_rank
from mulligan.common.channel import Backoff, Endpoint, for_servers
from mulligan.common.errors import CallFailed, DomainError, Reason, ServiceUnavailable
from mulligan.common.replicas import Replicas, ServerReplica
from mulligan.common.suggest import did_you_mean
from mulligan.common.types import EnvironmentInfo, EpisodeStep, Split, TaskInfo
from mulligan.env.client import EnvClient, RemoteEpisode

R = TypeVar("R")
_MOST_REMEMBERED = 65_536  # episodes whose server is remembered; others are found by asking
_NOT_HERE = (Reason.UNKNOWN_EPISODE, Reason.EPISODE_EXPIRED)


def connect(
    endpoint: Endpoint,
    *,
    timeout: float = 90.0,
    lost_seconds: float = 10.0,
    on_outage: Callable[[str], None] | None = None,
) -> EnvClient | EnvReplicas:
    """Returns the client of all servers in the address of the endpoint. Raises ValueError for a bad address."""
    addresses = Addresses.parse(endpoint.address)
    if addresses.single:
        return EnvClient(endpoint, timeout=timeout, on_outage=on_outage)
    return EnvReplicas(endpoint, addresses, timeout=timeout, lost_seconds=lost_seconds, on_outage=on_outage)


class EnvReplicas:
    """As `EnvClient`, for several servers.

    A call that any server can answer is repeated at another one, and waits up to the endpoint's `outage_seconds` while
    none is usable. `start` goes to the server of the highest rank that takes it and remembers it; `step`, `fork` and
    `end` go to the remembered server, or ask the servers by rank. An episode is UNKNOWN_EPISODE after its server was
    away for `lost_seconds`. `describe` compares the servers: a server with other settings is not used.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        addresses: Addresses,
        *,
        timeout: float = 90.0,
        lost_seconds: float = 10.0,
        on_outage: Callable[[str], None] | None = None,
    ):
        servers = for_servers(endpoint, addresses)

        def open_server(address: str) -> _EnvServer:
            return _EnvServer(replace(servers, address=address), timeout, lost_seconds)

        self._replicas: Replicas[_EnvServer] = Replicas(
            addresses, open_server, self._check, outage_seconds=endpoint.outage_seconds, notice=on_outage
        )
        self._described: dict[str, EnvironmentInfo] = {}
        self._shown: dict[str, tuple[str, str]] = {}  # per deterministic environment: a task and its first observation
        self._homes: LRUCache[str, ServerReplica[_EnvServer]] = LRUCache(_MOST_REMEMBERED)

    @property
    def waiting_for(self) -> str:
        """What calls wait for now; "" if none does."""
        return self._replicas.waits.text

    async def list_environments(self) -> list[EnvironmentInfo]:
        """All environments. Raises DomainError when the servers offer different ones."""
        found = await self._offers()
        for name in sorted({name for offered in found.values() for name in offered}):
            _agreed(name, found)
        return list(next(iter(found.values())).values())

    async def describe(self, environment: str) -> EnvironmentInfo:
        """Describes an environment. Raises DomainError UNKNOWN_ENVIRONMENT, or ENVIRONMENT_UNAVAILABLE when servers
        differ in it, even in the seed alone. Servers that become different later are no longer used."""
        found = await self._offers()
        info = _agreed(environment, found)
        self._described.pop(environment, None)  # replaced by the current description
        self._shown.pop(environment, None)
        if info.deterministic:
            for replica in [replica for replica in self._replicas.present if replica.address in found]:
                await self._compare(replica, environment)
        self._described[environment] = info
        return info

    async def list_tasks(self, environment: str, split: Split, limit: int) -> list[TaskInfo]:
        """The first `limit` tasks; 0 means all."""
        since = time.monotonic()
        while True:
            for replica in await self._usable(since):
                try:
                    return await replica.client.list_tasks(environment, split, limit)
                except ServiceUnavailable as error:
                    self._replicas.failed(replica, error.cause)

    async def start(self, environment: str, task_id: str, episode_id: str) -> RemoteEpisode:
        """Starts an episode; at the next server if one does not answer. Then the episode may also exist at the first
        server, and is ended there when that returns. A call that timed out is not repeated elsewhere."""
        backoff = Backoff(self._replicas.text, self._replicas.outage_seconds)
        unsure: list[ServerReplica[_EnvServer]] = []
        with self._replicas.waits.call() as wait:
            while True:
                for replica in await self._usable(time.monotonic(), episode_id):
                    try:
                        episode = await replica.client.start(environment, task_id, episode_id)
                    except ServiceUnavailable as error:
                        last = error
                        if error.refusal is None:
                            self._replicas.failed(replica, error.cause)
                            unsure.append(replica)
                    else:
                        wait.answered()
                        self._remember(episode_id, replica)
                        self._abandon(episode_id, [other for other in unsure if other is not replica])
                        return episode
                wait.begin(last.cause)
                await backoff.wait(last.cause, last.refusal)

    async def fork(self, episode_id: str, step_index: int, new_episode_id: str) -> RemoteEpisode:
        """Forks at the server of the episode. As `EnvClient.fork`."""
        return await self._find(episode_id, lambda server: server.fork(episode_id, step_index, new_episode_id))

    async def step(self, episode_id: str, step_index: int, action: str) -> EpisodeStep:
        """As `EnvClient.step`. The episode may have been started by another client."""
        home = self._homes.get(episode_id)
        if home is not None:
            return await home.client.step(episode_id, step_index, action)
        return await self._find(episode_id, lambda server: server.step(episode_id, step_index, action))

    async def end(self, episode_id: str) -> None:
        home = self._homes.pop(episode_id, None)
        await self._replicas.ready()
        servers = [home] if home is not None else self._replicas.usable
        await asyncio.gather(*(replica.client.end(episode_id) for replica in servers))

    async def close(self) -> None:
        await self._replicas.close()

    async def _usable(self, since: float, key: str = "") -> list[ServerReplica[_EnvServer]]:
        """The usable servers, ranked for `key`. Waits until there is one."""
        await self._replicas.ready()
        while not (usable := {replica.address: replica for replica in self._replicas.usable}):
            await self._replicas.change(since)
        return [usable[address] for address in by_rank(key, usable)]

    async def _find(self, episode_id: str, ask: Callable[[_EnvServer], Awaitable[R]]) -> R:
        """Asks servers by rank until one knows the episode. Servers that are away come last and are waited for: the
        episode may be there."""
        await self._replicas.ready()
        if not self._replicas.present:
            await self._usable(time.monotonic())
        present = {replica.address: replica for replica in self._replicas.present}
        order = [present[address] for address in by_rank(episode_id, present)]
        said: list[DomainError] = []
        for replica in sorted(order, key=lambda replica: bool(replica.problem)):
            try:
                answer = await ask(replica.client)
            except DomainError as error:
                # An episode may exist twice if its first server seemed to be away; it was then played at the other one.
                if error.reason not in (*_NOT_HERE, Reason.STEP_SKIPPED):
                    raise
                said.append(error)
            else:
                self._remember(episode_id, replica)
                return answer
        raise max(said, key=lambda error: error.reason is not Reason.UNKNOWN_EPISODE)

    def _remember(self, episode_id: str, replica: ServerReplica[_EnvServer]) -> None:
        self._homes[episode_id] = replica

    def _abandon(self, episode_id: str, replicas: list[ServerReplica[_EnvServer]]) -> None:
        for replica in replicas:
            if len(replica.client.abandoned) < _MOST_REMEMBERED:  # others expire
                replica.client.abandoned.add(episode_id)
            self._replicas.check(replica)

    async def _check(self, replica: ServerReplica[_EnvServer]) -> bool:
        """Checks a server, including its settings: a server that returns may have others."""
        server = replica.client
        offered = {info.name: info for info in await server.list_environments()}
        try:
            for name, info in list(self._described.items()):
                _agreed(name, {"the others": {name: info}, replica.address: offered})
                if info.deterministic:
                    await self._compare(replica, name)
        except DomainError as error:
            if error.message != server.difference:
                self._replicas.tell("a server has other settings", endpoint=replica.address, cause=error.message)
            server.difference = error.message
            raise
        server.difference = ""
        while server.abandoned:
            await server.end(episode_id := next(iter(server.abandoned)))
            server.abandoned.discard(episode_id)
        return True

    async def _compare(self, replica: ServerReplica[_EnvServer], environment: str) -> None:
        """Checks that a task starts with the same observation as at the other servers. Raises DomainError
        ENVIRONMENT_UNAVAILABLE."""
        task_id, expected = self._shown.get(environment, ("", ""))
        try:
            task_id = task_id or await replica.client.first_task(environment)
            episode = await replica.client.start(environment, task_id, f"compare-{uuid.uuid4().hex}")
            await episode.end()
        except (DomainError, CallFailed, ServiceUnavailable):  # the server may be full, or the task may fail everywhere
            return
        if not expected:
            self._shown[environment] = task_id, episode.observation
        elif episode.observation != expected:
            message = (
                f"environment {environment!r} is not the same at all servers: task {task_id!r} begins with "
                f"{episode.observation[:200]!r} at {replica.address} and with {expected[:200]!r} at the others; all "
                "servers need the same settings, the seed included"
            )
            raise DomainError(Reason.ENVIRONMENT_UNAVAILABLE, message)

    async def _offers(self) -> dict[str, dict[str, EnvironmentInfo]]:
        """What each server offers, by address and name. Asks the usable servers, or all if none is usable."""
        await self._replicas.ready()
        since = time.monotonic()
        while True:
            present = self._replicas.usable or self._replicas.present
            answers = await asyncio.gather(
                *(replica.client.list_environments() for replica in present), return_exceptions=True
            )
            found = {}
            for replica, answer in zip(present, answers, strict=True):
                if isinstance(answer, ServiceUnavailable):
                    self._replicas.failed(replica, answer.cause)
                elif isinstance(answer, CallFailed):
                    self._replicas.failed(replica, str(answer))
                elif isinstance(answer, BaseException):
                    raise answer
                else:
                    found[replica.address] = {info.name: info for info in answer}
            if found:
                return found
            await self._replicas.change(since)


class _EnvServer(EnvClient):
    """One of several servers. Its calls fail at once when it is away, except those of an episode: they wait, since no
    other server has it."""

    def __init__(self, endpoint: Endpoint, timeout: float, lost_seconds: float):
        super().__init__(replace(endpoint, outage_seconds=0.0), timeout=timeout)
        self._endpoint = endpoint
        self._lost_seconds = lost_seconds
        self.difference = ""  # how its settings differ from the others, as reported
        self.abandoned: set[str] = set()  # episodes that may exist here but are played elsewhere

    async def first_task(self, environment: str) -> str:
        """The first task. Raises DomainError UNKNOWN_TASK if there is none."""
        for split in Split:
            for task in await self.list_tasks(environment, split, 1):
                return task.task_id
        raise DomainError(Reason.UNKNOWN_TASK, f"environment {environment!r} has no tasks")

    async def step(self, episode_id: str, step_index: int, action: str) -> EpisodeStep:
        try:
            return await super().step(episode_id, step_index, action)
        except ServiceUnavailable as error:
            failure = error
        return await self._again(partial(super().step, episode_id, step_index, action), episode_id, failure)

    async def fork(self, episode_id: str, step_index: int, new_episode_id: str) -> RemoteEpisode:
        try:
            return await super().fork(episode_id, step_index, new_episode_id)
        except ServiceUnavailable as error:
            failure = error
        return await self._again(partial(super().fork, episode_id, step_index, new_episode_id), episode_id, failure)

    async def end(self, episode_id: str) -> None:
        """Does not wait for a server that is away: its episode expires by itself."""
        try:
            await super().end(episode_id)
        except ServiceUnavailable as error:
            self._lost(episode_id, error)

    async def _again(self, call: Callable[[], Awaitable[R]], episode_id: str, failure: ServiceUnavailable) -> R:
        away = Backoff(self._endpoint.address, self._lost_seconds)
        full = Backoff(self._endpoint.address, self._endpoint.outage_seconds)
        while True:
            if failure.refusal is not None:
                await full.wait(failure.cause, failure.refusal)
            else:
                try:
                    await away.wait(failure.cause)
                except ServiceUnavailable as error:
                    self._lost(episode_id, error)
            try:
                return await call()
            except ServiceUnavailable as error:
                failure = error

    def _lost(self, episode_id: str, error: ServiceUnavailable) -> NoReturn:
        raise DomainError(Reason.UNKNOWN_EPISODE, f"episode {episode_id!r} is lost: {error}") from error


def _agreed(name: str, found: dict[str, dict[str, EnvironmentInfo]]) -> EnvironmentInfo:
    """The environment if all servers describe it equally. Raises DomainError, which names the servers and the
    difference."""
    having = {address: offered[name] for address, offered in found.items() if name in offered}
    missing = ", ".join(address for address in found if address not in having)
    if not having:
        offered = sorted({other for infos in found.values() for other in infos})
        message = f"no environment {name!r} at {missing}{did_you_mean(name, offered)}; there are: {', '.join(offered)}"
        raise DomainError(Reason.UNKNOWN_ENVIRONMENT, message)
    if missing:
        where = ", ".join(having)
        message = f"environment {name!r} is offered by {where} and not by {missing}: all servers need the same settings"
        raise DomainError(Reason.UNKNOWN_ENVIRONMENT, message)
    (first, expected), *others = having.items()
    for address, info in others:
        for field in fields(EnvironmentInfo):
            ours = getattr(expected, field.name)
            theirs = getattr(info, field.name)
            if ours != theirs:
                message = (
                    f"environment {name!r} is not the same at all servers: {field.name} is {ours!r} at {first} and "
                    f"{theirs!r} at {address}"
                )
                raise DomainError(Reason.ENVIRONMENT_UNAVAILABLE, message)
    return expected
