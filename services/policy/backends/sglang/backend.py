"""SGLang servers that run already, or that this service launches. https://github.com/sgl-project/sglang

Token ids go to /generate and come back.

Two things are done here because SGLang does not do them. Under a regex or schema SGLang returns log-probabilities of
the constrained logits: they are scored again, and a stream comes in one part. Score at a temperature other than 1 takes
one request for each token.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from functools import cached_property
from pathlib import Path

from mulligan.common.inference import Feature, StopReason
from mulligan.common.model_files import UnsupportedModel
from mulligan.policy.backend import Ask, Sampled
from mulligan.policy.backends._servers.answers import check_tokens
from mulligan.policy.backends._servers.backend import ServersBackend
from mulligan.policy.backends._servers.connection import HttpConnection, RequestRefused, Unreachable
from mulligan.policy.backends._servers.folders import TargetWeights
from mulligan.policy.backends._servers.opening import open_servers
from mulligan.policy.backends._servers.server import EngineServer
from mulligan.policy.backends.sglang import Settings, requests
from mulligan.policy.backends.sglang.connection import SglangConnection
from mulligan.policy.backends.sglang.server import SglangServer
from mulligan.policy.model_settings import ModelSettings

_ROUTED_ATTEMPTS = 2  # then servers are asked directly: a router may send a prompt to the same stale one each time


async def open_backend(settings: ModelSettings, folder: Path, first_version: int) -> SglangBackend:
    """Raises UnsupportedModel."""
    chosen = settings.own_as(Settings)
    if chosen.router and not chosen.servers:
        raise UnsupportedModel("sglang.router: expected the servers behind it in sglang.servers")
    without = frozenset({Feature.PRIORITY}) if chosen.router else frozenset()  # its requests have none
    return await open_servers(SglangBackend, settings, folder, first_version, without)


class SglangBackend(ServersBackend):
    server_type = SglangServer

    @cached_property
    def _router(self) -> HttpConnection | None:
        chosen = self.settings.own_as(Settings)
        if not chosen.router:
            return None
        return SglangConnection(self.session, chosen.router, chosen.key, chosen.admin_key)

    def _connection(self, server: EngineServer, attempt: int) -> HttpConnection:
        return self._router if self._router is not None and attempt < _ROUTED_ATTEMPTS else server.connection

    def _can_stream(self, ask: Ask) -> bool:
        return not _is_constrained(ask)

    def _lacks_adapter(self, error: RequestRefused) -> bool:
        return "LoRA adapter" in error.said

    async def _generate_at(
        self, server: EngineServer, connection: HttpConnection, target: TargetWeights, ask: Ask
    ) -> Sampled:
        rid = uuid.uuid4().hex
        body = self._encode(ask, rid, target, stream=False)
        try:
            answer = requests.decode(await connection.generate(body, self.request_seconds))
        except RequestRefused as error:
            raise self._refusal(ask, error) from error
        except (asyncio.CancelledError, Unreachable):
            self._abort(server, rid)
            raise
        requests.check_finish(answer)
        token_ids = answer.output_ids
        check_tokens(token_ids, self.model.vocabulary_size)
        labels = answer.labels(0, len(token_ids))
        spans = self.pool.spans(target, labels, own=not ask.adapter)
        if _is_constrained(ask):
            log_probs = await self._scored_anew(server, target, ask, token_ids, labels)
        else:
            log_probs = requests.log_probs(answer)
        return Sampled(tuple(token_ids), log_probs, self._stop_reason(ask, answer, token_ids), spans)

    async def _stream_at(
        self, server: EngineServer, connection: HttpConnection, target: TargetWeights, ask: Ask
    ) -> AsyncIterator[Sampled]:
        assert isinstance(server, SglangServer)
        rid = uuid.uuid4().hex
        body = self._encode(ask, rid, target, stream=True)
        # A router may choose any server, and all should hold the target. A server of a guest has its owner's label.
        label = target.label if connection is self._router and not server.guest else server.label
        reader = requests.SglangStream(label, incremental=server.incremental)
        finished = False
        try:
            async for event in connection.generate_stream(body, self.request_seconds):
                answer = requests.decode_event(event)
                finished = answer.meta_info.finish_reason is not None
                requests.check_finish(answer)
                check_tokens(answer.output_ids, self.model.vocabulary_size)
                news = reader.read(answer)
                if news is not None:
                    token_ids, log_probs, labels = news
                    spans = self.pool.spans(target, labels, own=not ask.adapter)
                    reason = self._stop_reason(ask, answer, reader.token_ids)
                    yield Sampled(tuple(token_ids), log_probs, reason, spans)
        except RequestRefused as error:
            raise self._refusal(ask, error) from error
        finally:
            if not finished:
                self._abort(server, rid)

    def _encode(self, ask: Ask, rid: str, target: TargetWeights, *, stream: bool) -> bytes:
        return requests.encode(
            ask,
            rid,
            self._adapter(ask, target),
            self.model.context_length,
            self.model.end_of_turn_token_ids,
            stream=stream,
            priority=Feature.PRIORITY in self.model.features,
        )

    def _stop_reason(self, ask: Ask, answer: requests.Answer, token_ids: Sequence[int]) -> StopReason | None:
        if answer.meta_info.finish_reason is None:
            return None
        return requests.stop_reason(answer, token_ids, ask.sampling, self.model.end_of_turn_token_ids)

    def _abort(self, server: EngineServer, rid: str) -> None:
        """Aborts the request at once. Closing the connection would also abort it, but some seconds later."""

        async def abort() -> None:
            for one in self.pool.servers if self._router is not None else [server]:
                try:
                    await one.connection.control("/abort_request", {"rid": rid})
                except (Unreachable, RequestRefused):
                    continue

        self.pool.run(abort())


def _is_constrained(ask: Ask) -> bool:
    return ask.sampling.regex is not None or ask.sampling.json_schema is not None
