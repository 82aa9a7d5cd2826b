"""The policy service on the wire: protobuf in, `Policies`, protobuf out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc

from mulligan.common.errors import DomainError, Reason
from mulligan.common.inference import CallOptions, Prompt, PublishedWeights
from mulligan.common.paging import DEFAULT_PAGE_SIZE, page_position, page_token
from mulligan.common.request_log import RequestLog
from mulligan.common.tasks import cancel
from mulligan.common.tracing import span
from mulligan.common.wire import tools_from_proto
from mulligan.policy.policies import Policies
from mulligan.policy.policy import Policy
from mulligan.policy.uploads import UploadHeader
from mulligan.policy.v1 import policy_admin_service_pb2 as admin_pb
from mulligan.policy.v1 import policy_admin_service_pb2_grpc as admin_grpc
from mulligan.policy.v1 import policy_service_pb2 as pb
from mulligan.policy.v1 import policy_service_pb2_grpc as pb_grpc
from mulligan.policy.wire import (
    canary_from_proto,
    completions_to_proto,
    generate_error_to_proto,
    many_to_proto,
    options_from_proto,
    part_to_proto,
    policy_to_proto,
    prompt_from_proto,
    sampling_from_proto,
    score_options_from_proto,
    text_from_proto,
    version_to_proto,
    weights_kind_from_proto,
)

SERVICE = "mulligan.policy.v1.PolicyService"
ADMIN_SERVICE = "mulligan.policy.v1.PolicyAdminService"
_BYTES_OF_A_ROUND = 20_000


def add_to_server(server: grpc.aio.Server, policies: Policies) -> list[str]:
    pb_grpc.add_PolicyServiceServicer_to_server(PolicyServicer(policies), server)
    admin_grpc.add_PolicyAdminServiceServicer_to_server(PolicyAdminServicer(policies), server)
    return [SERVICE, ADMIN_SERVICE]


def health(policies: Policies) -> dict[str, bool]:
    """Whether calls are answered, by name of the health service: each policy's, and PolicyService's as a whole, which
    is the default policy's. A policy that is being updated is healthy: its calls only wait."""
    found = {f"{SERVICE}/{deployment.name}": deployment.healthy for deployment in policies.deployments}
    found |= {f"{SERVICE}/{name}": False for name in policies.damaged}
    return {**found, SERVICE: found[f"{SERVICE}/{policies.settings.default_policy}"]}


class PolicyServicer(pb_grpc.PolicyServiceServicer):
    def __init__(self, policies: Policies):
        self._policies = policies

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:
        policy = self._policies.get(request.policy)
        return completions_to_proto(
            await policy.sample(
                _prompt(policy, request),
                sampling_from_proto(request.sampling),
                request.n or 1,
                options_from_proto(request),
            )
        )

    async def GenerateMany(
        self, request: pb.GenerateManyRequest, context: Any
    ) -> AsyncIterator[pb.GenerateManyResponse]:
        finished: asyncio.Queue[asyncio.Task[pb.GenerateManyResponse.Item]] = asyncio.Queue()
        tasks: list[asyncio.Task[pb.GenerateManyResponse.Item]] = []
        begun = 0  # bytes of the requests that begin in one round of the event loop
        try:
            for index, one in enumerate(request.requests):
                tasks.append(asyncio.create_task(self._item(index, one)))
                tasks[-1].add_done_callback(finished.put_nowait)
                begun += one.ByteSize()
                if begun > _BYTES_OF_A_ROUND:
                    await asyncio.sleep(0)  # other calls are not to wait until all these prompts are rendered
                    begun = 0
            left = len(tasks)
            while left:
                items = [(await finished.get()).result()]
                while not finished.empty():
                    items.append(finished.get_nowait().result())
                left -= len(items)
                for message in many_to_proto(items):
                    yield message
        finally:
            await cancel(*tasks)

    async def _item(self, index: int, request: pb.GenerateRequest) -> pb.GenerateManyResponse.Item:
        with span("generate", request_id=request.request_id), RequestLog("GenerateMany", request) as logged:
            try:
                return pb.GenerateManyResponse.Item(index=index, response=await self.Generate(request, None))
            except DomainError as error:
                logged.failed(error)
                failed: Exception = error
            except Exception as error:  # noqa: BLE001 - not declared: INTERNAL
                logged.broke(error)
                failed = error
            return pb.GenerateManyResponse.Item(index=index, error=generate_error_to_proto(failed))

    async def StreamGenerate(
        self, request: pb.StreamGenerateRequest, context: Any
    ) -> AsyncIterator[pb.StreamGenerateResponse]:
        asked = request.request
        policy = self._policies.get(asked.policy)
        stream = policy.stream(
            _prompt(policy, asked), sampling_from_proto(asked.sampling), asked.n or 1, options_from_proto(asked)
        )
        async with aclosing(stream) as parts:
            async for part in parts:
                yield part_to_proto(part)

    async def Score(self, request: pb.ScoreRequest, context: Any) -> pb.ScoreResponse:
        scored = await self._policies.get(request.policy).score(
            [sequence.ids for sequence in request.sequences],  # not copied: the engine does so when their turn comes
            request.temperature if request.HasField("temperature") else 1.0,
            score_options_from_proto(request),
        )
        return pb.ScoreResponse(
            scores=[pb.ScoreResponse.Scores(log_probs=row) for row in scored.log_probs],
            policy_version=scored.policy_version,
        )

    async def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        options = CallOptions(
            policy=request.policy, session_id=request.session_id, tools=tools_from_proto(request.tools)
        )
        return pb.TokenizeResponse(token_ids=await self._policies.tokenize(text_from_proto(request), options))

    async def GetPolicy(self, request: pb.GetPolicyRequest, context: Any) -> pb.GetPolicyResponse:
        return pb.GetPolicyResponse(policy=policy_to_proto(await self._policies.info(request.policy)))

    async def ListPolicies(self, request: pb.ListPoliciesRequest, context: Any) -> pb.ListPoliciesResponse:
        start = page_position(request.page_token, "policies")
        end = start + (request.page_size or DEFAULT_PAGE_SIZE)
        infos = await self._policies.policies()
        return pb.ListPoliciesResponse(
            policies=[policy_to_proto(info) for info in infos[start:end]],
            next_page_token=page_token(end, "policies") if end < len(infos) else "",
        )


