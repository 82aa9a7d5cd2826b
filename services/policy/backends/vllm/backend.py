"""vLLM servers that run already, or that this service launches. https://github.com/vllm-project/vllm

Token ids go to /inference/v1/generate and come back.

Two things are done here because vLLM does not do them. Under top-p, top-k, a regex or a schema vLLM renormalises
log-probabilities over the tokens that are left: they are scored again, and a stream comes in one part. Score at a
temperature other than 1 takes one request for each token.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from mulligan.common.inference import Feature, StopReason
from mulligan.policy.backend import Ask, Sampled
from mulligan.policy.backends._servers.answers import check_tokens, known, stop_reason
from mulligan.policy.backends._servers.backend import ServersBackend
from mulligan.policy.backends._servers.connection import HttpConnection, RequestRefused
from mulligan.policy.backends._servers.folders import TargetWeights
from mulligan.policy.backends._servers.opening import open_servers
from mulligan.policy.backends._servers.server import EngineServer
from mulligan.policy.backends.vllm import requests
from mulligan.policy.backends.vllm.server import VllmServer
from mulligan.policy.model_settings import ModelSettings


async def open_backend(settings: ModelSettings, folder: Path, first_version: int) -> VllmBackend:
    """Raises UnsupportedModel."""
    return await open_servers(VllmBackend, settings, folder, first_version)


class VllmBackend(ServersBackend):
    """vLLM itself aborts a request whose connection is closed."""

    server_type = VllmServer

    def _can_stream(self, ask: Ask) -> bool:
        """An update tells of itself through this object; that of a policy whose guest this one is does not."""
        return not requests.is_renormalised(ask) and not self.folders.is_guest

    def _lacks_adapter(self, error: RequestRefused) -> bool:
        return False  # vLLM answers HTTP 404 to that

    async def _generate_at(
        self, server: EngineServer, connection: HttpConnection, target: TargetWeights, ask: Ask
    ) -> Sampled:
        body = self._encode(ask, target, stream=False)
        try:
            answer = requests.decode(await connection.generate(body, self.request_seconds))
        except RequestRefused as error:
            raise self._refusal(ask, error) from error
        token_ids = answer.choice.token_ids
        check_tokens(token_ids, self.model.vocabulary_size)
        labels = answer.labels(0, len(token_ids))
        spans = self.pool.spans(target, labels, own=not ask.adapter)
        if requests.is_renormalised(ask):
            log_probs = await self._scored_anew(server, target, ask, token_ids, labels)
        else:
            log_probs = known(answer.log_probs, len(token_ids))
        return Sampled(tuple(token_ids), log_probs, self._stop_reason(ask, answer, token_ids), spans)

    async def _stream_at(
        self, server: EngineServer, connection: HttpConnection, target: TargetWeights, ask: Ask
    ) -> AsyncIterator[Sampled]:
        assert isinstance(server, VllmServer)
        changes = server.changes
        reader = requests.VllmStream(server.label)
        try:
            async for event in connection.generate_stream(self._encode(ask, target, stream=True), self.request_seconds):
                answer = requests.decode(event)
                check_tokens(answer.choice.token_ids, self.model.vocabulary_size)
                news = reader.read(answer, changed=changes != server.changes)
                if news is not None:
                    token_ids, log_probs, labels = news
                    spans = self.pool.spans(target, labels, own=not ask.adapter)
                    yield Sampled(tuple(token_ids), log_probs, self._stop_reason(ask, answer, reader.token_ids), spans)
        except RequestRefused as error:
            raise self._refusal(ask, error) from error

    def _encode(self, ask: Ask, target: TargetWeights, *, stream: bool) -> bytes:
        return requests.encode(
            ask,
            self._adapter(ask, target),
            self.model.context_length,
            self.model.end_of_turn_token_ids,
            stream=stream,
            priority=Feature.PRIORITY in self.model.features,
        )

    def _stop_reason(self, ask: Ask, answer: requests.VllmAnswer, token_ids: Sequence[int]) -> StopReason | None:
        if not answer.finished:
            return None
        by_string = isinstance(answer.choice.stop_reason, str)
        stopped = answer.choice.finish_reason == "stop"
        return stop_reason(token_ids, ask.sampling, self.model.end_of_turn_token_ids, stopped, by_string=by_string)
