"""Protobuf ↔ domain types that the policy's servicer and its client share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, timedelta
from typing import Any

from mulligan.common import numbers
from mulligan.common.errors import Code, DomainError, fault
from mulligan.common.inference import (
    CallOptions,
    CanaryProbe,
    Completion,
    CompletionPart,
    Continuation,
    Feature,
    LoraLimits,
    Message,
    PolicyInfo,
    PolicyState,
    PolicyVersion,
    Prompt,
    ReplicaInfo,
    SamplingParams,
    StopReason,
    VersionState,
    WeightsKind,
)
from mulligan.common.status import code_number, fill_item_error
from mulligan.common.wire import (
    messages_from_proto,
    messages_to_proto,
    spans_from_proto,
    spans_to_proto,
    tools_from_proto,
    tools_to_proto,
)
from mulligan.policy.backend import Scored
from mulligan.policy.v1 import policy_admin_service_pb2 as admin_pb
from mulligan.policy.v1 import policy_service_pb2 as pb

_VERSIONS = {state: admin_pb.VersionState.Value(f"VERSION_STATE_{state.name}") for state in VersionState}
_VERSIONS_BACK = {value: key for key, value in _VERSIONS.items()}
_FEATURES = {feature: pb.Feature.Value(f"FEATURE_{feature.name}") for feature in Feature}
_FEATURES_BACK = {value: key for key, value in _FEATURES.items()}
_STATES = {state: pb.PolicyState.Value(f"POLICY_STATE_{state.name}") for state in PolicyState}
_STATES_BACK = {value: key for key, value in _STATES.items()}
_STOPS = {stop: pb.StopReason.Value(f"STOP_REASON_{stop.name}") for stop in StopReason}
_STOPS_BACK = {value: key for key, value in _STOPS.items()}
_WEIGHTS = {kind: admin_pb.WeightsKind.Value(f"WEIGHTS_KIND_{kind.name}") for kind in WeightsKind}
_WEIGHTS_BACK = {value: key for key, value in _WEIGHTS.items()}
_DEFAULTS = SamplingParams()
_MANY_BYTES = 2**20  # of the items of one message of GenerateMany, unless one item is larger


def generate_to_proto(prompt: Prompt, sampling: SamplingParams, n: int, options: CallOptions) -> pb.GenerateRequest:
    """Raises ValueError for text that UTF-8 cannot carry."""
    request = pb.GenerateRequest(
        request_id=options.request_id,
        sampling=_sampling_to_proto(sampling),
        min_policy_version=options.min_policy_version,
        policy=options.policy,
        session_id=options.session_id,
        n=n,
        priority=options.priority,
        adapter=options.adapter,
        tools=tools_to_proto(options.tools),
    )
    if options.version_wait:
        request.version_wait.FromTimedelta(timedelta(seconds=options.version_wait))
    if isinstance(prompt, list):
        request.token_ids.ids.extend(prompt)
    elif isinstance(prompt, Continuation):
        request.continuation.CopyFrom(continuation_to_proto(prompt))
    else:
        request.messages.CopyFrom(messages_of(prompt))
    return request


def tokenize_to_proto(prompt: tuple[Message, ...] | Continuation | str, options: CallOptions) -> pb.TokenizeRequest:
    """Raises ValueError for text that UTF-8 cannot carry."""
    request = pb.TokenizeRequest(
        policy=options.policy, session_id=options.session_id, tools=tools_to_proto(options.tools)
    )
    if isinstance(prompt, str):
        request.text = prompt
    elif isinstance(prompt, Continuation):
        request.continuation.CopyFrom(continuation_to_proto(prompt))
    else:
        request.messages.CopyFrom(messages_of(prompt))
    return request


def score_to_proto(sequences: Sequence[Sequence[int]], temperature: float, options: CallOptions) -> pb.ScoreRequest:
    request = pb.ScoreRequest(
        sequences=[pb.TokenIds(ids=sequence) for sequence in sequences],
        temperature=temperature,
        min_policy_version=options.min_policy_version,
        policy=options.policy,
        adapter=options.adapter,
    )
    if options.version_wait:
        request.version_wait.FromTimedelta(timedelta(seconds=options.version_wait))
    return request


def messages_of(messages: Sequence[Message]) -> pb.Messages:
    return pb.Messages(messages=messages_to_proto(messages))


def continuation_to_proto(continuation: Continuation) -> pb.Continuation:
    return pb.Continuation(
        token_ids=continuation.token_ids,
        turn_closed=continuation.turn_closed,
        messages=messages_to_proto(continuation.messages),
    )


def prompt_from_proto(request: pb.GenerateRequest) -> Prompt:
    kind = request.WhichOneof("prompt")
    if kind == "messages":
        return messages_from_proto(request.messages.messages)
    if kind == "continuation":
        return _continuation_from_proto(request.continuation, tuple(request.continuation.token_ids))
    return list(request.token_ids.ids)


def text_from_proto(request: pb.TokenizeRequest) -> Prompt | str:
    """The token ids of a continuation stay the field of the message: Tokenize needs their number alone, and copies of
    them take ten times the memory."""
    kind = request.WhichOneof("input")
    if kind == "messages":
        return messages_from_proto(request.messages.messages)
    if kind == "continuation":
        return _continuation_from_proto(request.continuation, request.continuation.token_ids)
    return request.text


def _continuation_from_proto(given: pb.Continuation, token_ids: Sequence[int]) -> Continuation:
    return Continuation(token_ids, given.turn_closed, messages_from_proto(given.messages))


def options_from_proto(request: pb.GenerateRequest) -> CallOptions:
    return CallOptions(
        policy=request.policy,
        request_id=request.request_id,
        session_id=request.session_id,
        min_policy_version=_optional(request, "min_policy_version"),
        version_wait=_wait(request),
        priority=request.priority,
        adapter=request.adapter,
        tools=tools_from_proto(request.tools),
    )


def score_options_from_proto(request: pb.ScoreRequest) -> CallOptions:
    return CallOptions(
        policy=request.policy,
        min_policy_version=_optional(request, "min_policy_version"),
        version_wait=_wait(request),
        adapter=request.adapter,
    )


def _optional(request: pb.GenerateRequest | pb.ScoreRequest, name: Any) -> int | None:
    return getattr(request, name) if request.HasField(name) else None


def _wait(request: pb.GenerateRequest | pb.ScoreRequest) -> float:
    return request.version_wait.ToTimedelta().total_seconds() if request.HasField("version_wait") else 0.0


def _sampling_to_proto(params: SamplingParams) -> pb.SamplingParams:
    message = pb.SamplingParams(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        max_tokens=params.max_tokens,
        seed=params.seed,
        stop=params.stop,
        stop_token_ids=params.stop_token_ids,
    )
    if params.regex is not None:
        message.regex = params.regex
    if params.json_schema is not None:
        message.json_schema = params.json_schema
    return message


def sampling_from_proto(params: pb.SamplingParams) -> SamplingParams:
    def given(name: str) -> Any:
        return getattr(params, name) if params.HasField(name) else getattr(_DEFAULTS, name)  # type: ignore[arg-type]

    constraint = params.WhichOneof("constraint")
    return SamplingParams(
        temperature=given("temperature"),
        top_p=given("top_p"),
        top_k=given("top_k"),
        max_tokens=given("max_tokens"),
        seed=given("seed"),
        stop=tuple(params.stop),
        stop_token_ids=tuple(params.stop_token_ids),
        regex=params.regex if constraint == "regex" else None,
        json_schema=params.json_schema if constraint == "json_schema" else None,
    )


def completions_to_proto(completions: Sequence[Completion]) -> pb.GenerateResponse:
    return pb.GenerateResponse(
        prompt_token_ids=completions[0].prompt_token_ids,
        completions=[
            pb.Completion(
                token_ids=completion.token_ids,
                log_probs=completion.log_probs,
                text=completion.text,
                raw_text=completion.raw_text,
                stop_reason=stop_reason_to_proto(completion.stop_reason),
                policy_versions=spans_to_proto(completion.policy_versions),
            )
            for completion in completions
        ],
    )


def completions_from_proto(response: pb.GenerateResponse, n: int) -> tuple[Completion, ...]:
    """Raises ValueError for another number than `n`, which were asked for, and for token ids and log-probabilities that
    are none, and KeyError for an unknown stop reason."""
    if len(response.completions) != n:
        raise ValueError(f"{len(response.completions)} completions, not {n}")
    shown = tuple(response.prompt_token_ids)
    numbers.token_ids("prompt_token_ids", shown)
    for completion in response.completions:
        _check_sampled(completion)
    return tuple(
        Completion(
            prompt_token_ids=shown,
            token_ids=tuple(completion.token_ids),
            log_probs=tuple(completion.log_probs),
            text=completion.text,
            raw_text=completion.raw_text,
            stop_reason=stop_reason_from_proto(completion.stop_reason),
            policy_versions=spans_from_proto(completion.policy_versions),
        )
        for completion in response.completions
    )


def many_to_proto(items: Iterable[pb.GenerateManyResponse.Item]) -> Iterator[pb.GenerateManyResponse]:
    """Messages with all items. A message that is larger than a MiB has one item."""
    message = pb.GenerateManyResponse()
    size = 0
    for item in items:
        size += item.ByteSize()
        if message.items and size > _MANY_BYTES:
            yield message
            message = pb.GenerateManyResponse()
            size = item.ByteSize()
        message.items.append(item)
    yield message


def generate_error_to_proto(error: Exception) -> pb.GenerateError:
    if not isinstance(error, DomainError):
        return pb.GenerateError(code=code_number(Code.INTERNAL), message=fault(error))
    message = pb.GenerateError()
    fill_item_error(message, error)
    return message


def _check_sampled(message: pb.Completion | pb.StreamGenerateResponse) -> None:
    """Raises ValueError. An engine that tells no log-probabilities tells none at all."""
    numbers.token_ids("token_ids", message.token_ids)
    numbers.log_probs("log_probs", message.log_probs, len(message.token_ids) if message.log_probs else None)
    numbers.not_negative("policy_versions.token_count", [span.token_count for span in message.policy_versions])


def part_to_proto(part: CompletionPart) -> pb.StreamGenerateResponse:
    return pb.StreamGenerateResponse(
        prompt_token_ids=part.prompt_token_ids,
        index=part.index,
        token_ids=part.token_ids,
        log_probs=part.log_probs,
        policy_versions=spans_to_proto(part.policy_versions),
        text=part.text,
        raw_text=part.raw_text,
        stop_reason=stop_reason_to_proto(part.stop_reason) if part.stop_reason else pb.STOP_REASON_UNSPECIFIED,
    )


def part_from_proto(message: pb.StreamGenerateResponse) -> CompletionPart:
    """Raises as `completions_from_proto` does."""
    numbers.token_ids("prompt_token_ids", message.prompt_token_ids)
    _check_sampled(message)
    return CompletionPart(
        index=message.index,
        prompt_token_ids=tuple(message.prompt_token_ids),
        token_ids=tuple(message.token_ids),
        log_probs=tuple(message.log_probs),
        text=message.text,
        raw_text=message.raw_text,
        policy_versions=spans_from_proto(message.policy_versions),
        stop_reason=stop_reason_from_proto(message.stop_reason) if message.stop_reason else None,
    )


def scored_from_proto(response: pb.ScoreResponse, sequences: Sequence[Sequence[int]]) -> Scored:
    """Raises ValueError for what is not one log-probability for each token after the first."""
    if len(response.scores) != len(sequences):
        raise ValueError(f"{len(response.scores)} scores of {len(sequences)} sequences")
    pairs = zip(response.scores, sequences, strict=True)
    rows = tuple(numbers.log_probs("log_probs", scores.log_probs, len(ids) - 1) for scores, ids in pairs)
    return Scored(rows, response.policy_version)


def tokens_from_proto(response: pb.TokenizeResponse) -> tuple[int, ...]:
    """Raises ValueError."""
    numbers.token_ids("token_ids", response.token_ids)
    return tuple(response.token_ids)


def policy_to_proto(info: PolicyInfo) -> pb.Policy:
    return pb.Policy(
        name=info.name,
        backend=info.backend,
        model=info.model,
        fingerprint=info.fingerprint,
        policy_version=info.policy_version,
        context_length=info.context_length,
        vocabulary_size=info.vocabulary_size,
        end_of_turn_token_ids=info.end_of_turn_token_ids,
        rewrites_history=info.rewrites_history,
        deterministic=info.deterministic,
        compute_seconds=info.compute_seconds,
        features=sorted(_FEATURES[feature] for feature in info.features),
        adapters=info.adapters,
        state=_STATES[info.state],
        problem=info.problem,
        frozen=info.frozen,
        replicas=[
            pb.Replica(
                address=replica.address,
                serving=replica.serving,
                in_flight=replica.in_flight,
                problem=replica.problem,
            )
            for replica in info.replicas
        ],
        draining_models=info.draining_models,
        dtype=info.dtype,
        canary_tolerance=info.canary_tolerance,
        lora=_lora_to_proto(info.lora),
        sparse_uploads=info.sparse_uploads,
    )


def policy_from_proto(message: pb.Policy) -> PolicyInfo:
    """Features and states that this version does not know are left out, or taken for one that serves nothing. Raises
    ValueError for sizes and counts that are none."""
    for field in ("policy_version", "context_length", "vocabulary_size", "compute_seconds", "draining_models"):
        numbers.not_negative(field, [getattr(message, field)])
    return PolicyInfo(
        model=message.model,
        fingerprint=message.fingerprint,
        policy_version=message.policy_version,
        context_length=message.context_length,
        vocabulary_size=message.vocabulary_size,
        end_of_turn_token_ids=tuple(message.end_of_turn_token_ids),
        rewrites_history=message.rewrites_history,
        deterministic=message.deterministic,
        compute_seconds=message.compute_seconds,
        name=message.name,
        backend=message.backend,
        features=frozenset(_FEATURES_BACK[feature] for feature in message.features if feature in _FEATURES_BACK),
        adapters=tuple(message.adapters),
        state=_STATES_BACK.get(message.state, PolicyState.UNAVAILABLE),
        problem=message.problem,
        frozen=message.frozen,
        replicas=tuple(
            ReplicaInfo(replica.address, replica.serving, replica.in_flight, replica.problem)
            for replica in message.replicas
        ),
        draining_models=message.draining_models,
        dtype=message.dtype,
        canary_tolerance=message.canary_tolerance if message.HasField("canary_tolerance") else None,
        lora=LoraLimits(message.lora.max_rank, tuple(message.lora.target_modules)),
        sparse_uploads=message.sparse_uploads,
    )


def _lora_to_proto(limits: LoraLimits) -> pb.LoraLimits | None:
    if limits == LoraLimits():
        return None
    return pb.LoraLimits(max_rank=limits.max_rank, target_modules=limits.target_modules)


def version_to_proto(version: PolicyVersion) -> admin_pb.PolicyVersion:
    message = admin_pb.PolicyVersion(
        policy_version=version.policy_version,
        kind=weights_kind_to_proto(version.kind),
        state=_VERSIONS[version.state],
        sha256=version.sha256,
        fingerprint=version.fingerprint,
        problem=version.problem,
        canary_difference=version.canary_difference,
        engine_checksum=version.engine_checksum,
        model=version.model,
    )
    message.created_at.FromDatetime(version.created_at)
    return message


def version_from_proto(message: admin_pb.PolicyVersion) -> PolicyVersion:
    return PolicyVersion(
        policy_version=message.policy_version,
        kind=weights_kind_from_proto(message.kind),
        state=_VERSIONS_BACK[message.state],
        sha256=message.sha256,
        fingerprint=message.fingerprint,
        created_at=message.created_at.ToDatetime(UTC),
        problem=message.problem,
        canary_difference=message.canary_difference if message.HasField("canary_difference") else None,
        engine_checksum=message.engine_checksum,
        model=message.model,
    )


def stop_reason_to_proto(reason: StopReason) -> pb.StopReason.ValueType:
    return _STOPS[reason]


def stop_reason_from_proto(reason: pb.StopReason.ValueType) -> StopReason:
    return _STOPS_BACK[reason]


def weights_kind_to_proto(kind: WeightsKind) -> admin_pb.WeightsKind.ValueType:
    return _WEIGHTS[kind]


def weights_kind_from_proto(kind: admin_pb.WeightsKind.ValueType) -> WeightsKind:
    return _WEIGHTS_BACK[kind]


def canary_to_proto(probes: Iterable[CanaryProbe]) -> list[admin_pb.CanaryProbe]:
    return [admin_pb.CanaryProbe(token_ids=probe.token_ids, log_probs=probe.log_probs) for probe in probes]


def canary_from_proto(probes: Iterable[admin_pb.CanaryProbe]) -> tuple[CanaryProbe, ...]:
    return tuple(CanaryProbe(tuple(probe.token_ids), tuple(probe.log_probs)) for probe in probes)
