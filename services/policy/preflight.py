"""Checks of a request before any engine is asked. Each raises a DomainError that names the field."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence

import numpy as np

from mulligan.common.errors import DomainError, Reason, invalid_field
from mulligan.common.inference import (
    CallOptions,
    CanaryProbe,
    Continuation,
    Feature,
    Prompt,
    PublishedWeights,
    SamplingParams,
    VersionState,
    WeightsKind,
)
from mulligan.policy.backend import ModelInfo
from mulligan.policy.version_table import VersionRecord

_LOWEST_TEMPERATURE = 1e-3  # below it, logits / temperature may exceed float32
MOST_SAMPLES = 256
WEIGHT_FEATURES = {WeightsKind.FULL: Feature.FULL_WEIGHTS, WeightsKind.LORA: Feature.LORA_WEIGHTS}


def check_sampling(sampling: SamplingParams, model: ModelInfo) -> None:
    if sampling.temperature != 0:
        check_temperature("sampling.temperature", sampling.temperature)
    if sampling.top_k:
        _need(model, Feature.TOP_K, "sampling.top_k")
    if sampling.seed is not None:
        _need(model, Feature.SEED, "sampling.seed")
    if sampling.stop_token_ids:
        _need(model, Feature.STOP_TOKEN_IDS, "sampling.stop_token_ids")
        _check_vocabulary("sampling.stop_token_ids", sampling.stop_token_ids, model.vocabulary_size)
    if sampling.regex is not None:
        _need(model, Feature.REGEX, "sampling.regex")  # what it must be, the engine knows: compiling it takes long
    if sampling.json_schema is not None:
        if sampling.regex is not None:
            raise invalid_field("sampling.json_schema", "nothing beside a regex")
        _need(model, Feature.JSON_SCHEMA, "sampling.json_schema")
        _check_schema(sampling.json_schema)


def check_samples(count: int, sampling: SamplingParams) -> None:
    if not 1 <= count <= MOST_SAMPLES:
        raise invalid_field("n", f"1 to {MOST_SAMPLES}")
    if count > 1 and sampling.temperature == 0:
        raise invalid_field("n", "1 at temperature 0: all samples would be the same")


def check_options(options: CallOptions, model: ModelInfo) -> None:
    if options.priority:
        _need(model, Feature.PRIORITY, "priority")
    check_adapter(options.adapter, model)


def check_adapter(adapter: str, model: ModelInfo) -> None:
    if adapter and adapter not in model.adapters:
        known = f"those are {_listed(model.adapters)}" if model.adapters else "the policy has none"
        raise DomainError(Reason.UNKNOWN_ADAPTER, f"no adapter {adapter!r}: {known}", adapter=adapter)


def check_prompt(prompt: Prompt | str, options: CallOptions, model: ModelInfo) -> None:
    """That the engine takes this kind of prompt, and that it is not empty."""
    field = field_of(prompt)
    check_kind(field, model)
    if options.tools:
        if field != "messages":
            raise invalid_field("tools", "none: only a prompt of messages shows tools")
        _need(model, Feature.TOOLS, "tools")
    if not prompt and field != "text":
        raise _empty(field, "token" if field == "token_ids" else "message")
    if isinstance(prompt, Continuation):
        if not prompt.token_ids:
            raise _empty("continuation.token_ids", "token")
        if not prompt.messages:
            raise _empty("continuation.messages", "message")


def check_kind(field: str, model: ModelInfo) -> None:
    """`field` is what the contract calls this kind of prompt."""
    if field != "messages":
        _need(model, Feature.TOKEN_IDS, field)


def check_tokenize(prompt: Prompt | str, options: CallOptions, model: ModelInfo) -> None:
    _need(model, Feature.TOKEN_IDS, field_of(prompt))
    check_prompt(prompt, options, model)


def check_score(sequences: Sequence[Sequence[int]], temperature: float, adapter: str, model: ModelInfo) -> None:
    _need(model, Feature.SCORE, "sequences")
    check_temperature("temperature", temperature)
    if temperature != 1.0:
        _need(model, Feature.SCORE_TEMPERATURE, "temperature")
    check_adapter(adapter, model)
    for index, sequence in enumerate(sequences):
        check_tokens(f"sequences[{index}]", sequence, model, model.context_length)


def check_stream(model: ModelInfo) -> None:
    _need(model, Feature.STREAM, "request")


def check_update(
    weights: PublishedWeights, model: ModelInfo, present: VersionRecord, known: VersionRecord | None, following: int
) -> None:
    """`present` serves, or should; `known` is the record of the same number; `following` is the next free number."""
    feature = WEIGHT_FEATURES[weights.kind]
    if feature not in model.features:
        message = f"kind: the engine of {model.model} takes no {weights.kind} weights"
        raise DomainError(Reason.UNSUPPORTED_OPTION, message, field="kind", feature=feature)
    number = weights.policy_version
    conflict = ""
    if known is not None and not known.is_lost and known.version.sha256 != weights.sha256:
        conflict = f"version {number} is known with other weights"
    elif known is not None and known.version.state in (VersionState.REFUSED, VersionState.WITHDRAWN):
        conflict = f"version {number} was {known.version.state}: {known.version.problem}"
    elif number < present.number:
        conflict = f"{number} is not greater"
    if conflict:
        message = f"version {present.number} serves: {conflict}"
        raise DomainError(Reason.VERSION_CONFLICT, message, policy_version=present.number, next_version=following)
    if weights.fingerprint != model.fingerprint:
        raise DomainError(
            Reason.MODEL_MISMATCH,
            f"the weights are of a model {weights.fingerprint}; this one, {model.model}, is {model.fingerprint}",
        )
    check_probes(weights.canary, model)


def check_release(model: ModelInfo) -> None:
    if Feature.MEMORY_RELEASE not in model.features:
        message = f"the engine of {model.model} cannot release its memory"
        raise DomainError(Reason.UNSUPPORTED_OPTION, message, field="policy", feature=Feature.MEMORY_RELEASE)


def check_probes(probes: Sequence[CanaryProbe], model: ModelInfo) -> None:
    """Raises DomainError INVALID_FIELD, or UNSUPPORTED_OPTION where the engine cannot score."""
    if probes and Feature.SCORE not in model.features:
        raise DomainError(
            Reason.UNSUPPORTED_OPTION, f"canary: {model.model} cannot score", field="canary", feature=Feature.SCORE
        )
    for index, probe in enumerate(probes):
        field = f"canary[{index}]"
        count = len(probe.token_ids)
        if count < 2 or (model.context_length and count > model.context_length):
            raise invalid_field(f"{field}.token_ids", f"2 to {model.context_length or 65536} tokens")
        if any(token < 0 or (model.vocabulary_size and token >= model.vocabulary_size) for token in probe.token_ids):
            raise invalid_field(f"{field}.token_ids", f"ids from 0 to {model.vocabulary_size - 1}")
        if len(probe.log_probs) != count - 1:
            raise invalid_field(f"{field}.log_probs", f"{count - 1} values, one per token after the first")
        if not all(math.isfinite(value) for value in probe.log_probs):
            raise invalid_field(f"{field}.log_probs", "finite values")


def check_tokens(field: str, token_ids: Sequence[int], model: ModelInfo, longest: int) -> None:
    """`longest` is not used where the model's context length is not known."""
    if len(token_ids) == 0:
        raise _empty(field, "token")
    check_count(field, len(token_ids), model, longest)
    _check_vocabulary(field, token_ids, model.vocabulary_size)


