"""Converts an `Ask` to a request to SGLang's /generate, and the answer to a `Sampled`.

SGLang's log-probabilities of output tokens are those of the contract, whatever runs beside the request: of
softmax(logits / temperature), and of softmax(logits) for a greedy request, because SGLang treats temperature 0 as
top-k 1 at temperature 1. There are two exceptions. If every request of a batch has top-k 1, SGLang does not scale by
temperature, so top-k 1 is sent as a tiny top-p. Under a regex or schema the log-probabilities are of the constrained
logits, so they are scored again.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import msgspec

from mulligan.common.foreign import kept
from mulligan.common.inference import SamplingParams, StopReason
from mulligan.policy.backend import Ask
from mulligan.policy.backends._servers import answers
from mulligan.policy.backends._servers.answers import (
    Aborted,
    BadAnswer,
    StreamReader,
    WeightSpan,
    known,
    labels_between,
)
from mulligan.policy.backends._servers.connection import RequestRefused

_ONLY_THE_LIKELIEST = 1e-6  # top-p
# What SGLang calls a stop that it made up, when logits were not numbers.
_NOT_A_NUMBER = "NaN happened"


class _Finish(msgspec.Struct):
    type: str
    matched: int | str | list[int] | None = None
    message: str = ""
    status_code: int | None = None


class _Meta(msgspec.Struct):
    finish_reason: _Finish | None = None
    weight_version: str = ""
    weight_versions: list[WeightSpan] = []
    input_token_logprobs: list[tuple[float | None, int, str | None]] | None = None
    output_token_logprobs: list[tuple[float | None, int, str | None]] | None = None
    output_token_ids_logprobs: list[list[tuple[float | None, int, str | None]]] | None = None


class Answer(msgspec.Struct):
    meta_info: _Meta
    output_ids: list[int] = []

    def labels(self, begin: int, end: int) -> list[tuple[str, int]]:
        """The labels of the weights that sampled these tokens, each with its number of tokens."""
        if begin == end:  # also what sampled nothing was computed by somebody
            return [(self.meta_info.weight_version, 0)]
        return labels_between(self.meta_info.weight_versions, begin, end, "SGLang 0.5.23")


_decoder = msgspec.json.Decoder(Answer)
_batch_decoder = msgspec.json.Decoder(list[Answer])


def decode(body: bytes) -> Answer:
    try:
        return _decoder.decode(body)
    except msgspec.DecodeError as error:
        raise BadAnswer(f"no answer of SGLang: {kept('SGLang', body.decode(errors='replace'))}") from error


def decode_event(body: bytes) -> Answer:
    """Decodes an event of a stream. Raises BadAnswer and RequestRefused."""
    if body.startswith(b'{"error"'):
        raise RequestRefused.by("SGLang", body.decode(errors="replace"))
    return decode(body)


def room(ask: Ask, context_length: int) -> int:
    return min(ask.sampling.max_tokens, context_length - len(ask.token_ids))


def encode(
    ask: Ask,
    rid: str,
    adapter: str,
    context_length: int,
    end_of_turn: Collection[int],
    *,
    stream: bool,
    priority: bool,
) -> bytes:
    """`end_of_turn` is sent along, because the server knows only the tokens of the model's configuration, not that of
    the chat template."""
    sampling = ask.sampling
    only_the_likeliest = sampling.temperature > 0 and sampling.top_k == 1
    params: dict[str, object] = {
        "temperature": sampling.temperature,
        "top_p": _ONLY_THE_LIKELIEST if only_the_likeliest else sampling.top_p,
        "top_k": -1 if only_the_likeliest or sampling.top_k == 0 else sampling.top_k,
        "max_new_tokens": room(ask, context_length),
    }
    if sampling.seed is not None:
        params["sampling_seed"] = sampling.seed
    if sampling.stop:
        params["stop"] = sampling.stop
        params["no_stop_trim"] = True
    if stops := sorted({*sampling.stop_token_ids, *end_of_turn}):
        params["stop_token_ids"] = stops
    if sampling.regex is not None:
        params["regex"] = sampling.regex
    if sampling.json_schema is not None:
        params["json_schema"] = sampling.json_schema
    request: dict[str, object] = {
        "rid": rid,
        "input_ids": ask.token_ids,
        "sampling_params": params,
        "return_logprob": True,
        "stream": stream,
    }
    if adapter:
        request["lora_path"] = adapter
    if priority:
        request["priority"] = ask.priority
    return msgspec.json.encode(request)


def encode_score(token_ids: Sequence[int], rid: str, adapter: str, begin: int) -> bytes:
    """Asks for the log-probabilities of softmax(logits) of all tokens after the first `begin`."""
    request: dict[str, object] = {
        "rid": rid,
        "input_ids": token_ids,
        # Zero new tokens: only the prompt is computed. From `begin` on nothing is taken from the cache.
        "sampling_params": {"max_new_tokens": 0, "temperature": 0.0},
        "return_logprob": True,
        "logprob_start_len": max(0, begin - 1),
    }
    if adapter:
        request["lora_path"] = adapter
    return msgspec.json.encode(request)


def decode_score(answer: Answer, count: int) -> tuple[float, ...]:
    """The log-probabilities of the last `count` tokens. Raises BadAnswer."""
    found = answer.meta_info.input_token_logprobs or []
    if len(found) < count:
        raise BadAnswer(f"{len(found)} log-probabilities of a prompt instead of {count}")
    # JSON has no NaN: null stands for it. The weight check must see it.
    return tuple(math.nan if value is None else value for value, _, _ in found[len(found) - count :])


def encode_forced(
    prefixes: Sequence[Sequence[int]], following: Sequence[int], temperature: float, adapter: str
) -> bytes:
    """Asks, for each prefix, for the log-probability of one token after it at this temperature, whatever is sampled."""
    request: dict[str, object] = {
        "input_ids": prefixes,
        "sampling_params": {"max_new_tokens": 1, "temperature": temperature, "top_k": -1},
        "return_logprob": True,
        "token_ids_logprob": [[token] for token in following],
    }
    if adapter:
        request["lora_path"] = [adapter] * len(prefixes)
    return msgspec.json.encode(request)


def decode_forced(body: bytes, count: int) -> tuple[list[Answer], tuple[float, ...]]:
    try:
        answers = _batch_decoder.decode(body)
    except msgspec.DecodeError as error:
        raise BadAnswer(str(error)) from error
    if len(answers) != count:
        raise BadAnswer(f"{len(answers)} answers to {count} requests")
    values = []
    for answer in answers:
        found = answer.meta_info.output_token_ids_logprobs
        if not found or not found[0]:
            raise BadAnswer("no log-probability of a token that was asked for")
        value = found[0][0][0]
        values.append(math.nan if value is None else value)
    return answers, tuple(values)


def check_finish(answer: Answer) -> None:
    """Raises Aborted or BadAnswer, if the sample did not end as it should."""
    finish = answer.meta_info.finish_reason
    if finish is None:
        return
    if finish.type == "abort":
        raise Aborted(f"the request was aborted: {kept('SGLang', finish.message or 'nothing')}")
    if finish.matched == _NOT_A_NUMBER:
        raise BadAnswer("the model's logits are not numbers")


def log_probs(answer: Answer) -> tuple[float, ...]:
    """The log-probabilities of all sampled tokens. Raises BadAnswer."""
    found = [value for value, _, _ in answer.meta_info.output_token_logprobs or []]
    return known(found, len(answer.output_ids))


class SglangStream(StreamReader):
    """Each event has what is new (`incremental`), or all that there is so far. It names the weights that the server
    holds when it sends the event. As long as these are `label`, they also sampled the tokens."""

    def __init__(self, label: str, *, incremental: bool):
        super().__init__(label)
        self._incremental = incremental

    def read(self, answer: Answer) -> tuple[list[int], tuple[float, ...], list[tuple[str, int]]] | None:
        """Token ids, log-probabilities and labels to pass on now. Raises BadAnswer."""
        values = [value for value, _, _ in answer.meta_info.output_token_logprobs or []]
        if self._incremental:
            self.token_ids += answer.output_ids
            self._values += values
        else:
            self.token_ids = answer.output_ids
            self._values = values
        finished = answer.meta_info.finish_reason is not None
        certain = answer.meta_info.weight_version == self._label
        return self._news(answer.labels if finished else None, certain=certain)


def stop_reason(
    answer: Answer, token_ids: Sequence[int], sampling: SamplingParams, end_of_turn: Collection[int]
) -> StopReason:
    """Why the sample ended; `token_ids` are all of its tokens."""
    finish = answer.meta_info.finish_reason
    assert finish is not None
    stopped = finish.type == "stop"
    by_string = isinstance(finish.matched, str)
    return answers.stop_reason(token_ids, sampling, end_of_turn, stopped, by_string=by_string)
