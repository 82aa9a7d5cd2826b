"""What the services say of themselves, asked anew for each page: health, policies and their versions, the memory.

A service that is away costs its own part of a page, after SECONDS.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from mulligan.common.channel import Endpoint, is_healthy
from mulligan.common.errors import CallFailed, DomainError, ServiceUnavailable
from mulligan.common.inference import (
    CallOptions,
    Completion,
    Message,
    PolicyInfo,
    PolicyVersion,
    SamplingParams,
)
from mulligan.common.reflections import Explained, StoredReflection
from mulligan.common.tasks import gather_or_cancel
from mulligan.env.client import EnvClient
from mulligan.memory.client import MemoryClient
from mulligan.policy.client import PolicyClient
from mulligan.trainer.client import RunClient

T = TypeVar("T")
SECONDS = 2.0
ACTION_SECONDS = 300.0  # a trainer looks at the environment first, a policy loads weights
MOST_ENTRIES = 5_000  # of the memory that are read, the oldest first


@dataclass(frozen=True, slots=True)
class ServiceAnswer(Generic[T]):
    """What a service answered, or why it did not."""

    found: T | None = None
    error: str = ""


@dataclass(frozen=True, slots=True)
class Health:
    name: str
    address: str
    serves: bool


@dataclass(frozen=True, slots=True)
class PolicyWithVersions:
    info: PolicyInfo
    versions: Sequence[PolicyVersion]  # the latest first


class Services:
    """`endpoints` by name: env, policy, memory, trainer. `credential_of` finds the credential of a run by its id, or
    "", and raises OSError."""

    def __init__(self, endpoints: Mapping[str, Endpoint], credential_of: Callable[[str], str] = lambda _: "") -> None:
        self._credential_of = credential_of
        self._endpoints = {name: replace(one, outage_seconds=SECONDS) for name, one in endpoints.items()}

    async def health(self) -> list[Health]:
        async def one(name: str, endpoint: Endpoint) -> Health:
            return Health(name, endpoint.address, await is_healthy(endpoint.address, SECONDS, endpoint.tls))

        return list(await gather_or_cancel(one(*pair) for pair in self._endpoints.items()))

    async def policies(self) -> ServiceAnswer[list[PolicyWithVersions]]:
        async def ask(client: PolicyClient) -> list[PolicyWithVersions]:
            infos = await client.policies()
            versions = await gather_or_cancel(client.versions(info.name) for info in infos)
            return [
                PolicyWithVersions(info, sorted(found, key=lambda one: -one.policy_version))
                for info, found in zip(infos, versions, strict=True)
            ]

        return await self._ask("policy", PolicyClient, ask)

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
        def ask(client: PolicyClient) -> Awaitable[Completion]:
            return client.generate(messages, sampling, options)

        return await self._ask("policy", PolicyClient, ask, ACTION_SECONDS)

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
        return await self._ask("policy", PolicyClient, lambda client: client.rollback(version, policy), ACTION_SECONDS)

    async def _ask(
        self,
        name: str,
        kind: Callable[[Endpoint], EnvClient | MemoryClient | PolicyClient | RunClient],
        ask: Callable[..., Awaitable[T]],
        seconds: float = 5 * SECONDS,
    ) -> ServiceAnswer[T]:
        async with AsyncExitStack() as stack:
            client = kind(self._endpoints[name])
            stack.push_async_callback(client.close)
            try:
                async with asyncio.timeout(seconds):
                    return ServiceAnswer(await ask(client))
            except (DomainError, CallFailed, ServiceUnavailable) as error:
                return ServiceAnswer(error=str(error))
            except TimeoutError:
                return ServiceAnswer(error=f"the {name} service did not answer within {seconds:g} s")
