"""Stands between a conformance suite and a real server, and breaks one promise of the contract."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import grpc
from google.protobuf import descriptor_pool, message_factory

from mulligan.policy.v1 import policy_admin_service_pb2 as admin_pb
from mulligan.policy.v1 import policy_service_pb2 as policy_pb
from mulligan.trainer.v1 import learner_service_pb2 as learner_pb
from mulligan.trainer.v1 import run_service_pb2 as run_pb


class Fault:
    """`title` is that of the check that must notice; `call` the one that the fault is in. `error` is a part of the
    refusals that are answered with `instead`, or told without details where there is nothing instead."""

    service = ""
    title = ""
    call = ""
    error = ""
    instead: Any = None
    left_out: frozenset[str] = frozenset()  # calls that are UNIMPLEMENTED

    def before(self, request: Any) -> None:
        """Changes what the server is asked; of an upload, its header."""

    def after(self, request: Any, answer: Any) -> None:
        """Changes what it answers; of a stream, each message."""


class _Policy(Fault):
    service = "policy"
    call = "Generate"


class PositiveLogProbs(_Policy):
    title = "messages are answered with a sample, its log-probabilities, versions and stop reason"

    def after(self, request: Any, answer: Any) -> None:
        for completion in answer.completions:
            completion.log_probs[:] = [-value + 0.1 for value in completion.log_probs]


class ShortSpans(_Policy):
    title = "token ids are used as they are"

    def after(self, request: Any, answer: Any) -> None:
        for completion in answer.completions:
            completion.policy_versions[0].token_count -= 1


class OneSample(_Policy):
    title = "n samples are n completions; more than one needs a temperature above 0"

    def before(self, request: Any) -> None:
        request.n = 1


class IgnoresSeeds(_Policy):
    title = "the same seed gives the same sample; sample 0 of several uses the seed unchanged"

    def after(self, request: Any, answer: Any) -> None:
        answer.completions[0].text += str(uuid4())


class CutsStops(_Policy):
    title = "it stops with the token that completes a stop string, which is included"

    def after(self, request: Any, answer: Any) -> None:
        for stop in request.sampling.stop:
            answer.completions[0].text = answer.completions[0].text.replace(stop, "")


class AnyToken(_Policy):
    title = "a token id outside the vocabulary is INVALID_ARGUMENT TOKEN_OUT_OF_VOCABULARY, with its place"
    error = "TOKEN_OUT_OF_VOCABULARY"
    instead = policy_pb.GenerateResponse()


class AnyVersion(_Policy):
    title = "a version that does not serve yet is FAILED_PRECONDITION POLICY_VERSION_TOO_OLD"
    error = "POLICY_VERSION_TOO_OLD"
    instead = policy_pb.GenerateResponse()


class AnswersInTurns(_Policy):
    title = "each request has one item: the answer that Generate gives"
    call = "GenerateMany"

    def after(self, request: Any, answer: Any) -> None:
        for item in answer.items:
            item.index = len(request.requests) - 1 - item.index


class FailsTogether(_Policy):
    title = "a request that is refused has the error of Generate, and the others are answered"
    call = "GenerateMany"

    def after(self, request: Any, answer: Any) -> None:
        if any(not one.HasField("sampling") for one in request.requests):
            for item in answer.items:
                item.error.reason = "EMPTY_PROMPT"


class OverlooksMalformed(_Policy):
    title = "a request that is malformed, or no request at all, is INVALID_ARGUMENT INVALID_FIELD"
    call = "GenerateMany"

    def before(self, request: Any) -> None:
        for one in request.requests:
            one.n = max(one.n, 0)


class LosesTokens(_Policy):
    title = "each message has as many log-probabilities and versions as tokens"
    call = "StreamGenerate"

    def after(self, request: Any, answer: Any) -> None:
        answer.log_probs[:] = answer.log_probs[:-1]


class StreamsAnother(_Policy):
    title = "the messages of a sample make the answer that Generate gives"
    call = "StreamGenerate"

    def after(self, request: Any, answer: Any) -> None:
        answer.text = answer.text.upper() + "!"


class ScoresDoubled(_Policy):
    title = "Score and Generate agree on the log-probabilities of what was sampled"
    call = "Score"

    def after(self, request: Any, answer: Any) -> None:
        for row in answer.scores:
            row.log_probs[:] = [2 * value - 0.2 for value in row.log_probs]


class ScoresFirst(_Policy):
    title = "each sequence has a log-probability per token after the first, in the order of the request"
    call = "Score"

    def after(self, request: Any, answer: Any) -> None:
        for row in answer.scores:
            row.log_probs.append(0.0)


class AnyFile(_Policy):
    title = "a file outside the weights folder is refused, and the old version serves on"
    call = "UpdateWeights"
    error = "BAD_WEIGHTS_URI"
    instead = admin_pb.UpdateWeightsResponse()


class AnyBase(_Policy):
    title = "a sparse file with a base that is not kept is NOT_FOUND VERSION_NOT_KEPT"
    call = "UploadWeights"
    error = "VERSION_NOT_KEPT"
    instead = admin_pb.UploadWeightsResponse(uri="upload:///x")


class IgnoresBases(_Policy):
    """As a server does that does not know the field: the sparse file is taken for a whole one."""

    title = "a base that is no checksum, or that of an adapter, is INVALID_ARGUMENT INVALID_FIELD"
    call = "UploadWeights"

    def before(self, request: Any) -> None:
        request.header.ClearField("base_sha256")


class _Trainer(Fault):
    service = "trainer"


class AccumulatesTwice(_Trainer):
    """Whatever its sequence, a call is played as the next one."""

    title = "a repeated call never accumulates twice"
    call = "ForwardBackward OptimStep"

    def __init__(self) -> None:
        self._calls: dict[str, int] = {}

    def before(self, request: Any) -> None:
        request.sequence = self._calls.get(request.learner_id, 0) + 1
        self._calls[request.learner_id] = request.sequence


class NoSequence(_Trainer):
    title = "any other sequence is FAILED_PRECONDITION SEQUENCE_MISMATCH, with next_sequence"
    call = "ForwardBackward"
    error = "SEQUENCE_MISMATCH"


class AnyObjective(_Trainer):
    title = "what an objective or a loss does not have is INVALID_ARGUMENT INVALID_FIELD and named"
    call = "ForwardBackward"
    error = "INVALID_FIELD"
    instead = learner_pb.ForwardBackwardResponse()


class HalvesCoefficients(_Trainer):
    title = "coefficients of 1 are the same loss as supervised learning"
    call = "ForwardBackward"

    def before(self, request: Any) -> None:
        for datum in request.data:
            if datum.HasField("custom"):
                values = datum.custom.token_values["coefficients"].values
                values[:] = [value / 2 for value in values]


class TakesTheFirstAdvantage(_Trainer):
    title = "equal advantages of all tokens are the same loss as one advantage of the datum"
    call = "ForwardBackward"

    def before(self, request: Any) -> None:
        for datum in request.data:
            if datum.HasField("policy_gradient"):
                each = datum.policy_gradient.advantages
                each[1:] = [0.0] * len(each[1:])


class OwnedByAll(_Trainer):
    title = "calls by another owner are FAILED_PRECONDITION LEARNER_OWNED"
    call = "Forward"

    def before(self, request: Any) -> None:
        request.owner = "conformance"


class CountsLearnersFromZero(_Trainer):
    title = "a new learner's calls are numbered from 1; a repeated CreateLearner returns the same answer"
    call = "CreateLearner"

    def after(self, request: Any, answer: Any) -> None:
        answer.next_sequence -= 1


class KeepsTheGradient(_Trainer):
    title = "it takes one step and clears the gradient; without a gradient it takes none"
    call = "OptimStep"

    def after(self, request: Any, answer: Any) -> None:
        answer.metrics["skipped"] = 0


class KnowsEveryLearner(_Trainer):
    title = "deleting twice succeeds, and what was not saved is gone"
    call = "GetLearner"
    error = "UNKNOWN_LEARNER"
    instead = learner_pb.GetLearnerResponse()


class HidesLearners(_Trainer):
    title = "a learner is listed with its owner, its model, and what is left of its lease"
    call = "ListLearners"

    def after(self, request: Any, answer: Any) -> None:
        del answer.learners[:]


class KeepsLearnersForEver(_Trainer):
    title = "a learner whose lease is over is deleted, and its place is free"
    call = "CreateLearner"

    def before(self, request: Any) -> None:
        request.ClearField("lease")


class RenewsNothing(_Trainer):
    title = "it renews the lease"
    call = "GetLearner"

    def before(self, request: Any) -> None:
        request.learner_id = "another"


class AnyLease(_Trainer):
    title = "a lease that is not positive, or too long, is INVALID_ARGUMENT INVALID_FIELD"
    call = "CreateLearner"
    error = "INVALID_FIELD"
    instead = learner_pb.CreateLearnerResponse()


class KnowsEveryRun(_Trainer):
    title = "an unknown run is NOT_FOUND UNKNOWN_RUN, in every call"
    call = "GetRun"
    error = "UNKNOWN_RUN"
    instead = run_pb.GetRunResponse()


class AnySetting(_Trainer):
    title = "a bad setting is INVALID_ARGUMENT INVALID_SETTING, named, and starts nothing"
    call = "StartRun"
    error = "INVALID_SETTING"
    instead = run_pb.StartRunResponse()


class WatchesFromTheStart(_Trainer):
    title = "events are numbered from 1, and a stream can begin after any of them"
    call = "WatchRun"

    def before(self, request: Any) -> None:
        request.after_event = 0


class RewardsOfNothing(_Trainer):
    title = "an attempt has a reward if and only if it was COMPLETED or TRUNCATED, and its segments are valid"
    call = "ListExperiences"

    def after(self, request: Any, answer: Any) -> None:
        for experience in answer.experiences:
            experience.first_attempt.ClearField("reward")


class LosesItsSamples(_Trainer):
    title = "an experience is a tree of samples, which hold its parts and what was trained on"
    call = "ListExperiences"

    def after(self, request: Any, answer: Any) -> None:
        for experience in answer.experiences:
            del experience.samples[0]


def faults(base: type[Fault] = Fault) -> list[type[Fault]]:
    found = [kind for sub in base.__subclasses__() for kind in (sub, *faults(sub))]
    return [kind for kind in found if kind.title]


class _Handler(grpc.GenericRpcHandler):
    def __init__(self, channel: grpc.aio.Channel, fault: Fault):
        self._channel = channel
        self._fault = fault

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        _, service, name = str(handler_call_details.method).split("/")
        try:
            method = descriptor_pool.Default().FindServiceByName(service).methods_by_name[name]
        except KeyError:  # health and reflection, which the faults are not in
            return None
        if name in self._fault.left_out:
            return None
        request, response = (message_factory.GetMessageClass(kind) for kind in (method.input_type, method.output_type))
        fault = self._fault if name in self._fault.call.split() else Fault()
        path = f"/{service}/{name}"
        packed: dict[str, Any] = {
            "request_serializer": request.SerializeToString,
            "response_deserializer": response.FromString,
        }

        async def unary(asked: Any, context: Any) -> Any:
            sent = request.FromString(asked.SerializeToString())
            fault.before(sent)
            try:
                answer = await self._channel.unary_unary(path, **packed)(sent)
            except grpc.aio.AioRpcError as error:
                return await _refused(fault, error, context)
            fault.after(asked, answer)
            return answer

        async def collected(messages: AsyncIterator[Any], context: Any) -> Any:
            sent = [message async for message in messages]
            for message in sent:
                if message.WhichOneof("part") == "header":
                    fault.before(message)
            try:
                answer = await self._channel.stream_unary(path, **packed)(iter(sent))
            except grpc.aio.AioRpcError as error:
                return await _refused(fault, error, context)
            fault.after(sent, answer)
            return answer

        async def stream(asked: Any, context: Any) -> AsyncIterator[Any]:
            sent = request.FromString(asked.SerializeToString())
            fault.before(sent)
            try:
                async for answer in self._channel.unary_stream(path, **packed)(sent):
                    fault.after(asked, answer)
                    yield answer
            except grpc.aio.AioRpcError as error:
                yield await _refused(fault, error, context)

        codecs: dict[str, Any] = {
            "request_deserializer": request.FromString,
            "response_serializer": response.SerializeToString,
        }
        if method.client_streaming:
            return grpc.stream_unary_rpc_method_handler(collected, **codecs)
        if method.server_streaming:
            return grpc.unary_stream_rpc_method_handler(stream, **codecs)
        return grpc.unary_unary_rpc_method_handler(unary, **codecs)


async def _refused(fault: Fault, error: grpc.aio.AioRpcError, context: Any) -> Any:
    planted = bool(fault.error) and any(fault.error.encode() in value for _, value in _details(error))
    if planted and fault.instead is not None:
        return fault.instead
    if not planted:
        context.set_trailing_metadata(tuple(_details(error)))
    return await context.abort(error.code(), error.details() or "")


def _details(error: grpc.aio.AioRpcError) -> list[tuple[str, Any]]:
    return [(key, value) for key, value in error.trailing_metadata() or () if key == "grpc-status-details-bin"]


@asynccontextmanager
async def between(address: str, fault: Fault) -> AsyncIterator[str]:
    """The address at which the server at `address` has this fault."""
    async with grpc.aio.insecure_channel(address) as channel:
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((_Handler(channel, fault),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        yield f"127.0.0.1:{port}"
        await server.stop(1.0)
