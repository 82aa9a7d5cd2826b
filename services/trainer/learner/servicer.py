"""`LearnerService` of `mulligan.trainer.v1`.

One worker thread makes all changes. It checks a call's number, does the work and stores the answer in one go, so a
caller that gives up in between gets the stored answer when it calls again.

With several processes (`ranks`), the first one serves. It passes on each request that makes a learner, or that a
learner executes, and `follow` does the same in the other processes.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeVar

import grpc
import structlog
from google.protobuf.message import Message

from mulligan import models
from mulligan.common.errors import DomainError, Reason
from mulligan.common.inference import WeightsKind
from mulligan.common.run_credentials import RunGuard
from mulligan.policy.wire import canary_to_proto
from mulligan.trainer.learner.held import UNANSWERED_SECONDS, HeldLearner, HeldLearners
from mulligan.trainer.learner.learner import Learner
from mulligan.trainer.learner.ranks import FailedTogether, Ranks
from mulligan.trainer.learner.settings import LearnerServerSettings
from mulligan.trainer.learner.storage import is_name
from mulligan.trainer.learner.wire import (
    data_from_proto,
    duration,
    lease_from_proto,
    loss_from_proto,
    model_to_proto,
    spec_from_proto,
)
from mulligan.trainer.v1 import learner_service_pb2 as pb
from mulligan.trainer.v1 import learner_service_pb2_grpc

log = structlog.get_logger()
Context = Any
R = TypeVar("R")


# What a learner does for a request.
_WORK: dict[type[Message], Callable[..., Any]] = {
    pb.ForwardRequest: lambda learner, request: learner.forward(data_from_proto(request.data)),
    pb.ForwardBackwardRequest: lambda learner, request: learner.forward_backward(
        data_from_proto(request.data), loss_from_proto(request.loss)
    ),
    pb.OptimStepRequest: lambda learner, request: learner.optim_step(),
    pb.SaveCheckpointRequest: lambda learner, request, **state: learner.save_checkpoint(request.name, **state),
    pb.LoadCheckpointRequest: lambda learner, request: learner.load_checkpoint(request.name),
    pb.PublishWeightsRequest: lambda learner, request: learner.publish_weights(
        request.policy_version, request.keep_versions
    ),
}


def follow(settings: LearnerServerSettings, ranks: Ranks) -> None:
    """In a process other than the first: does what the first one is asked for, until it ends."""
    learners: dict[str, Learner] = {}
    while True:
        try:
            with ranks.in_step():
                call = ranks.next_call()
                if call is None:
                    return
                request = getattr(pb, call[0]).FromString(call[1])
                if isinstance(request, pb.CreateLearnerRequest):
                    learner = Learner(request.learner_id, spec_from_proto(request), settings, ranks)
                    learners[request.learner_id] = learner
                elif isinstance(request, pb.DeleteLearnerRequest):
                    learners.pop(request.learner_id, None)
                else:
                    _WORK[type(request)](learners[request.learner_id], request)
        except (DomainError, FailedTogether) as error:  # the caller gets it from the first process
            log.info("call failed", rank=ranks.rank, cause=str(error))


def add_to_server(server: grpc.aio.Server, servicer: LearnerServicer) -> list[str]:
    learner_service_pb2_grpc.add_LearnerServiceServicer_to_server(servicer, server)
    return [pb.DESCRIPTOR.services_by_name["LearnerService"].full_name]


class LearnerServicer(learner_service_pb2_grpc.LearnerServiceServicer):
    """The learners of a server, over gRPC.

    Each call checks the caller's credential, finds its learner, checks the owner, and does its work on the worker
    thread (`_with_learner`). Calls that change gradients or weights are numbered: `_exactly_once` answers a repeated
    call with the stored answer and refuses any other number. An unexpected error in such a call deletes the learner. A
    task deletes learners whose lease is over.
    """

    def __init__(self, settings: LearnerServerSettings, ranks: Ranks | None = None, guard: RunGuard | None = None):
        self._settings = settings
        self._guard = guard or RunGuard()
        self._ranks = ranks or Ranks()
        self._held = HeldLearners(settings.max_learners, self._removed)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="learner")
        self._leases: asyncio.Task[None] | None = None

    async def close(self) -> None:
        """Waits for the current work, then deletes all learners."""
        if self._leases is not None:
            self._leases.cancel()
        await asyncio.to_thread(self._thread.shutdown, cancel_futures=True)
        self._held.clear()
        await asyncio.to_thread(self._ranks.leave)

    def has(self, learner_id: str) -> bool:
        """Whether it holds the learner, or has checkpoints that a new one with this id could load."""
        return self._held.get(learner_id) is not None or self._has_checkpoints(learner_id)

    def _has_checkpoints(self, learner_id: str) -> bool:
        return is_name(learner_id) and (self._settings.checkpoint_folder / learner_id).exists()

    async def CreateLearner(self, request: pb.CreateLearnerRequest, context: Context) -> pb.CreateLearnerResponse:
        self._guard.check_learner(context, request.learner_id)
        if self._leases is None:
            self._leases = asyncio.create_task(self._watch_leases())
        with self._in_use(request):
            held = await self._on_thread(partial(self._create, request))
        held.lease = self._lease(request)  # not before: nobody may be left to call it
        held.renew()
        return pb.CreateLearnerResponse(
            next_sequence=held.next_call,
            fingerprint=held.learner.fingerprint,
            parameter_count=held.learner.parameter_count,
            trainable_parameter_count=held.learner.trainable_parameter_count,
            context_length=held.learner.model.limits.context_length,
            vocabulary_size=held.learner.model.limits.vocabulary_size,
            lora_target_modules=held.learner.adapted_layers,
        )

    async def GetLearner(self, request: pb.GetLearnerRequest, context: Context) -> pb.GetLearnerResponse:
        try:
            held = self._held.find(request.learner_id)
        except DomainError as error:
            there_are = self._has_checkpoints(request.learner_id)
            raise error.told(error.message, has_checkpoints=str(there_are).lower()) from None
        if self._guard.allows_learner(context, request.learner_id):
            held.renew()
        done, total = held.learner.progress
        return pb.GetLearnerResponse(
            owner=held.owner,
            next_sequence=held.next_call,
            optimizer_steps=held.learner.optimizer_steps,
            model=model_to_proto(held.spec.model),
            compute_seconds=held.compute_seconds,
            total_tokens=total,
            done_tokens=done,
        )

    async def ListLearners(self, request: pb.ListLearnersRequest, context: Context) -> pb.ListLearnersResponse:
        response = pb.ListLearnersResponse()
        for held in self._held:
            info = response.learners.add(
                learner_id=held.learner.learner_id,
                owner=held.owner,
                model=model_to_proto(held.spec.model),
                optimizer_steps=held.learner.optimizer_steps,
                idle=duration(held.idle),
            )
            if held.lease is not None:
                info.lease_left.CopyFrom(duration(max(0.0, held.lease - held.idle)))
        return response

    async def DeleteLearner(self, request: pb.DeleteLearnerRequest, context: Context) -> pb.DeleteLearnerResponse:
        self._guard.check_learner(context, request.learner_id)

        def delete() -> None:
            if self._held.get(request.learner_id) is not None:
                self._held.owned(request.learner_id, request.owner)
                self._held.remove(request.learner_id)

        await self._on_thread(delete)
        return pb.DeleteLearnerResponse()

    async def Forward(self, request: pb.ForwardRequest, context: Context) -> pb.ForwardResponse:
        def forward(held: HeldLearner) -> pb.ForwardResponse:
            results = self._perform(held, request)
            return pb.ForwardResponse(
                log_probs=[pb.ForwardResponse.LogProbs(log_probs=log_probs) for log_probs in results]
            )

        return await self._with_learner(request, context, forward)

    async def ForwardBackward(self, request: pb.ForwardBackwardRequest, context: Context) -> pb.ForwardBackwardResponse:
        return pb.ForwardBackwardResponse(metrics=await self._exactly_once(request, context))

    async def OptimStep(self, request: pb.OptimStepRequest, context: Context) -> pb.OptimStepResponse:
        return pb.OptimStepResponse(metrics=await self._exactly_once(request, context))

    async def SaveCheckpoint(self, request: pb.SaveCheckpointRequest, context: Context) -> pb.SaveCheckpointResponse:
        saved = await self._with_learner(
            request, context, lambda held: self._perform(held, request, next_call=held.next_call)
        )
        return pb.SaveCheckpointResponse(uri=saved.uri, sha256=saved.sha256)

    async def LoadCheckpoint(self, request: pb.LoadCheckpointRequest, context: Context) -> pb.LoadCheckpointResponse:
        def load(held: HeldLearner) -> pb.LoadCheckpointResponse:
            state = self._perform(held, request)
            held.next_call = state.next_sequence
            held.last_request = b""
            held.last_answer = None
            return pb.LoadCheckpointResponse(next_sequence=state.next_sequence, optimizer_steps=state.optimizer_steps)

        return await self._with_learner(request, context, load, changes=True)

    async def PublishWeights(self, request: pb.PublishWeightsRequest, context: Context) -> pb.PublishWeightsResponse:
        weights = await self._with_learner(request, context, partial(self._perform, request=request))
        return pb.PublishWeightsResponse(
            uri=weights.uri,
            sha256=weights.sha256,
            fingerprint=weights.fingerprint,
            lora=weights.kind is WeightsKind.LORA,
            canary=canary_to_proto(weights.canary),
        )

    async def _on_thread(self, work: Callable[[], R]) -> R:
        """Runs `work` on the worker thread. If the call is cancelled, waiting work is dropped; running work goes on."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def _with_learner(
        self, request: Any, context: Context, work: Callable[[HeldLearner], R], *, changes: bool = False
    ) -> R:
        self._guard.check_learner(context, request.learner_id)

        def on_thread() -> R:
            held = self._held.owned(request.learner_id, request.owner)
            start = time.perf_counter()
            try:
                return work(held)
            except DomainError:
                raise
            except Exception:
                if changes:  # gradients or weights may be incomplete
                    log.error("learner dropped", learner_id=request.learner_id)
                    self._held.remove(request.learner_id)
                raise
            finally:
                held.compute_seconds += time.perf_counter() - start
                held.renew()  # also if the caller has given up

        with self._in_use(request):
            return await self._on_thread(on_thread)

    def _perform(self, held: HeldLearner, request: Message, **state: Any) -> Any:
        with self._ranks.in_step():
            self._ranks.tell(type(request).__name__, request.SerializeToString)
            return _WORK[type(request)](held.learner, request, **state)

    def _removed(self, learner_id: str) -> None:
        if not self._ranks.broken:
            request = pb.DeleteLearnerRequest(learner_id=learner_id)
            with self._ranks.in_step():
                self._ranks.tell("DeleteLearnerRequest", request.SerializeToString)

    def _in_use(self, request: Any) -> AbstractContextManager[None]:
        """A context manager around a call. A learner does not expire while a call waits for the thread."""
        held = self._held.get(request.learner_id)
        return held.in_use() if held is not None and held.owner == request.owner else nullcontext()

    async def _watch_leases(self) -> None:
        while True:
            await self._held.clock.tick()
            if any(held.is_over for held in self._held):
                try:
                    await self._on_thread(self._held.remove_what_is_over)
                except Exception:  # of the other processes: the next look goes on with what is left
                    log.exception("a learner whose lease was over did not end in all processes")

    async def _exactly_once(self, request: Any, context: Context) -> dict[str, float]:
        def unless_done(held: HeldLearner) -> dict[str, float]:
            digest = _digest(request)
            if request.sequence == held.next_call - 1 and digest == held.last_request:
                assert held.last_answer is not None
                return held.last_answer
            if request.sequence != held.next_call:
                raise DomainError(
                    Reason.SEQUENCE_MISMATCH,
                    f"sequence: expected {held.next_call}, or the last call again; got {request.sequence}",
                    next_sequence=held.next_call,
                )
            answer: dict[str, float] = self._perform(held, request)
            held.last_request = digest
            held.last_answer = answer
            held.next_call += 1
            return answer

        return await self._with_learner(request, context, unless_done, changes=True)

    def _create(self, request: pb.CreateLearnerRequest) -> HeldLearner:
        spec = spec_from_proto(request)
        if self._held.get(request.learner_id) is not None:
            held = self._held.owned(request.learner_id, request.owner)
            if held.spec != spec:
                raise DomainError(Reason.LEARNER_CONFLICT, f"learner {request.learner_id!r} exists with other settings")
            return held
        if problem := models.problem_of_place(spec.model.source, self._settings.models_folder):
            raise DomainError(
                Reason.MODEL_NOT_FOUND, f"model.source: {problem}", field="model.source", source=spec.model.source
            )
        self._held.check_room()
        with self._ranks.in_step():
            self._ranks.tell("CreateLearnerRequest", request.SerializeToString)
            learner = Learner(request.learner_id, spec, self._settings, self._ranks)
        lease = min(self._lease(request) or UNANSWERED_SECONDS, UNANSWERED_SECONDS)
        held = HeldLearner(learner, request.owner, spec, self._held.clock, lease, self._held.clock.now)
        self._held.add(held)
        return held

    def _lease(self, request: pb.CreateLearnerRequest) -> float | None:
        asked = lease_from_proto(request)
        return self._settings.lease_seconds if asked is None else asked


def _digest(request: Message) -> bytes:
    name = type(request).__name__.encode()
    return hashlib.sha256(name + request.SerializeToString(deterministic=True)).digest()