class PolicyAdminServicer(admin_grpc.PolicyAdminServiceServicer):
    def __init__(self, policies: Policies):
        self._policies = policies

    async def LoadModel(self, request: admin_pb.LoadModelRequest, context: Any) -> admin_pb.LoadModelResponse:
        info = await self._policies.load_model(request.policy, request.model, request.backend, request.options)
        return admin_pb.LoadModelResponse(policy_version=info.policy_version, fingerprint=info.fingerprint)

    async def UnloadModel(self, request: admin_pb.UnloadModelRequest, context: Any) -> admin_pb.UnloadModelResponse:
        await self._policies.unload_model(request.policy)
        return admin_pb.UnloadModelResponse()

    async def UpdateWeights(
        self, request: admin_pb.UpdateWeightsRequest, context: Any
    ) -> admin_pb.UpdateWeightsResponse:
        weights = PublishedWeights(
            policy_version=request.policy_version,
            kind=weights_kind_from_proto(request.kind),
            uri=request.uri,
            sha256=request.sha256,
            fingerprint=request.fingerprint,
            canary=canary_from_proto(request.canary),
        )
        difference = await self._policies.update_weights(weights, request.policy)
        return admin_pb.UpdateWeightsResponse(policy_version=request.policy_version, canary_difference=difference)

    async def UploadWeights(
        self, requests: AsyncIterator[admin_pb.UploadWeightsRequest], context: Any
    ) -> admin_pb.UploadWeightsResponse:
        first = await self._policies.uploads.first(requests)
        if first is None or not first.HasField("header"):
            raise DomainError(Reason.UPLOAD_INCOMPLETE, "a header comes first")
        sent = first.header
        policy = self._policies.get(sent.policy)
        kind = weights_kind_from_proto(sent.kind)
        header = UploadHeader(kind, sent.size_bytes, sent.sha256, sent.adapter_config, sent.base_sha256)
        return admin_pb.UploadWeightsResponse(uri=await policy.receive_weights(header, _chunks(requests)))

    async def ListVersions(self, request: admin_pb.ListVersionsRequest, context: Any) -> admin_pb.ListVersionsResponse:
        size = request.page_size or DEFAULT_PAGE_SIZE
        below = page_position(request.page_token, "versions", request.policy)
        found = await self._policies.versions(request.policy, below if request.page_token else None, size + 1)
        more = page_token(found[size - 1].policy_version, "versions", request.policy) if len(found) > size else ""
        return admin_pb.ListVersionsResponse(versions=map(version_to_proto, found[:size]), next_page_token=more)

    async def Rollback(self, request: admin_pb.RollbackRequest, context: Any) -> admin_pb.RollbackResponse:
        await self._policies.rollback(request.policy_version, request.policy)
        return admin_pb.RollbackResponse(policy_version=request.policy_version)

    async def ReleaseMemory(
        self, request: admin_pb.ReleaseMemoryRequest, context: Any
    ) -> admin_pb.ReleaseMemoryResponse:
        await self._policies.release_memory(request.policy)
        return admin_pb.ReleaseMemoryResponse()

    async def ResumeMemory(self, request: admin_pb.ResumeMemoryRequest, context: Any) -> admin_pb.ResumeMemoryResponse:
        await self._policies.resume_memory(request.policy)
        return admin_pb.ResumeMemoryResponse()


def _prompt(policy: Policy, request: pb.GenerateRequest) -> Prompt:
    """Token ids that are refused never become objects, which take ten times the memory."""
    if count := len(request.token_ids.ids) or len(request.continuation.token_ids):
        policy.check_count(request.WhichOneof("prompt") or "", count, request.session_id)
    return prompt_from_proto(request)


async def _chunks(requests: AsyncIterator[admin_pb.UploadWeightsRequest]) -> AsyncIterator[bytes]:
    async for request in requests:
        if not request.HasField("chunk"):
            raise DomainError(Reason.UPLOAD_INCOMPLETE, "a second header")
        yield request.chunk