def check_count(field: str, count: int, model: ModelInfo, longest: int) -> None:
    """As `check_tokens`, where the number of tokens is known and the tokens need not be."""
    if model.context_length and count > longest:
        raise too_long(field, count, model, longest)


def too_long(
    field: str, count: int, model: ModelInfo, longest: int, *, at_least: bool = False, tokenize: bool = False
) -> DomainError:
    """`at_least`: nobody counted further. `tokenize`: for the answer of Tokenize, which is longer than a prompt."""
    room = f"Tokenize answers {longest} at most" if tokenize else f"the context leaves room for {longest}"
    return DomainError(
        Reason.PROMPT_TOO_LONG,
        f"{field}: {'at least ' if at_least else ''}{count} tokens; {room}",
        field=field,
        token_count=count,
        context_length=model.context_length,
    )


def check_temperature(field: str, value: float) -> None:
    if not value >= _LOWEST_TEMPERATURE:
        raise invalid_field(field, f"at least {_LOWEST_TEMPERATURE}")


def _need(model: ModelInfo, feature: Feature, field: str) -> None:
    if feature not in model.features:
        raise DomainError(
            Reason.UNSUPPORTED_OPTION,
            f"{field}: the engine of {model.model} lacks {feature.value}",
            field=field,
            feature=feature.value,
        )


def _check_vocabulary(field: str, token_ids: Sequence[int], size: int) -> None:
    if not size:
        return
    ids = np.fromiter(token_ids, dtype=np.int64, count=len(token_ids))
    if int(ids.min()) < 0 or int(ids.max()) >= size:
        index = int(np.flatnonzero((ids < 0) | (ids >= size))[0])
        raise DomainError(
            Reason.TOKEN_OUT_OF_VOCABULARY,
            f"{field}: token {ids[index]} at {index} is not in the vocabulary of {size}",
            field=field,
            index=index,
        )


def _check_schema(schema: str) -> None:
    try:
        value = json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise invalid_field("sampling.json_schema", f"a JSON schema ({error})") from error
    if not isinstance(value, dict):
        raise invalid_field("sampling.json_schema", "a JSON schema, which is an object")


def field_of(prompt: Prompt | str) -> str:
    """The name of this kind of prompt in the contract."""
    if isinstance(prompt, str):
        return "text"
    if isinstance(prompt, list):
        return "token_ids"
    return "continuation" if isinstance(prompt, Continuation) else "messages"


def _empty(field: str, unit: str) -> DomainError:
    return DomainError(Reason.EMPTY_PROMPT, f"{field}: at least one {unit} is needed", field=field)


def _listed(names: Collection[str]) -> str:
    return ", ".join(names)
