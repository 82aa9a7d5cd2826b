"""The policy service as the trainer's `PolicyPort`, and what else it offers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import grpc
import structlog

from mulligan.common.channel import Connection, Endpoint
from mulligan.common.errors import DomainError, invalid_field
from mulligan.common.inference import (
    CallOptions,
    Completion,
    CompletionPart,
    PolicyInfo,
    PolicyVersion,
    Prompt,
    PublishedWeights,
    SamplingParams,
    WeightsKind,
)
from mulligan.policy.backend import Scored
from mulligan.policy.generate_queue import GenerateQueue
from mulligan.policy.v1 import policy_admin_service_pb2 as admin_pb
from mulligan.policy.v1 import policy_admin_service_pb2_grpc as admin_grpc
from mulligan.policy.v1 import policy_service_pb2 as pb
from mulligan.policy.v1 import policy_service_pb2_grpc as pb_grpc
from mulligan.policy.wire import (
    canary_to_proto,
    completions_from_proto,
    generate_to_proto,
    part_from_proto,
    policy_from_proto,
    score_to_proto,
    scored_from_proto,
    tokenize_to_proto,
    tokens_from_proto,
    version_from_proto,
    weights_kind_to_proto,
)

log = structlog.get_logger()
T = TypeVar("T")
_PLAIN = CallOptions()
_PAGE = 1000
_PIECE_BYTES = 2 * 2**20  # of an upload
# What grpc.aio says now and then in place of a refusal, when the server refuses an upload to which this side still
# writes. The refusal comes with another try.
_WRITTEN_TO_AN_ENDED_CALL = "Internal error from Core"
_TRIES = 8


class PolicyClient:
    """A client of one policy server. Calls raise DomainError as the contract says, CallFailed and ServiceUnavailable.

    Each call has a deadline in seconds: `timeout`, or `update_timeout` for new weights and models, which may be large
    and wait for the calls that run. An empty name is the default policy's; `options.policy` names the policy of a call.

    `upload_weights` remembers which full weights it sent last to each policy, and sends what changed since then where
    the server takes that and it is smaller (`sparse_weights.py`).
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        timeout: float = 300.0,
        update_timeout: float = 600.0,
        on_outage: Callable[[str], None] | None = None,
    ):
        self._connection = Connection(endpoint, on_outage)
        self._stub = pb_grpc.PolicyServiceStub(self._connection.channel)
        self._admin = Connection(endpoint, on_outage)  # its own: an upload would hold up the calls of the other one
        self._admin_stub = admin_grpc.PolicyAdminServiceStub(self._admin.channel)
        self._generate = GenerateQueue(self._connection, self._stub, timeout)
        self._sent: dict[str, tuple[Path, str]] = {}  # full weights by policy: their file and its SHA-256
        self._timeout = timeout
        self._update_timeout = update_timeout

    @property
    def waiting_for(self) -> str:
        """What calls wait for now; "" if none does."""
        return self._connection.waiting_for or self._admin.waiting_for

    async def info(self, policy: str = "") -> PolicyInfo:
        request = pb.GetPolicyRequest(policy=policy)
        response = await self._connection.call(self._stub.GetPolicy, request, timeout=self._timeout)
        return self._connection.read(lambda answer: policy_from_proto(answer.policy), response)

    async def policies(self) -> tuple[PolicyInfo, ...]:
        """All, by name."""
        request = pb.ListPoliciesRequest(page_size=_PAGE)
        return tuple(
            await self._connection.list_items(
                self._stub.ListPolicies,
                request,
                lambda page: [*map(policy_from_proto, page.policies)],
                timeout=self._timeout,
            )
        )

    async def generate(self, prompt: Prompt, sampling: SamplingParams, options: CallOptions = _PLAIN) -> Completion:
        [completion] = await self.sample(prompt, sampling, 1, options)
        return completion

    async def sample(
        self, prompt: Prompt, sampling: SamplingParams, n: int = 1, options: CallOptions = _PLAIN
    ) -> tuple[Completion, ...]:
        request = _encoded(generate_to_proto, prompt, sampling, n, options)
        response = await self._generate.put(request)
        return self._connection.read(lambda answer: completions_from_proto(answer, n), response)

    async def stream(
        self, prompt: Prompt, sampling: SamplingParams, n: int = 1, options: CallOptions = _PLAIN
    ) -> AsyncGenerator[CompletionPart, None]:
        """Closing it cancels the call. An error can come after the first parts; then the call is not repeated."""
        request = pb.StreamGenerateRequest(request=_encoded(generate_to_proto, prompt, sampling, n, options))
        async with self._connection.stream(self._stub.StreamGenerate, request, timeout=self._timeout) as parts:
            async for part in parts:
                yield self._connection.read(part_from_proto, part)

    async def score(
        self, sequences: Sequence[Sequence[int]], temperature: float = 1.0, options: CallOptions = _PLAIN
    ) -> Scored:
        request = score_to_proto(sequences, temperature, options)
        response = await self._connection.call(self._stub.Score, request, timeout=self._timeout)
        return self._connection.read(lambda answer: scored_from_proto(answer, sequences), response)

    async def tokenize(self, prompt: Prompt | str, options: CallOptions = _PLAIN) -> tuple[int, ...]:
        if isinstance(prompt, list):
            return ()  # as `generate`: nothing is added to token ids
        request = _encoded(tokenize_to_proto, prompt, options)
        response = await self._connection.call(self._stub.Tokenize, request, timeout=self._timeout)
        return self._connection.read(tokens_from_proto, response)

    async def load_model(
        self, policy: str, model: str, backend: str = "", options: Mapping[str, Any] | None = None
    ) -> tuple[int, str]:
        """The version that the model serves as, and its fingerprint. `options` are settings by dotted name."""
        encoded = {name: json.dumps(value) for name, value in (options or {}).items()}
        request = admin_pb.LoadModelRequest(policy=policy, model=model, backend=backend, options=encoded)
        response = await self._admin.call(self._admin_stub.LoadModel, request, timeout=self._update_timeout)
        return response.policy_version, response.fingerprint

    async def unload_model(self, policy: str) -> None:
        request = admin_pb.UnloadModelRequest(policy=policy)
        await self._admin.call(self._admin_stub.UnloadModel, request, timeout=self._update_timeout)

    async def update_weights(self, weights: PublishedWeights, policy: str = "") -> float | None:
        """The largest difference that the canary found; None without one."""
        request = admin_pb.UpdateWeightsRequest(
            policy_version=weights.policy_version,
            kind=weights_kind_to_proto(weights.kind),
            uri=weights.uri,
            sha256=weights.sha256,
            fingerprint=weights.fingerprint,
            policy=policy,
            canary=canary_to_proto(weights.canary),
        )
        response = await self._admin.call(self._admin_stub.UpdateWeights, request, timeout=self._update_timeout)
        return response.canary_difference if response.HasField("canary_difference") else None

    async def upload_weights(self, path: Path, kind: WeightsKind, sha256: str, policy: str = "") -> str:
        """Sends a safetensors file, or an adapter's folder, to a service that cannot read it. Returns the URI for one
        `update_weights`. If the service goes away meanwhile, all of it is sent again. Raises OSError, too."""
        header = admin_pb.UploadWeightsRequest.Header(policy=policy, kind=weights_kind_to_proto(kind), sha256=sha256)
        if kind is WeightsKind.FULL:
            uri = await self._upload_sparse(path, header) or await self._upload_file(path, header)
            self._sent[policy] = (path, sha256)
            return uri
        header.adapter_config = (path / "adapter_config.json").read_bytes()
        return await self._upload_file(path / "adapter_model.safetensors", header)

    async def _upload_sparse(self, path: Path, whole: admin_pb.UploadWeightsRequest.Header) -> str | None:
        """None where it cannot be: nothing was sent before, the server does not take it or does not keep its base, or
        the whole file is no greater."""
        try:
            from mulligan.policy.sparse_weights import SparseFile
        except ImportError:  # without numpy, which trainers have
            return None
        if whole.policy not in self._sent or not (await self.info(whole.policy)).sparse_uploads:
            return None
        base, base_sha256 = self._sent[whole.policy]
        sparse = await asyncio.to_thread(SparseFile.between, base, path)
        if sparse is None:
            return None
        header = admin_pb.UploadWeightsRequest.Header(size_bytes=sparse.size_bytes, base_sha256=base_sha256)
        header.MergeFrom(whole)
        try:
            return await self._upload(header, sparse.pieces)
        except DomainError as error:
            log.warning("the policy service refused a sparse file: it gets the whole one", cause=str(error))
            return None

    async def _upload_file(self, path: Path, header: admin_pb.UploadWeightsRequest.Header) -> str:
        header.size_bytes = (await asyncio.to_thread(path.stat)).st_size

        def pieces() -> Iterator[bytes]:
            with path.open("rb") as file:
                while piece := file.read(_PIECE_BYTES):
                    yield piece

        return await self._upload(header, pieces)

    async def _upload(self, header: admin_pb.UploadWeightsRequest.Header, pieces: Callable[[], Iterator[bytes]]) -> str:
        async def send(header: admin_pb.UploadWeightsRequest.Header, **options: Any) -> admin_pb.UploadWeightsResponse:
            tries = _TRIES
            while True:
                try:
                    response: admin_pb.UploadWeightsResponse = await self._admin_stub.UploadWeights(
                        _requests(header, pieces()), **options
                    )
                    return response
                except grpc.aio.AioRpcError as error:
                    tries -= 1
                    if error.details() != _WRITTEN_TO_AN_ENDED_CALL or not tries:
                        raise

        return (await self._admin.call(send, header, timeout=self._update_timeout)).uri

    async def versions(self, policy: str = "") -> tuple[PolicyVersion, ...]:
        """All that were ever seen, newest first."""
        request = admin_pb.ListVersionsRequest(policy=policy, page_size=_PAGE)
        return tuple(
            await self._admin.list_items(
                self._admin_stub.ListVersions,
                request,
                lambda page: [*map(version_from_proto, page.versions)],
                timeout=self._timeout,
            )
        )

    async def rollback(self, policy_version: int, policy: str = "") -> None:
        request = admin_pb.RollbackRequest(policy=policy, policy_version=policy_version)
        await self._admin.call(self._admin_stub.Rollback, request, timeout=self._update_timeout)

    async def release_memory(self, policy: str = "") -> None:
        request = admin_pb.ReleaseMemoryRequest(policy=policy)
        await self._admin.call(self._admin_stub.ReleaseMemory, request, timeout=self._update_timeout)

    async def resume_memory(self, policy: str = "") -> None:
        request = admin_pb.ResumeMemoryRequest(policy=policy)
        await self._admin.call(self._admin_stub.ResumeMemory, request, timeout=self._update_timeout)

    async def close(self) -> None:
        await self._generate.close()
        await self._connection.close()
        await self._admin.close()


def _encoded(encode: Callable[..., T], *parts: Any) -> T:
    try:
        return encode(*parts)
    except UnicodeError as error:
        raise invalid_field("messages", f"text that UTF-8 can carry ({error})") from error


async def _requests(
    header: admin_pb.UploadWeightsRequest.Header, pieces: Iterator[bytes]
) -> AsyncIterator[admin_pb.UploadWeightsRequest]:
    yield admin_pb.UploadWeightsRequest(header=header)
    while piece := await asyncio.to_thread(next, pieces, b""):
        yield admin_pb.UploadWeightsRequest(chunk=piece)
