"""SGLang servers that run already, or that this service launches. https://github.com/sgl-project/sglang

Token ids go to /generate and come back. Each answer names the weights that sampled each token. If a server answers from
weights that it was not given, the answer is discarded and the request goes to another server. The first one serves
again after it was loaded and checked.

Two things are done here because SGLang does not do them. Under a regex or schema SGLang returns log-probabilities of
the constrained logits: they are scored again, and a stream comes in one part. Score at a temperature other than 1 takes
one request for each token.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import aiohttp

from mulligan.common.errors import DomainError, Reason, invalid_field
from mulligan.common.inference import Feature, StopReason
from mulligan.common.tasks import gather_or_cancel
from mulligan.policy.backend import Admission, Ask, ModelInfo, Replica, Sampled, Scored, WeightsFile
from mulligan.policy.backends.sglang import Settings, requests
from mulligan.policy.backends.sglang.connection import HttpConnection, RequestRefused, Unreachable
from mulligan.policy.backends.sglang.folders import Folders, TargetWeights
from mulligan.policy.backends.sglang.launch import LaunchedServer
from mulligan.policy.backends.sglang.opening import Opened, open_servers
from mulligan.policy.backends.sglang.pool import ServerPool, Stale, place_of
from mulligan.policy.backends.sglang.server import Server, score_one
from mulligan.policy.backends.sglang.skeleton import Skeleton
from mulligan.policy.backends.sglang.updates import Updates
from mulligan.policy.chat import Chat
from mulligan.policy.model_settings import ModelSettings

_ATTEMPTS = 10  # at servers that fail one after the other
_ROUTED_ATTEMPTS = 2  # before a server is asked directly: a router may send a prompt to the same stale one each time
_RETRY_SECONDS = 0.05
_RETRY_AFTER = timedelta(seconds=1)
_FAILURES = (Unreachable, Stale, requests.BadAnswer, requests.Aborted)


async def open_backend(settings: ModelSettings, folder: Path, first_version: int) -> SglangBackend:
    """Returns when all launched servers, or one of those that ran already, are ready. Raises UnsupportedModel."""
    return SglangBackend(settings, await open_servers(settings, folder, first_version))


class SglangBackend:
    def __init__(self, settings: ModelSettings, opened: Opened):
        self._settings = settings
        self._session: aiohttp.ClientSession = opened.session
        self._skeleton: Skeleton = opened.skeleton
        self._folders: Folders = opened.folders
        self._pool: ServerPool = opened.pool
        self._launched: Sequence[LaunchedServer] = opened.launched
        self._fixed = opened.fixed
        self._router: HttpConnection | None = opened.router
        self._info = opened.info
        self._chat = opened.chat
        self._updates = Updates(self._pool, self._folders)
        self._seconds = settings.own_as(Settings).request_seconds
        self._in_flight = 0

    @property
    def model(self) -> ModelInfo:
        return self._info

    @property
    def policy_version(self) -> int:
        return self._pool.target.weights.policy_version

    @property
    def replicas(self) -> Sequence[Replica]:
        return self._pool.servers

    @property
    def chat(self) -> Chat:
        return self._chat

    @property
    def compute_seconds(self) -> float:
        return 0.0

    def encode(self, text: str) -> list[int]:
        return self._skeleton.tokenizer.encode(text)

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._skeleton.tokenizer.decode(token_ids)

    def decode_marked(self, token_ids: Sequence[int], text: str) -> str:
        return self._skeleton.tokenizer.decode_marked(token_ids, text, self._info.end_of_turn_token_ids)

    async def generate(self, ask: Ask) -> Sampled:
        self._enter()
        try:
            return await self._generate(ask)
        finally:
            self._in_flight -= 1

    async def stream(self, ask: Ask) -> AsyncIterator[Sampled]:
        """If the server fails in the middle, another one continues after the tokens sampled so far."""
        self._enter()
        try:
            if _is_constrained(ask):
                yield await self._generate(ask)
                return
            parts = self._stream(ask)
            try:
                async for part in parts:
                    yield part
            finally:
                await parts.aclose()
        finally:
            self._in_flight -= 1

    async def score(self, sequences: Sequence[Sequence[int]], temperature: float, adapter: str = "") -> Scored:
        if not sequences:
            return Scored((), self.policy_version)
        found = await gather_or_cancel(self._score(ids, temperature, adapter) for ids in sequences)
        while len({version for version, _ in found}) > 1:  # the weights changed in between
            found = await gather_or_cancel(self._score(ids, temperature, adapter) for ids in sequences)
        return Scored(tuple(row for _, row in found), found[0][0])

    async def update_weights(self, weights: WeightsFile, admit: Admission) -> None:
        """Requests that run on full weights go on with the new ones. Requests on an adapter finish with that
        adapter."""
        await self._updates.update(weights, admit)

    async def release_memory(self) -> None:
        self._need(Feature.MEMORY_RELEASE)
        await self._updates.release_memory()

    async def resume_memory(self) -> None:
        self._need(Feature.MEMORY_RELEASE)
        await self._updates.resume_memory()

    async def close(self) -> None:
        await self._pool.close()
        await asyncio.gather(*(launched.stop() for launched in self._launched))
        await self._session.close()
        await asyncio.to_thread(self._folders.close)

    def _enter(self) -> None:
        limit = self._settings.max_queue
        if self._in_flight >= limit:
            raise DomainError(Reason.QUEUE_FULL, f"{self._in_flight} requests wait", retry_after=_RETRY_AFTER)
        self._in_flight += 1

    def _need(self, feature: Feature) -> None:
        if feature not in self._info.features:
            raise DomainError(
                Reason.UNSUPPORTED_OPTION, f"the SGLang servers lack {feature.value}", feature=feature.value
            )

    async def _generate(self, ask: Ask) -> Sampled:
        key = place_of(ask.session_id, ask.adapter, ask.token_ids)
        problem = ""
        for attempt in range(_ATTEMPTS):
            async with self._pool.dispatch(key) as (server, target):
                times_let_in = server.times_let_in
                connection = self._connection(server, attempt)
                try:
                    return await self._generate_at(server, connection, target, ask)
                except _FAILURES as error:
                    problem = self._failed(server, error, times_let_in, direct=connection is not self._router)
            await asyncio.sleep(_RETRY_SECONDS * attempt)
        raise _gave_up(problem)

    async def _generate_at(
        self, server: Server, connection: HttpConnection, target: TargetWeights, ask: Ask
    ) -> Sampled:
        rid = uuid.uuid4().hex
        body = self._encode(ask, rid, target, stream=False)
        try:
            answer = requests.decode(await connection.generate(body, self._seconds))
        except RequestRefused as error:
            raise _refusal(ask, error) from error
        except (asyncio.CancelledError, Unreachable):
            self._abort(server, rid)
            raise
        requests.check_finish(answer)
        requests.check_tokens(answer, self._info.vocabulary_size)
        count = len(answer.output_ids)
        spans = self._pool.spans(target, answer.labels(0, count), own=not ask.adapter)
        if _is_constrained(ask):
            log_probs = await self._unconstrained(server, target, ask, answer)
        else:
            log_probs = requests.log_probs(answer)
        return Sampled(tuple(answer.output_ids), log_probs, self._stop_reason(ask, answer, answer.output_ids), spans)

    async def _unconstrained(
        self, server: Server, target: TargetWeights, ask: Ask, answer: requests.Answer
    ) -> tuple[float, ...]:
        ids = [*ask.token_ids, *answer.output_ids]
        adapter = self._adapter(ask, target)
        temperature = ask.sampling.temperature
        labels, row = await score_one(server.connection, ids, len(ask.token_ids), temperature, adapter, self._seconds)
        requests.check_scores(row)
        sampled_by = {label for label, _ in answer.labels(0, len(answer.output_ids))}
        if labels | sampled_by != labels & sampled_by:
            raise requests.Aborted("the weights changed between sampling and scoring")
        return row

    async def _stream(self, ask: Ask) -> AsyncGenerator[Sampled, None]:
        key = place_of(ask.session_id, ask.adapter, ask.token_ids)
        rest = ask
        problem = ""
        for attempt in range(_ATTEMPTS):
            async with self._pool.dispatch(key) as (server, target):
                times_let_in = server.times_let_in
                connection = self._connection(server, attempt)
                try:
                    async for part in self._stream_at(server, connection, target, rest):
                        rest = _after(rest, part)
                        yield part
                        if part.stop_reason is not None:
                            return
                except _FAILURES as error:
                    problem = self._failed(server, error, times_let_in, direct=connection is not self._router)
            if rest is not ask and ask.sampling.stop:  # a stop string may have begun in what is already sampled
                raise _gave_up(problem)
            await asyncio.sleep(_RETRY_SECONDS * attempt)
        raise _gave_up(problem)

    async def _stream_at(
        self, server: Server, connection: HttpConnection, target: TargetWeights, ask: Ask
    ) -> AsyncIterator[Sampled]:
        rid = uuid.uuid4().hex
        body = self._encode(ask, rid, target, stream=True)
        label = target.label if connection is self._router else server.label
        reader = requests.Reader(label, incremental=server.incremental)
        finished = False
        try:
            async for event in connection.generate_stream(body, self._seconds):
                answer = requests.decode_event(event)
                finished = answer.meta_info.finish_reason is not None
                requests.check_finish(answer)
                requests.check_tokens(answer, self._info.vocabulary_size)
                news = reader.read(answer)
                if news is not None:
                    token_ids, log_probs, labels = news
                    spans = self._pool.spans(target, labels, own=not ask.adapter)
                    reason = self._stop_reason(ask, answer, reader.token_ids)
                    yield Sampled(tuple(token_ids), log_probs, reason, spans)
        except RequestRefused as error:
            raise _refusal(ask, error) from error
        finally:
            if not finished:
                self._abort(server, rid)

    async def _score(self, ids: Sequence[int], temperature: float, adapter: str) -> tuple[int, tuple[float, ...]]:
        """Asks a server directly: the router does not pass on all fields that this needs."""
        problem = ""
        for attempt in range(_ATTEMPTS):
            async with self._pool.dispatch(place_of("", adapter, ids)) as (server, target):
                times_let_in = server.times_let_in
                name = self._fixed[adapter] if adapter else target.adapter
                try:
                    labels, row = await score_one(server.connection, ids, 1, temperature, name, self._seconds)
                    requests.check_scores(row)
                    spans = self._pool.spans(target, [(label, 0) for label in sorted(labels)], own=not adapter)
                except RequestRefused as error:
                    if "LoRA adapter" not in str(error):
                        raise invalid_field("sequences", f"what SGLang takes, which says: {error}") from error
                    problem = self._failed(server, Stale(str(error)), times_let_in, direct=True)
                except _FAILURES as error:
                    problem = self._failed(server, error, times_let_in, direct=True)
                else:
                    if len(spans) == 1:
                        return spans[0].policy_version, row
            await asyncio.sleep(_RETRY_SECONDS * attempt)
        raise _gave_up(problem)

    def _connection(self, server: Server, attempt: int) -> HttpConnection:
        return self._router if self._router is not None and attempt < _ROUTED_ATTEMPTS else server.connection

    def _encode(self, ask: Ask, rid: str, target: TargetWeights, *, stream: bool) -> bytes:
        return requests.encode(
            ask,
            rid,
            self._adapter(ask, target),
            self._info.context_length,
            self._info.end_of_turn_token_ids,
            stream=stream,
            priority=Feature.PRIORITY in self._info.features,
        )

    def _adapter(self, ask: Ask, target: TargetWeights) -> str:
        return self._fixed[ask.adapter] if ask.adapter else target.adapter

    def _stop_reason(self, ask: Ask, answer: requests.Answer, token_ids: Sequence[int]) -> StopReason | None:
        if answer.meta_info.finish_reason is None:
            return None
        return requests.stop_reason(answer, token_ids, ask.sampling, self._info.end_of_turn_token_ids)

    def _failed(self, server: Server, error: Exception, times_let_in: int, *, direct: bool) -> str:
        """What went wrong. Whoever aborted a request did not make the server worse; and who answered behind a router
        nobody knows, but the probes find it out."""
        if direct and not isinstance(error, requests.Aborted):
            self._pool.take_out(server, str(error), times_let_in)
        return str(error)

    def _abort(self, server: Server, rid: str) -> None:
        """Aborts the request at once. Closing the connection would also abort it, but some seconds later."""

        async def abort() -> None:
            for one in self._pool.servers if self._router is not None else [server]:
                try:
                    await one.abort(rid)
                except (Unreachable, RequestRefused):
                    continue

        self._pool.run(abort())


def _gave_up(problem: str) -> DomainError:
    message = f"the SGLang servers fail one after the other: {problem}"
    return DomainError(Reason.ENGINE_UNAVAILABLE, message, retry_after=_RETRY_AFTER)


def _is_constrained(ask: Ask) -> bool:
    return ask.sampling.regex is not None or ask.sampling.json_schema is not None


def _after(ask: Ask, part: Sampled) -> Ask:
    """The ask for the tokens that are still to be sampled."""
    sampling = replace(ask.sampling, max_tokens=ask.sampling.max_tokens - len(part.token_ids))
    return replace(ask, token_ids=[*ask.token_ids, *part.token_ids], sampling=sampling)


def _refusal(ask: Ask, error: RequestRefused) -> Exception:
    """The error for a request that the server refused. A missing adapter is the server's fault, all else the
    caller's."""
    message = str(error)
    if "LoRA adapter" in message:
        return Stale(message)
    field = "regex" if ask.sampling.regex is not None else "json_schema" if ask.sampling.json_schema else "sampling"
    return invalid_field(f"sampling.{field}" if field != "sampling" else field, f"what SGLang takes: {message}")
