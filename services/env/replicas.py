"""Several env servers as one `EnvironmentPort`.

An episode goes to the server that its id prefers (`by_rank`), or to the next one when that is full or away, and stays
there: its steps go nowhere else. A client that knows nothing but the id asks the servers in the same order, and goes on
past those that do not know it. When a server stays away, its episodes are lost, and reported as that. Steps are
coalesced per server.
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
from mulligan.common.channel import Endpoint, Waits
from mulligan.common.errors import CallFailed, DomainError, Reason, ServiceUnavailable
from mulligan.common.replicas import Replicas, ServerReplica
from mulligan.common.suggest import did_you_mean
from mulligan.common.types import EnvironmentInfo, EpisodeStep, Split, TaskInfo
from mulligan.env.client import EnvClient, RemoteEpisode

R = TypeVar("R")
_MOST_REMEMBERED = 65_536  # where episodes are; what is forgotten is found again by asking
_NOT_HERE = (Reason.UNKNOWN_EPISODE, Reason.EPISODE_EXPIRED)


def connect(
    endpoint: Endpoint,
    *,
    timeout: float = 90.0,
    lost_seconds: float = 10.0,
    on_outage: Callable[[str], None] | None = None,
) -> EnvClient | EnvReplicas:
    """The client of all servers that the endpoint's address names. Raises ValueError for a bad address."""
    addresses = Addresses.parse(endpoint.address)
    if addresses.single:
        return EnvClient(endpoint, timeout=timeout, on_outage=on_outage)
    return EnvReplicas(endpoint, addresses, timeout=timeout, lost_seconds=lost_seconds, on_outage=on_outage)


class EnvReplicas:
    """As `EnvClient`. A call that any server can answer is made again at another one, and waits `outage_seconds` of the
    endpoint while none can. An episode whose server is away for `lost_seconds` is UNKNOWN_EPISODE."""

    def __init__(
        self,
        endpoint: Endpoint,
        addresses: Addresses,
        *,
        timeout: float = 90.0,
        lost_seconds: float = 10.0,
        on_outage: Callable[[str], None] | None = None,
    ):
        def open_server(address: str) -> _EnvServer:
            return _EnvServer(replace(endpoint, address=address), timeout, lost_seconds)

        self._replicas: Replicas[_EnvServer] = Replicas(
            addresses, open_server, self._check, outage_seconds=endpoint.outage_seconds, notice=on_outage
        )
        self._described: dict[str, EnvironmentInfo] = {}
        self._shown: dict[str, tuple[str, str]] = {}  # a task of each environment that is deterministic, and its start
        self._homes: LRUCache[str, ServerReplica[_EnvServer]] = LRUCache(_MOST_REMEMBERED)

    async def list_environments(self) -> list[EnvironmentInfo]:
        """Raises DomainError when the servers offer different ones."""
        found = await self._offers()
        for name in sorted({name for offered in found.values() for name in offered}):
            _agreed(name, found)
        return list(next(iter(found.values())).values())

    async def describe(self, environment: str) -> EnvironmentInfo:
        """Raises DomainError UNKNOWN_ENVIRONMENT, or ENVIRONMENT_UNAVAILABLE when servers differ in it, be it in the
        seed alone. One that came to differ meanwhile is not used, and not asked."""
        found = await self._offers()
        info = _agreed(environment, found)
        self._described.pop(environment, None)  # what is found now holds, if it is another
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
        """At another server when the first did not answer, the episode may be there as well, untouched: it is ended
        when that one is back. A call that ran out of time is not made elsewhere."""
        waits = Waits(self._replicas.text, self._replicas.outage_seconds)
        unsure: list[ServerReplica[_EnvServer]] = []
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
                    self._remember(episode_id, replica)
                    self._abandon(episode_id, [other for other in unsure if other is not replica])
                    return episode
            await waits.wait(last.cause, last.refusal)

    async def fork(self, episode_id: str, step_index: int, new_episode_id: str) -> RemoteEpisode:
        """At the server of the episode. As `EnvClient.fork`."""
        return await self._find(episode_id, lambda server: server.fork(episode_id, step_index, new_episode_id))

    async def step(self, episode_id: str, step_index: int, action: str) -> EpisodeStep:
        """As `EnvClient.step`, wherever the episode was started, and by whom."""
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
        """In the order in which the key prefers them; waits until there is one."""
        await self._replicas.ready()
        while not (usable := {replica.address: replica for replica in self._replicas.usable}):
            await self._replicas.change(since)
        return [usable[address] for address in by_rank(key, usable)]

    async def _find(self, episode_id: str, ask: Callable[[_EnvServer], Awaitable[R]]) -> R:
        """Servers that are away come last, and are waited for: the episode may be at one of them."""
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
                # An episode that was started twice, as its first server seemed to be away, was played at the other one.
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
            replica.client.abandoned.add(episode_id)
            self._replicas.check(replica)

    async def _check(self, replica: ServerReplica[_EnvServer]) -> bool:
        """Also that it offers what runs were told of: a server that comes back may have other settings."""
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
        """That a task begins here as it does at the others. Raises DomainError ENVIRONMENT_UNAVAILABLE."""
        task_id, expected = self._shown.get(environment, ("", ""))
        try:
            task_id = task_id or await replica.client.first_task(environment)
            episode = await replica.client.start(environment, task_id, f"compare-{uuid.uuid4().hex}")
            await episode.end()
        except (DomainError, CallFailed, ServiceUnavailable):  # it is full, say, or the task fails everywhere
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
        """What each server that answers offers, by address and name: of those that are used, or else of all."""
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
    """One of several. Its calls fail at once when it is away; those of an episode wait, as no other server has it."""

    def __init__(self, endpoint: Endpoint, timeout: float, lost_seconds: float):
        super().__init__(replace(endpoint, outage_seconds=0.0), timeout=timeout)
        self._endpoint = endpoint
        self._lost_seconds = lost_seconds
        self.difference = ""  # from the others, which was told
        self.abandoned: set[str] = set()  # episodes that may be here and are played elsewhere

    async def first_task(self, environment: str) -> str:
        """Raises DomainError UNKNOWN_TASK where there is none."""
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
        """Does not wait: an episode that cannot be reached expires by itself."""
        try:
            await super().end(episode_id)
        except ServiceUnavailable as error:
            self._lost(episode_id, error)

    async def _again(self, call: Callable[[], Awaitable[R]], episode_id: str, failure: ServiceUnavailable) -> R:
        away = Waits(self._endpoint.address, self._lost_seconds)
        full = Waits(self._endpoint.address, self._endpoint.outage_seconds)
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
    """The environment, as all servers have it. Raises DomainError that says who differs, and in what."""
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
