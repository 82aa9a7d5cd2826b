"""The policy service on the wire: protobuf in, `Policy`, protobuf out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import grpc
from mulligan.policy.v1 import policy_service_pb2 as pb
from mulligan.policy.v1 import policy_service_pb2_grpc as pb_grpc
from pydantic import SecretStr

from services.common.types import Continuation, Prompt, PublishedWeights, SamplingParams
from services.common.wire import (
    messages_from_proto,
    spans_to_proto,
    stop_reason_to_proto,
    weights_kind_from_proto,
)
from services.policy.config import PolicySettings
from services.policy.policy import Policy

SERVICE = "mulligan.policy.v1.PolicyService"
ADMIN_SERVICE = "mulligan.policy.v1.PolicyAdminService"
_DEFAULTS = SamplingParams()


def add_to_server(server: grpc.aio.Server, policy: Policy) -> list[str]:
    pb_grpc.add_PolicyServiceServicer_to_server(PolicyServicer(policy), server)
    pb_grpc.add_PolicyAdminServiceServicer_to_server(PolicyAdminServicer(policy), server)
    return [SERVICE, ADMIN_SERVICE]


def credentials(settings: PolicySettings) -> Mapping[str, SecretStr | None]:
    """The administration of weights has a token of its own; without one it needs the token of all calls."""
    return {ADMIN_SERVICE: settings.admin_token} if settings.admin_token is not None else {}


class PolicyServicer(pb_grpc.PolicyServiceServicer):
    def __init__(self, policy: Policy):
        self._policy = policy

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:
        completion = await self._policy.generate(
            _prompt(request, request.WhichOneof("prompt")),
            _sampling(request.sampling),
            request_id=request.request_id,
            min_policy_version=_optional(request, "min_policy_version"),
        )
        return pb.GenerateResponse(
            prompt_token_ids=completion.prompt_token_ids,
            token_ids=completion.token_ids,
            log_probs=completion.log_probs,
            text=completion.text,
            stop_reason=stop_reason_to_proto(completion.stop_reason),
            policy_versions=spans_to_proto(completion.policy_versions),
        )

    async def Score(self, request: pb.ScoreRequest, context: Any) -> pb.ScoreResponse:
        scored = await self._policy.score(
            [sequence.ids for sequence in request.sequences],
            request.temperature if request.HasField("temperature") else 1.0,
            min_policy_version=_optional(request, "min_policy_version"),
        )
        return pb.ScoreResponse(
            scores=[pb.ScoreResponse.Scores(log_probs=row) for row in scored.log_probs],
            policy_version=scored.policy_version,
        )

    async def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        kind = request.WhichOneof("input")
        prompt = request.text if kind == "text" else _prompt(request, kind)
        return pb.TokenizeResponse(token_ids=await self._policy.tokenize(prompt))

    async def GetPolicy(self, request: pb.GetPolicyRequest, context: Any) -> pb.GetPolicyResponse:
        info = await self._policy.info()
        return pb.GetPolicyResponse(
            model=info.model,
            fingerprint=info.fingerprint,
            policy_version=info.policy_version,
            context_length=info.context_length,
            vocabulary_size=info.vocabulary_size,
            end_of_turn_token_ids=info.end_of_turn_token_ids,
            rewrites_history=info.rewrites_history,
            deterministic=info.deterministic,
            compute_seconds=info.compute_seconds,
        )


class PolicyAdminServicer(pb_grpc.PolicyAdminServiceServicer):
    def __init__(self, policy: Policy):
        self._policy = policy

    async def UpdateWeights(self, request: pb.UpdateWeightsRequest, context: Any) -> pb.UpdateWeightsResponse:
        kind = weights_kind_from_proto(request.kind)
        await self._policy.update_weights(
            PublishedWeights(request.policy_version, kind, request.uri, request.sha256, request.fingerprint)
        )
        return pb.UpdateWeightsResponse(policy_version=request.policy_version)


def _prompt(request: pb.GenerateRequest | pb.TokenizeRequest, kind: str | None) -> Prompt:
    if kind == "messages":
        return messages_from_proto(request.messages.messages)
    if kind == "continuation":
        given = request.continuation
        return Continuation(tuple(given.token_ids), given.turn_closed, messages_from_proto(given.messages))
    assert isinstance(request, pb.GenerateRequest)
    return list(request.token_ids.ids)


def _sampling(params: pb.SamplingParams) -> SamplingParams:
    def given(name: str) -> Any:
        return getattr(params, name) if params.HasField(name) else getattr(_DEFAULTS, name)  # type: ignore[arg-type]

    return SamplingParams(
        temperature=given("temperature"),
        top_p=given("top_p"),
        top_k=given("top_k"),
        max_tokens=given("max_tokens"),
        seed=given("seed"),
        stop=tuple(params.stop),
    )


def _optional(request: pb.GenerateRequest | pb.ScoreRequest, name: Any) -> int | None:
    return getattr(request, name) if request.HasField(name) else None
