"""A backend whose engines are servers: which one a request goes to, and what happens when that one fails.

Each answer names the weights that sampled each token. If a server answers from weights that it was not given, the
answer is discarded and the request goes to another server. The first one serves again after it was loaded and checked.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cached_property
from typing import ClassVar

import aiohttp

from mulligan.common.errors import DomainError, Reason, invalid_field
from mulligan.common.inference import Feature
from mulligan.common.tasks import gather_or_cancel
from mulligan.policy.backend import Admission, Ask, ModelInfo, Replica, Sampled, Scored, WeightsFile
from mulligan.policy.backends._servers import ServerSettings
from mulligan.policy.backends._servers.answers import Aborted, BadAnswer, check_scores
from mulligan.policy.backends._servers.connection import HttpConnection, RequestRefused, Unreachable
from mulligan.policy.backends._servers.folders import Folders, TargetWeights
from mulligan.policy.backends._servers.launch import LaunchedServer
from mulligan.policy.backends._servers.pool import ServerPool, place_of
from mulligan.policy.backends._servers.server import EngineServer
from mulligan.policy.backends._servers.skeleton import Skeleton
from mulligan.policy.chat import Chat
from mulligan.policy.model_settings import ModelSettings

_ATTEMPTS = 10  # at servers that fail one after the other
_RETRY_SECONDS = 0.05
_RETRY_AFTER = timedelta(seconds=1)
_SCORED_AT_ONCE = 256  # sequences of one call
_TOKENS_AT_ONCE = 2**20  # of these sequences, unless one alone has more
_FAILURES = (Unreachable, BadAnswer, Aborted)


@dataclass(eq=False, repr=False)
class ServersBackend(ABC):
    """Subclasses know how to ask a server of their engine. `open_servers` makes them.

    A request (`generate`, `stream`, `score`) takes a server from the pool, has the subclass ask it there, and checks by
    which weights it was answered. When that fails, the server is taken out, and another one is asked.
    """

    server_type: ClassVar[type[EngineServer]]

    settings: ModelSettings
    session: aiohttp.ClientSession
    skeleton: Skeleton
    folders: Folders
    pool: ServerPool
    launched: Sequence[LaunchedServer]
    fixed: Mapping[str, str]  # adapters: what the servers call each
    model: ModelInfo
    chat: Chat
    in_flight: int = field(default=0, init=False)

    @property
    def policy_version(self) -> int:
        return self.pool.target.weights.policy_version

    @property
    def replicas(self) -> Sequence[Replica]:
        return self.pool.servers

    @property
    def compute_seconds(self) -> float:
        return 0.0

    @cached_property
    def request_seconds(self) -> float:
        return self.settings.own_as(ServerSettings).request_seconds

    def encode(self, text: str) -> list[int]:
        return self.skeleton.tokenizer.encode(text)

    def decode(self, token_ids: Sequence[int]) -> str:
        return self.skeleton.tokenizer.decode(token_ids)

    def decode_marked(self, token_ids: Sequence[int], text: str) -> str:
        return self.skeleton.tokenizer.decode_marked(token_ids, text, self.model.end_of_turn_token_ids)

    async def generate(self, ask: Ask) -> Sampled:
        self._enter()
        try:
            return await self._generate(ask)
        finally:
            self.in_flight -= 1

    async def stream(self, ask: Ask) -> AsyncIterator[Sampled]:
        """If the server fails in the middle, another one continues after the tokens sampled so far."""
        self._enter()
        try:
            if not self._can_stream(ask):
                yield await self._generate(ask)
                return
            parts = self._stream(ask)
            try:
                async for part in parts:
                    yield part
            finally:
                await parts.aclose()
        finally:
            self.in_flight -= 1

    async def score(self, sequences: Sequence[Sequence[int]], temperature: float, adapter: str = "") -> Scored:
        if not sequences:
            return Scored((), self.policy_version)
        self._enter()
        try:
            found = await self._score_all(sequences, temperature, adapter)
            while len({version for version, _ in found}) > 1:  # the weights changed in between
                found = await self._score_all(sequences, temperature, adapter)
        finally:
            self.in_flight -= 1
        return Scored(tuple(row for _, row in found), found[0][0])

    async def update_weights(self, weights: WeightsFile, admit: Admission) -> None:
        """Requests that run on full weights go on with the new ones. Requests on an adapter finish with that
        adapter."""
        await self.pool.update(weights, admit)

    async def release_memory(self) -> None:
        self._need(Feature.MEMORY_RELEASE)
        await self.pool.release_memory()

    async def resume_memory(self) -> None:
        self._need(Feature.MEMORY_RELEASE)
        await self.pool.resume_memory()

    async def close(self) -> None:
        await self.pool.close()
        await asyncio.gather(*(launched.stop() for launched in self.launched))
        await self.session.close()
        await asyncio.to_thread(self.folders.close)

    def _enter(self) -> None:
        limit = self.settings.max_queue
        if self.in_flight >= limit:
            raise DomainError(Reason.QUEUE_FULL, f"{self.in_flight} requests wait", retry_after=_RETRY_AFTER)
        self.in_flight += 1

    def _need(self, feature: Feature) -> None:
        if feature not in self.model.features:
            raise DomainError(
                Reason.UNSUPPORTED_OPTION,
                f"the {self.pool.engine} servers lack {feature.value}",
                feature=feature.value,
            )

    async def _generate(self, ask: Ask) -> Sampled:
        key = place_of(ask.session_id, ask.adapter, ask.token_ids)
        problem = ""
        for attempt in range(_ATTEMPTS):
            async with self.pool.dispatch(key) as (server, target):
                times_let_in = server.times_let_in
                connection = self._connection(server, attempt)
                try:
                    return await self._generate_at(server, connection, target, ask)
                except _FAILURES as error:
                    problem = self._failed(server, error, times_let_in, direct=connection is server.connection)
            await asyncio.sleep(_RETRY_SECONDS * attempt)
        raise self._gave_up(problem)

    async def _stream(self, ask: Ask) -> AsyncGenerator[Sampled, None]:
        key = place_of(ask.session_id, ask.adapter, ask.token_ids)
        rest = ask
        problem = ""
        for attempt in range(_ATTEMPTS):
            async with self.pool.dispatch(key) as (server, target):
                times_let_in = server.times_let_in
                connection = self._connection(server, attempt)
                try:
                    async for part in self._stream_at(server, connection, target, rest):
                        rest = _after(rest, part)
                        yield part
                        if part.stop_reason is not None:
                            return
                except _FAILURES as error:
                    problem = self._failed(server, error, times_let_in, direct=connection is server.connection)
            if rest is not ask and ask.sampling.stop:  # a stop string may have begun in what is already sampled
                raise self._gave_up(problem)
            await asyncio.sleep(_RETRY_SECONDS * attempt)
        raise self._gave_up(problem)

    async def _score_all(
        self, sequences: Sequence[Sequence[int]], temperature: float, adapter: str
    ) -> list[tuple[int, tuple[float, ...]]]:
        found = []
        for some in _batches(sequences):
            found += await gather_or_cancel(self._score(list(ids), temperature, adapter) for ids in some)
        return found

    async def _score(self, ids: Sequence[int], temperature: float, adapter: str) -> tuple[int, tuple[float, ...]]:
        """Asks a server directly: the router does not pass on all fields that this needs."""
        problem = ""
        for attempt in range(_ATTEMPTS):
            async with self.pool.dispatch(place_of("", adapter, ids)) as (server, target):
                times_let_in = server.times_let_in
                name = self.fixed[adapter] if adapter else target.adapter
                try:
                    labels, row = await server.score_one(ids, 1, temperature, name)
                    check_scores(row)
                    spans = self.pool.spans(target, [(label, 0) for label in sorted(labels)], own=not adapter)
                except RequestRefused as error:
                    if not self._lacks_adapter(error):
                        said = f"what {server.engine} takes: {error}"
                        raise invalid_field("sequences", said) from error
                    problem = self._failed(server, BadAnswer(str(error)), times_let_in, direct=True)
                except _FAILURES as error:
                    problem = self._failed(server, error, times_let_in, direct=True)
                else:
                    if len(spans) == 1:
                        return spans[0].policy_version, row
            await asyncio.sleep(_RETRY_SECONDS * attempt)
        raise self._gave_up(problem)

    async def _scored_anew(
        self,
        server: EngineServer,
        target: TargetWeights,
        ask: Ask,
        token_ids: Sequence[int],
        labels: Sequence[tuple[str, int]],
    ) -> tuple[float, ...]:
        """The log-probabilities of a sample of which the engine gave others than those of the contract. `labels` is by
        which weights it was sampled. Raises Aborted when the server holds others by now."""
        ids = [*ask.token_ids, *token_ids]
        adapter = self._adapter(ask, target)
        scored_by, row = await server.score_one(ids, len(ask.token_ids), ask.sampling.temperature, adapter)
        check_scores(row)
        if scored_by != {label for label, _ in labels}:
            raise Aborted("the weights changed between sampling and scoring")
        return row

    def _adapter(self, ask: Ask, target: TargetWeights) -> str:
        return self.fixed[ask.adapter] if ask.adapter else target.adapter

    def _failed(self, server: EngineServer, error: Exception, times_let_in: int, *, direct: bool) -> str:
        """What went wrong. The server is taken out, unless somebody aborted the request, or a router chose the server:
        then nobody knows which one failed, and the probes find it."""
        if direct and not isinstance(error, Aborted):
            self.pool.take_out(server, str(error), times_let_in)
        return str(error)

    def _gave_up(self, problem: str) -> DomainError:
        message = f"the {self.pool.engine} servers fail one after the other: {problem}"
        return DomainError(Reason.ENGINE_UNAVAILABLE, message, retry_after=_RETRY_AFTER)

    def _refusal(self, ask: Ask, error: RequestRefused) -> Exception:
        """The error for a request that the server refused. A missing adapter is the server's fault, anything else the
        caller's."""
        if self._lacks_adapter(error):
            return BadAnswer(str(error))
        field = "regex" if ask.sampling.regex is not None else "json_schema" if ask.sampling.json_schema else ""
        said = f"what {self.pool.engine} takes: {error}"
        return invalid_field(f"sampling.{field}" if field else "sampling", said)

    # The engine's own

    def _connection(self, server: EngineServer, attempt: int) -> HttpConnection:
        """Where a request for this server is sent: to the server itself, or to a router before it."""
        return server.connection

    def _can_stream(self, ask: Ask) -> bool:
        """Whether parts can be passed on while the sample goes on."""
        return True

    @abstractmethod
    def _lacks_adapter(self, error: RequestRefused) -> bool:
        """Whether the server refused because it does not have the adapter of the request."""

    @abstractmethod
    async def _generate_at(
        self, server: EngineServer, connection: HttpConnection, target: TargetWeights, ask: Ask
    ) -> Sampled:
        """Raises DomainError, and what `_FAILURES` lists."""

    @abstractmethod
    def _stream_at(
        self, server: EngineServer, connection: HttpConnection, target: TargetWeights, ask: Ask
    ) -> AsyncIterator[Sampled]:
        """Raises as `_generate_at` does."""


def _batches(sequences: Sequence[Sequence[int]]) -> Iterator[Sequence[Sequence[int]]]:
    """In order, by the limits of sequences and of tokens."""
    begin = count = 0
    for end, ids in enumerate(sequences):
        if end > begin and (end - begin == _SCORED_AT_ONCE or count + len(ids) > _TOKENS_AT_ONCE):
            yield sequences[begin:end]
            begin, count = end, 0
        count += len(ids)
    yield sequences[begin:]


def _after(ask: Ask, part: Sampled) -> Ask:
    """The ask for the tokens that are still to be sampled."""
    sampling = replace(ask.sampling, max_tokens=ask.sampling.max_tokens - len(part.token_ids))
    return replace(ask, token_ids=[*ask.token_ids, *part.token_ids], sampling=sampling)
