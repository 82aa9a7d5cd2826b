"""What the services say of themselves, asked anew for each page: health, policies and their versions, the memory.

A service that is away costs its own part of a page, after SECONDS. A service may have several servers: each is asked
for its health and its policies, a chat goes to one of them, and a rollback to all.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

from mulligan.common.addresses import Addresses
from mulligan.common.channel import Endpoint, for_servers, is_healthy
from mulligan.common.errors import CallFailed, DomainError, ServiceUnavailable
from mulligan.common.inference import (
    CallOptions,
    Completion,
    CompletionPart,
    Message,
    PolicyInfo,
    PolicyVersion,
    SamplingParams,
    VersionState,
)
from mulligan.common.reflections import Explained, StoredReflection
from mulligan.common.tasks import gather_or_cancel
from mulligan.env.client import EnvClient
from mulligan.memory.client import MemoryClient
from mulligan.policy.client import PolicyClient
from mulligan.policy.replicas import connect
from mulligan.trainer.client import RunClient

T = TypeVar("T")
SECONDS = 2.0
ACTION_SECONDS = 300.0  # a trainer looks at the environment first, a policy loads weights
MOST_ENTRIES = 5_000  # of the memory that are read, the oldest first
ERRORS = (DomainError, CallFailed, ServiceUnavailable)  # of calls


@dataclass(frozen=True, slots=True)
class ServiceAnswer(Generic[T]):
    """What a service answered, or why it did not."""

    found: T | None = None
    error: str = ""


@dataclass(frozen=True, slots=True)
class Health:
    """`in_flight` counts the calls that a policy server answers now; None where nobody says."""

    name: str
    address: str
    serves: bool
    in_flight: int | None = None


@dataclass(frozen=True, slots=True)
class PolicyAtServer:
    """A policy as one server has it."""

    address: str
    info: PolicyInfo
    versions: Sequence[PolicyVersion]

    @property
    def in_flight(self) -> int:
        return sum(engine.in_flight for engine in self.info.replicas)

    def state_of(self, version: int) -> VersionState | None:
        return next((one.state for one in self.versions if one.policy_version == version), None)


@dataclass(frozen=True, slots=True)
class PolicyOfServers:
    """A policy as all servers have it; those that serve its latest version come first."""

    servers: Sequence[PolicyAtServer]

    @property
    def info(self) -> PolicyInfo:
        return self.servers[0].info

    @property
    def versions(self) -> list[PolicyVersion]:
        """All that any server has, the latest first; each as the first server has it."""
        found = {one.policy_version: one for server in reversed(self.servers) for one in server.versions}
        return [found[number] for number in sorted(found, reverse=True)]

    def states(self, version: int) -> dict[str, list[str]]:
        """The states that a version is in, each with the addresses of the servers where it is."""
        found: dict[str, list[str]] = {}
        for server in self.servers:
            found.setdefault(server.state_of(version) or "unknown", []).append(server.address)
        return found

    def may_serve_again(self, version: int) -> bool:
        """Whether a rollback to it is possible: each server keeps or serves it, and one does not serve it."""
        found = self.states(version).keys()
        return VersionState.KEPT in found and found <= {VersionState.KEPT, VersionState.SERVING}


@dataclass(frozen=True, slots=True)
class FoundPolicies:
    """`errors` has why a server did not answer, by its address."""

    policies: Sequence[PolicyOfServers]
    errors: Mapping[str, str]


class ServicesPort(Protocol):
    """What the pages ask: running services, or a recording of their answers."""

    async def health(self) -> Sequence[Health]: ...

    async def policies(self) -> FoundPolicies: ...

    async def entries(self, scope: str) -> ServiceAnswer[list[StoredReflection]]: ...

    async def entry(self, reflection_id: str) -> ServiceAnswer[Explained]: ...

    async def prompts(self) -> ServiceAnswer[dict[str, str]]: ...

    async def complete(
        self, messages: tuple[Message, ...], sampling: SamplingParams, options: CallOptions
    ) -> ServiceAnswer[Completion]: ...

    def stream(
        self, messages: tuple[Message, ...], sampling: SamplingParams, options: CallOptions
    ) -> AsyncIterator[CompletionPart]: ...

    async def stop(self, run_id: str) -> ServiceAnswer[object]: ...

    async def resume(self, run_id: str) -> ServiceAnswer[object]: ...

    async def roll_back(self, policy: str, version: int) -> ServiceAnswer[object]: ...


class Services:
    """`endpoints` by name: env, policy, memory, trainer. The address of each may name several servers. `credential_of`
    finds the credential of a run by its id, or "", and raises OSError."""

    def __init__(self, endpoints: Mapping[str, Endpoint], credential_of: Callable[[str], str] = lambda _: "") -> None:
        self._credential_of = credential_of
        self._endpoints = {name: replace(one, outage_seconds=SECONDS) for name, one in endpoints.items()}

    async def health(self) -> Sequence[Health]:
        async def one(name: str, endpoint: Endpoint) -> Health:
            serves = await is_healthy(endpoint.address, SECONDS, endpoint.tls)
            load = await self._load(endpoint) if serves and name == "policy" else None
            return Health(name, endpoint.address, serves, load)

        async def all_of(name: str) -> list[Health]:
            try:
                servers = await self._servers(name)
            except OSError:  # a DNS name without addresses
                return [Health(name, self._endpoints[name].address, serves=False)]
            return list(await gather_or_cancel(one(name, server) for server in servers))

        return [one for found in await gather_or_cancel(map(all_of, self._endpoints)) for one in found]

    async def _load(self, endpoint: Endpoint) -> int | None:
        answer = await _ask_one(endpoint, PolicyClient, lambda client: client.policies())
        infos = answer.found
        return None if infos is None else sum(engine.in_flight for info in infos for engine in info.replicas)

    async def policies(self) -> FoundPolicies:
        """Those of all servers, by name."""

        async def ask(client: PolicyClient) -> list[tuple[PolicyInfo, Sequence[PolicyVersion]]]:
            infos = await client.policies()
            versions = await gather_or_cancel(client.versions(info.name) for info in infos)
            return list(zip(infos, versions, strict=True))

        try:
            servers = await self._servers("policy")
        except OSError as error:
            return FoundPolicies([], {self._endpoints["policy"].address: str(error)})
        answers = await gather_or_cancel(_ask_one(server, PolicyClient, ask) for server in servers)
        found: dict[str, list[PolicyAtServer]] = {}
        errors: dict[str, str] = {}
        for server, answer in zip(servers, answers, strict=True):
            if answer.found is None:
                errors[server.address] = answer.error
            for info, versions in answer.found or ():
                found.setdefault(info.name, []).append(PolicyAtServer(server.address, info, versions))
        return FoundPolicies([_by_version(found[name]) for name in sorted(found)], errors)

    async def entries(self, scope: str) -> ServiceAnswer[list[StoredReflection]]:
        """Of a scope, or of all, the latest first."""

        async def ask(client: MemoryClient) -> list[StoredReflection]:
            return (await client.list(scope, MOST_ENTRIES, include_deleted=True))[::-1]

        return await self._ask("memory", MemoryClient, ask)

    async def entry(self, reflection_id: str) -> ServiceAnswer[Explained]:
        return await self._ask("memory", MemoryClient, lambda client: client.explain(reflection_id))

    async def prompts(self) -> ServiceAnswer[dict[str, str]]:
        """The system prompt of each environment."""

        async def ask(client: EnvClient) -> dict[str, str]:
            return {one.name: one.prompts.solver for one in await client.list_environments()}

        return await self._ask("env", EnvClient, ask)

    async def complete(
        self, messages: tuple[Message, ...], sampling: SamplingParams, options: CallOptions
    ) -> ServiceAnswer[Completion]:
        """Of the server with the fewest calls."""
        endpoint = self._endpoints["policy"]
        return await _ask_one(
            endpoint, connect, lambda client: client.generate(messages, sampling, options), ACTION_SECONDS
        )

    async def stream(
        self, messages: tuple[Message, ...], sampling: SamplingParams, options: CallOptions
    ) -> AsyncIterator[CompletionPart]:
        """As it is sampled, at the server with the fewest calls. Raises one of ERRORS, TimeoutError or OSError."""
        servers = await self._servers("policy")
        loads = await gather_or_cancel(map(self._load, servers)) if len(servers) > 1 else [0]
        able = [(load, number) for number, load in enumerate(loads) if load is not None]
        chosen = servers[min(able, default=(0, 0))[1]]
        async with asyncio.timeout(ACTION_SECONDS), _closing(PolicyClient(chosen)) as client:
            async for part in client.stream(messages, sampling, options=options):
                yield part

    # What changes something. The services decide, by the credential of this program, whether it may.

    async def stop(self, run_id: str) -> ServiceAnswer[object]:
        return await self._act(run_id, lambda client: client.stop(run_id), 5 * SECONDS)

    async def resume(self, run_id: str) -> ServiceAnswer[object]:
        return await self._act(run_id, lambda client: client.resume(run_id), ACTION_SECONDS)

    async def _act(
        self, run_id: str, act: Callable[[RunClient], Awaitable[object]], seconds: float
    ) -> ServiceAnswer[object]:
        """Acts upon a run, with its credential."""
        try:
            credential = self._credential_of(run_id)
        except OSError as error:
            return ServiceAnswer(error=str(error))

        def ask(client: RunClient) -> Awaitable[object]:
            client.credentials |= {run_id: credential} if credential else {}
            return act(client)

        return await self._ask("trainer", RunClient, ask, seconds)

    async def roll_back(self, policy: str, version: int) -> ServiceAnswer[object]:
        """At all servers. Nothing is changed where one of them is away, or does not keep the version."""
        found = await self.policies()
        if found.errors:
            return ServiceAnswer(error=f"No server was rolled back: {_listed(found.errors)}")
        known = next((one for one in found.policies if one.info.name == policy), None)
        states = {} if known is None else {one.address: one.state_of(version) for one in known.servers}
        servers = await self._servers("policy")
        lacking = {
            server.address: f"version {version} is {states.get(server.address) or 'not known'} there"
            for server in servers
            if states.get(server.address) not in (VersionState.KEPT, VersionState.SERVING)
        }
        if lacking:
            expected = f"expected a version of {policy!r} that every server keeps"
            return ServiceAnswer(error=f"No server was rolled back: {expected}. {_listed(lacking)}")
        behind = [server for server in servers if states[server.address] is VersionState.KEPT]

        async def ask(client: PolicyClient) -> bool:
            await client.rollback(version, policy)
            return True

        answers = await gather_or_cancel(_ask_one(server, PolicyClient, ask, ACTION_SECONDS) for server in behind)
        failed = {one.address: answer.error for one, answer in zip(behind, answers, strict=True) if answer.error}
        if not failed:
            return ServiceAnswer(True)
        took = [one.address for one in behind if one.address not in failed]
        rest = f" Version {version} serves at {', '.join(took)}." if took else ""
        return ServiceAnswer(error=f"{_listed(failed)}.{rest}")

    async def _servers(self, name: str) -> list[Endpoint]:
        """Each by itself. Raises OSError for a DNS name without addresses."""
        endpoint = self._endpoints[name]
        addresses = Addresses.parse(endpoint.address)
        if addresses.single:
            return [endpoint]
        shared = for_servers(endpoint, addresses)
        return [replace(shared, address=address) for address in await addresses.look_up()]

    async def _ask(
        self,
        name: str,
        kind: Callable[[Endpoint], EnvClient | MemoryClient | RunClient],
        ask: Callable[..., Awaitable[T]],
        seconds: float = 5 * SECONDS,
    ) -> ServiceAnswer[T]:
        """Of the service's first server."""
        try:
            endpoint = (await self._servers(name))[0]
        except OSError as error:
            return ServiceAnswer(error=str(error))
        return await _ask_one(endpoint, kind, ask, seconds)


def _by_version(servers: list[PolicyAtServer]) -> PolicyOfServers:
    return PolicyOfServers(sorted(servers, key=lambda one: -one.info.policy_version))


def _listed(errors: Mapping[str, str]) -> str:
    return "; ".join(error if error.startswith(address) else f"{address}: {error}" for address, error in errors.items())


async def _ask_one(
    endpoint: Endpoint,
    kind: Callable[[Endpoint], Any],
    ask: Callable[..., Awaitable[T]],
    seconds: float = 5 * SECONDS,
) -> ServiceAnswer[T]:
    """What a client of the endpoint answers."""
    async with _closing(kind(endpoint)) as client:
        try:
            async with asyncio.timeout(seconds):
                return ServiceAnswer(await ask(client))
        except ERRORS as error:
            return ServiceAnswer(error=str(error))
        except TimeoutError:
            return ServiceAnswer(error=f"{endpoint.address} did not answer within {seconds:g} s")


@asynccontextmanager
async def _closing(client: Any) -> AsyncIterator[Any]:
    try:
        yield client
    finally:
        await client.close()
