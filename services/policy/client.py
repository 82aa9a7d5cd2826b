"""The policy service as the trainer's `PolicyPort`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from mulligan.policy.v1 import policy_service_pb2 as pb
from mulligan.policy.v1 import policy_service_pb2_grpc as pb_grpc

from services.common.channel import Connection, Endpoint
from services.common.errors import invalid_field
from services.common.types import (
    Completion,
    Continuation,
    Message,
    PolicyInfo,
    Prompt,
    PublishedWeights,
    SamplingParams,
)
from services.common.wire import messages_to_proto, spans_from_proto, stop_reason_from_proto, weights_kind_to_proto


class PolicyClient:
    """Each call has a deadline in seconds: `timeout`, or `update_timeout` for new weights, which may be large and wait
    for the calls that run. `admin_token` is sent with updates of the weights alone."""

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        admin_token: str | None = None,
        timeout: float = 300.0,
        update_timeout: float = 600.0,
        on_outage: Callable[[str], None] | None = None,
    ):
        self._connection = Connection(endpoint, on_outage)
        self._stub = pb_grpc.PolicyServiceStub(self._connection.channel)
        self._admin = Connection(replace(endpoint, token=admin_token or endpoint.token), on_outage)
        self._admin_stub = pb_grpc.PolicyAdminServiceStub(self._admin.channel)
        self._timeout, self._update_timeout = timeout, update_timeout

    async def info(self) -> PolicyInfo:
        response = await self._connection.call(self._stub.GetPolicy, pb.GetPolicyRequest(), timeout=self._timeout)
        return PolicyInfo(
            model=response.model,
            fingerprint=response.fingerprint,
            policy_version=response.policy_version,
            context_length=response.context_length,
            vocabulary_size=response.vocabulary_size,
            end_of_turn_token_ids=tuple(response.end_of_turn_token_ids),
            rewrites_history=response.rewrites_history,
            deterministic=response.deterministic,
            compute_seconds=response.compute_seconds,
        )

    async def generate(
        self, prompt: Prompt, sampling: SamplingParams, *, request_id: str = "", min_policy_version: int | None = None
    ) -> Completion:
        request = pb.GenerateRequest(
            request_id=request_id, sampling=_sampling(sampling), min_policy_version=min_policy_version
        )
        if isinstance(prompt, list):
            request.token_ids.ids.extend(prompt)
        elif isinstance(prompt, Continuation):
            request.continuation.CopyFrom(_continuation(prompt))
        else:
            request.messages.CopyFrom(_messages(prompt))
        response = await self._connection.call(self._stub.Generate, request, timeout=self._timeout)
        return Completion(
            prompt_token_ids=tuple(response.prompt_token_ids),
            token_ids=tuple(response.token_ids),
            log_probs=tuple(response.log_probs),
            text=response.text,
            stop_reason=stop_reason_from_proto(response.stop_reason),
            policy_versions=spans_from_proto(response.policy_versions),
        )

    async def tokenize(self, prompt: Prompt | str) -> tuple[int, ...]:
        if isinstance(prompt, list):
            return ()  # as `generate`: nothing is added to token ids
        if isinstance(prompt, str):
            request = pb.TokenizeRequest(text=prompt)
        elif isinstance(prompt, Continuation):
            request = pb.TokenizeRequest(continuation=_continuation(prompt))
        else:
            request = pb.TokenizeRequest(messages=_messages(prompt))
        response = await self._connection.call(self._stub.Tokenize, request, timeout=self._timeout)
        return tuple(response.token_ids)

    async def score(
        self, sequences: Sequence[Sequence[int]], temperature: float, *, min_policy_version: int | None = None
    ) -> tuple[list[tuple[float, ...]], int]:
        """Log-probabilities of each token after the first, and the version that computed them."""
        request = pb.ScoreRequest(
            sequences=[pb.TokenIds(ids=sequence) for sequence in sequences],
            temperature=temperature,
            min_policy_version=min_policy_version,
        )
        response = await self._connection.call(self._stub.Score, request, timeout=self._timeout)
        return [tuple(scores.log_probs) for scores in response.scores], response.policy_version

    async def update_weights(self, weights: PublishedWeights) -> None:
        request = pb.UpdateWeightsRequest(
            policy_version=weights.policy_version,
            kind=weights_kind_to_proto(weights.kind),
            uri=weights.uri,
            sha256=weights.sha256,
            fingerprint=weights.fingerprint,
        )
        await self._admin.call(self._admin_stub.UpdateWeights, request, timeout=self._update_timeout)

    async def close(self) -> None:
        await self._connection.close()
        await self._admin.close()


def _messages(messages: Sequence[Message]) -> pb.Messages:
    try:
        return pb.Messages(messages=messages_to_proto(messages))
    except ValueError as error:
        raise invalid_field("messages", f"text that UTF-8 can carry ({error})") from error


def _continuation(continuation: Continuation) -> pb.Continuation:
    return pb.Continuation(
        token_ids=continuation.token_ids,
        turn_closed=continuation.turn_closed,
        messages=_messages(continuation.messages).messages,
    )


def _sampling(params: SamplingParams) -> pb.SamplingParams:
    return pb.SamplingParams(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        max_tokens=params.max_tokens,
        seed=params.seed,
        stop=params.stop,
    )
