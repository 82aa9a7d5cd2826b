"""What is wrong with a request, before any engine sees it. Each check raises a DomainError that names the field."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence

import numpy as np

from mulligan.common.errors import DomainError, Reason, invalid_field
from mulligan.common.inference import CallOptions, Continuation, Feature, Prompt, SamplingParams
from mulligan.policy.backend import ModelInfo

_LOWEST_TEMPERATURE = 1e-3  # below it, logits / temperature may exceed float32
MOST_SAMPLES = 256


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
        _need(model, Feature.REGEX, "sampling.regex")
        _check_regex(sampling.regex)
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
    """The kind of prompt, and that there is any."""
    field = _field(prompt)
    if field != "messages":
        _need(model, Feature.TOKEN_IDS, field)
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


def check_tokenize(prompt: Prompt | str, options: CallOptions, model: ModelInfo) -> None:
    _need(model, Feature.TOKEN_IDS, _field(prompt))
    check_prompt(prompt, options, model)


def check_score(sequences: Sequence[Sequence[int]], temperature: float, adapter: str, model: ModelInfo) -> None:
    _need(model, Feature.SCORE, "sequences")
    check_temperature("temperature", temperature)
    if temperature != 1.0:
        _need(model, Feature.SCORE_TEMPERATURE, "temperature")
    check_adapter(adapter, model)
    for index, sequence in enumerate(sequences):
        check_tokens(f"sequences[{index}]", sequence, model, model.context_length)


def need_stream(model: ModelInfo) -> None:
    _need(model, Feature.STREAM, "request")


def check_tokens(field: str, token_ids: Sequence[int], model: ModelInfo, longest: int) -> None:
    """`longest` is of no account where the model's context length is not known."""
    if len(token_ids) == 0:
        raise _empty(field, "token")
    if model.context_length and len(token_ids) > longest:
        raise DomainError(
            Reason.PROMPT_TOO_LONG,
            f"{field}: {len(token_ids)} tokens; the context leaves room for {longest}",
            field=field,
            token_count=len(token_ids),
            context_length=model.context_length,
        )
    _check_vocabulary(field, token_ids, model.vocabulary_size)


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


def _check_regex(pattern: str) -> None:
    """Engines have dialects of their own; what Python does not take is hardly in any."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise invalid_field("sampling.regex", f"a regular expression ({error})") from error


def _check_schema(schema: str) -> None:
    try:
        value = json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise invalid_field("sampling.json_schema", f"a JSON schema ({error})") from error
    if not isinstance(value, dict):
        raise invalid_field("sampling.json_schema", "a JSON schema, which is an object")


def _field(prompt: Prompt | str) -> str:
    """What the contract calls this kind of prompt."""
    if isinstance(prompt, str):
        return "text"
    if isinstance(prompt, list):
        return "token_ids"
    return "continuation" if isinstance(prompt, Continuation) else "messages"


def _empty(field: str, unit: str) -> DomainError:
    return DomainError(Reason.EMPTY_PROMPT, f"{field}: at least one {unit} is needed", field=field)


def _listed(names: Collection[str]) -> str:
    return ", ".join(names)
