"""Client of `LearnerService`: the algorithm's learner port over gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Self

import grpc
import structlog

from mulligan.common import numbers
from mulligan.common.channel import Connection, Endpoint
from mulligan.common.errors import CallFailed, DomainError, ServiceUnavailable
from mulligan.common.inference import CanaryProbe, PublishedWeights, WeightsKind
from mulligan.common.tasks import cancel, to_its_end
from mulligan.policy.wire import canary_from_proto
from mulligan.trainer.data import Datum, ModelLimits, token_count
from mulligan.trainer.learner.metrics import merge
from mulligan.trainer.learner.settings import LearnerSpec
from mulligan.trainer.learner.wire import data_to_proto, duration, loss_to_proto, spec_to_proto
from mulligan.trainer.objective import InputKind, inputs_of
from mulligan.trainer.settings import LossSettings
from mulligan.trainer.v1 import learner_service_pb2 as pb
from mulligan.trainer.v1 import learner_service_pb2_grpc

log = structlog.get_logger()
CALL_SECONDS = 3600.0  # large models take long to train, load and save
DELETE_SECONDS = 10.0
LEASE_SECONDS = 600.0  # how long a server keeps a learner whose client is gone
FOLLOW_SECONDS = 1.0  # between questions how far a call is
RENEWALS = 5  # per lease, while there are no other calls: sampling may take hours
CALL_BYTES = 8 * 2**20  # of data in one call; more are sent in several calls, whose gradients add up


class LearnerClient:
    """The LearnerPort over gRPC. It numbers its calls, so a call that is repeated after a lost answer counts once.

    `create` creates the learner, or finds it, and renews its lease until `close`. `forward` and `forward_backward`
    split large data over several calls. Not for concurrent use.

    After an error other than a DomainError, create the learner again with the same ids and load a checkpoint.
    """

    def __init__(self, endpoint: Endpoint, learner_id: str, owner: str, on_outage: Callable[[str], None] | None = None):
        self._connection = Connection(endpoint, on_outage)
        self._stub = learner_service_pb2_grpc.LearnerServiceStub(self._connection.channel)
        self._ids = {"learner_id": learner_id, "owner": owner}
        self._next_call = 1  # the `sequence` of the contract
        self._renewal: asyncio.Task[None] | None = None
        self.share_done = 0.0
        self.fingerprint = ""
        self.limits = ModelLimits(0, 0)
        self.adapted_layers: tuple[str, ...] = ()

    @classmethod
    async def create(
        cls,
        endpoint: Endpoint,
        learner_id: str,
        owner: str,
        spec: LearnerSpec,
        on_outage: Callable[[str], None] | None = None,
    ) -> Self:
        """Returns when the learner is ready. Raises DomainError LEARNER_OWNED, LEARNER_CONFLICT, CAPACITY_REACHED,
        MODEL_NOT_FOUND, UNSUPPORTED_MODEL or INVALID_FIELD."""
        client = cls(endpoint, learner_id, owner, on_outage)
        await client.open(spec)
        return client

    async def open(self, spec: LearnerSpec) -> None:
        """As `create`, for a client that has no learner yet. After an error the client is closed."""
        learner_id, owner = self._ids["learner_id"], self._ids["owner"]
        request = pb.CreateLearnerRequest(learner_id=learner_id, owner=owner, lease=duration(LEASE_SECONDS))
        spec_to_proto(spec, request)
        try:
            response = await self._connection.call(self._stub.CreateLearner, request, timeout=CALL_SECONDS)
            self.limits = self._connection.read(_limits, response)
        except asyncio.CancelledError:  # it may have been made all the same, and would take a place during its lease
            await to_its_end(self.close())
            raise
        except BaseException:
            await self._connection.close()
            raise
        self._next_call = response.next_sequence
        self.fingerprint = response.fingerprint
        self._renewal = asyncio.create_task(self._renew())
        self.adapted_layers = tuple(response.lora_target_modules)

    @property
    def waiting_for(self) -> str:
        """What calls wait for now; "" if none does."""
        return self._connection.waiting_for

    async def _renew(self) -> None:
        request = pb.GetLearnerRequest(learner_id=self._ids["learner_id"])
        while True:
            await asyncio.sleep(LEASE_SECONDS / RENEWALS)
            try:
                await self._stub.GetLearner(
                    request, timeout=LEASE_SECONDS / RENEWALS, metadata=self._connection.metadata
                )
            except grpc.aio.AioRpcError as error:  # the owner's next call raises it
                log.warning("lease not renewed", **self._ids, cause=error.details())
                if error.code() is grpc.StatusCode.NOT_FOUND:
                    return

    async def forward(self, data: Sequence[Datum]) -> list[tuple[float, ...]]:
        results: list[tuple[float, ...]] = []
        self.share_done = 0.0
        for part in self._parts(data):
            request = pb.ForwardRequest(**self._ids, data=data_to_proto(part))
            async with self._followed(part, data):
                response = await self._connection.call(self._stub.Forward, request, timeout=CALL_SECONDS)
            results += self._connection.read(partial(_log_probs, part), response)
        return results

    async def forward_backward(self, data: Sequence[Datum], loss: LossSettings) -> dict[str, float]:
        """Sends large data in several calls. If a later one fails, the gradients of the earlier ones stay."""
        metrics: list[dict[str, float]] = []
        self.share_done = 0.0
        for part in self._parts(data):
            request = pb.ForwardBackwardRequest(
                **self._ids, sequence=self._next_call, data=data_to_proto(part), loss=loss_to_proto(loss)
            )
            async with self._followed(part, data):
                response = await self._connection.call(self._stub.ForwardBackward, request, timeout=CALL_SECONDS)
            self._next_call += 1
            metrics.append(dict(response.metrics))
        return self._connection.read(lambda _: merge(metrics), response)

    async def optim_step(self) -> dict[str, float]:
        request = pb.OptimStepRequest(**self._ids, sequence=self._next_call)
        response = await self._connection.call(self._stub.OptimStep, request, timeout=CALL_SECONDS)
        self._next_call += 1
        return dict(response.metrics)

    async def save_checkpoint(self, name: str) -> None:
        request = pb.SaveCheckpointRequest(**self._ids, name=name)
        await self._connection.call(self._stub.SaveCheckpoint, request, timeout=CALL_SECONDS)

    async def load_checkpoint(self, name: str) -> None:
        """Raises DomainError CHECKPOINT_NOT_FOUND or CHECKPOINT_MISMATCH."""
        request = pb.LoadCheckpointRequest(**self._ids, name=name)
        response = await self._connection.call(self._stub.LoadCheckpoint, request, timeout=CALL_SECONDS)
        self._next_call = response.next_sequence

    async def publish_weights(self, policy_version: int, keep: Collection[int] = ()) -> PublishedWeights:
        request = pb.PublishWeightsRequest(**self._ids, policy_version=policy_version, keep_versions=keep)
        response = await self._connection.call(self._stub.PublishWeights, request, timeout=CALL_SECONDS)
        kind = WeightsKind.LORA if response.lora else WeightsKind.FULL
        canary = self._connection.read(_canary, response)
        return PublishedWeights(policy_version, kind, response.uri, response.sha256, response.fingerprint, canary)

    async def compute_seconds(self) -> float:
        """That the learner has computed since it was created."""
        request = pb.GetLearnerRequest(learner_id=self._ids["learner_id"])
        response = await self._connection.call(self._stub.GetLearner, request, timeout=CALL_SECONDS)
        return self._connection.read(_compute_seconds, response)

    async def delete(self) -> None:
        """Deletes the learner; succeeds if it is unknown. Raises DomainError LEARNER_OWNED for another owner's."""
        request = pb.DeleteLearnerRequest(**self._ids)
        await self._connection.call(self._stub.DeleteLearner, request, timeout=DELETE_SECONDS)

    async def close(self) -> None:
        """Deletes the learner and closes the connection. A failure is logged."""
        try:
            async with asyncio.timeout(DELETE_SECONDS):
                await self.delete()
        except (DomainError, CallFailed, ServiceUnavailable, TimeoutError) as error:
            log.warning("learner not deleted", **self._ids, cause=str(error))
        finally:
            if self._renewal is not None:
                self._renewal.cancel()
            await self._connection.close()

    @asynccontextmanager
    async def _followed(self, part: Sequence[Datum], data: Sequence[Datum]) -> AsyncIterator[None]:
        """Around the call with a part of the data: `share_done` grows meanwhile."""
        before = self.share_done
        share = token_count(part) / max(1, token_count(data))
        following = asyncio.create_task(self._follow(before, share))
        try:
            yield
            self.share_done = before + share
        except BaseException:
            self.share_done = 0.0
            raise
        finally:
            await cancel(following)

    async def _follow(self, before: float, share: float) -> None:
        """Asks for the progress of a call that has this share of the data."""
        request = pb.GetLearnerRequest(learner_id=self._ids["learner_id"])
        while True:
            await asyncio.sleep(FOLLOW_SECONDS)
            with suppress(grpc.aio.AioRpcError):  # the call itself says what is wrong
                answer = await self._stub.GetLearner(request, timeout=CALL_SECONDS, metadata=self._connection.metadata)
                if answer.total_tokens > 0:
                    of_part = min(1.0, max(0.0, answer.done_tokens / answer.total_tokens))
                    self.share_done = before + share * of_part

    def _parts(self, data: Sequence[Datum]) -> Iterator[Sequence[Datum]]:
        """Splits the data so that each part fits into one message. Without data: one empty part."""
        limit = min(CALL_BYTES, self._connection.endpoint.max_message_bytes // 2)
        start = 0
        size = 0
        for index, datum in enumerate(data):
            cost = _message_bytes(datum)
            if size + cost > limit and index > start:
                yield data[start:index]
                start = index
                size = 0
            size += cost
        yield data[start:]


def _log_probs(data: Sequence[Datum], response: pb.ForwardResponse) -> list[tuple[float, ...]]:
    """Raises ValueError unless there is one valid log-probability per trained token."""
    found = [tuple(item.log_probs) for item in response.log_probs]
    if [len(log_probs) for log_probs in found] != [sum(datum.loss_mask) for datum in data]:
        raise ValueError(f"log-probabilities that are not one for each trained token of {len(data)} data")
    for log_probs in found:
        numbers.log_probs("log_probs", log_probs)
    return found


def _limits(response: pb.CreateLearnerResponse) -> ModelLimits:
    numbers.not_negative("vocabulary_size", [response.vocabulary_size])
    numbers.not_negative("context_length", [response.context_length])
    return ModelLimits(response.vocabulary_size, response.context_length)


def _canary(response: pb.PublishWeightsResponse) -> tuple[CanaryProbe, ...]:
    probes = canary_from_proto(response.canary)
    for probe in probes:
        numbers.token_ids("canary.token_ids", probe.token_ids)
        numbers.log_probs("canary.log_probs", probe.log_probs)
    return probes


def _compute_seconds(response: pb.GetLearnerResponse) -> float:
    numbers.not_negative("compute_seconds", [response.compute_seconds])
    return response.compute_seconds


def _message_bytes(datum: Datum) -> int:
    """An estimate of a datum's bytes: per token 5 for the id, 1 for the mask, 4 for each of two log-probabilities; 8
    for each further value of its objective."""
    size = 14 * len(datum.token_ids) + len(datum.datum_id.encode()) + len(datum.branch.encode()) + 100
    values = inputs_of(datum.objective, InputKind.TOKEN_VALUES)
    further = sum(len(values[name]) for name in values.keys() - {"rollout_log_probs", "old_log_probs"})
    others = sum(len(tokens.token_ids) for tokens in inputs_of(datum.objective, InputKind.TOKENS).values())
    return size + 8 * further + 14 * others
