"""An `Ask` as a request to SGLang's /generate, and its answer as a `Sampled`.

SGLang's log-probabilities of output tokens are those of the contract: of softmax(logits / temperature), and of
softmax(logits) for a greedy request (temperature 0 is top-k 1 at temperature 1 there), whatever runs beside it. Two
exceptions are dealt with here: a batch in which every request has top-k 1 is not scaled by temperature, so top-k 1 is
asked for as a tiny top-p; and under a regex or schema they are of the constrained logits, so they are scored anew.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import msgspec

from services.common.types import SamplingParams, StopReason
from services.policy.backend import Ask
from services.policy.backends.sglang_engine.connection import Refused

_ONLY_THE_LIKELIEST = 1e-6  # top-p
# What SGLang calls a stop that it made up, when logits were not numbers.
_NOT_A_NUMBER = "NaN happened"


class BadAnswer(Exception):
    """What a server that works does not answer."""


class Aborted(Exception):
    """Somebody aborted the request."""


class _Span(msgspec.Struct):
    version: str
    start: int
    end: int


class _Finish(msgspec.Struct):
    type: str
    matched: int | str | list[int] | None = None
    message: str = ""
    status_code: int | None = None


class _Meta(msgspec.Struct):
    finish_reason: _Finish | None = None
    weight_version: str = ""
    weight_versions: list[_Span] = []
    input_token_logprobs: list[tuple[float | None, int, str | None]] | None = None
    output_token_logprobs: list[tuple[float | None, int, str | None]] | None = None
    output_token_ids_logprobs: list[list[tuple[float | None, int, str | None]]] | None = None


class Answer(msgspec.Struct):
    meta_info: _Meta
    output_ids: list[int] = []

    @property
    def covered(self) -> int:
        """Of how many tokens it tells by which weights they were sampled."""
        return max((span.end for span in self.meta_info.weight_versions), default=0)

    def labels(self, begin: int, end: int) -> list[tuple[str, int]]:
        """By which weights, as the server calls them, these of its tokens were sampled, and how many each."""
        if begin == end:  # also what sampled nothing was computed by somebody
            return [(self.meta_info.weight_version, 0)]
        found: list[tuple[str, int]] = []
        for span in self.meta_info.weight_versions:
            count = min(span.end, end) - max(span.start, begin)
            if count > 0:
                found.append((span.version, count))
        if sum(count for _, count in found) != end - begin:
            raise BadAnswer("weight_versions do not cover the tokens: is this SGLang 0.5.23 or later?")
        return found


_decoder = msgspec.json.Decoder(Answer)
_batch_decoder = msgspec.json.Decoder(list[Answer])


def decode(body: bytes) -> Answer:
    try:
        return _decoder.decode(body)
    except msgspec.DecodeError as error:
        raise BadAnswer(f"{error}: {body[:300].decode(errors='replace')}") from error


def decode_event(body: bytes) -> Answer:
    """Of a stream. Raises Refused, too."""
    if body.startswith(b'{"error"'):
        raise Refused(body.decode(errors="replace"))
    return decode(body)


def room(ask: Ask, context_length: int) -> int:
    return min(ask.sampling.max_tokens, context_length - len(ask.token_ids))


def encode(ask: Ask, rid: str, adapter: str, context_length: int, *, stream: bool, priority: bool) -> bytes:
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
    if sampling.stop_token_ids:
        params["stop_token_ids"] = sampling.stop_token_ids
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
    """Log-probabilities of softmax(logits) of all tokens after the first `begin`."""
    request: dict[str, object] = {
        "rid": rid,
        "input_ids": token_ids,
        # Zero new tokens: the prompt alone is computed. From `begin` on nothing is taken from the cache.
        "sampling_params": {"max_new_tokens": 0, "temperature": 0.0},
        "return_logprob": True,
        "logprob_start_len": max(0, begin - 1),
    }
    if adapter:
        request["lora_path"] = adapter
    return msgspec.json.encode(request)


def decode_score(answer: Answer, count: int) -> tuple[float, ...]:
    """Of the last `count` tokens."""
    found = answer.meta_info.input_token_logprobs or []
    if len(found) < count:
        raise BadAnswer(f"{len(found)} log-probabilities of a prompt instead of {count}")
    # JSON has no NaN: null stands for it. The canary must see it.
    return tuple(math.nan if value is None else value for value, _, _ in found[len(found) - count :])


def encode_forced(
    prefixes: Sequence[Sequence[int]], following: Sequence[int], temperature: float, adapter: str
) -> bytes:
    """What the log-probability of a token that follows each prefix is at this temperature, whatever is sampled."""
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
    """Raises Aborted, BadAnswer."""
    finish = answer.meta_info.finish_reason
    if finish is None:
        return
    if finish.type == "abort":
        raise Aborted(finish.message or "the request was aborted")
    if finish.matched == _NOT_A_NUMBER:
        raise BadAnswer("the model's logits are not numbers")


def log_probs(answer: Answer, begin: int, count: int) -> tuple[float, ...]:
    """Of `count` sampled tokens, from the one at `begin` of those that the answer tells."""
    found = (answer.meta_info.output_token_logprobs or [])[begin : begin + count]
    values = tuple(value for value, _, _ in found if value is not None)
    if len(values) != count:
        raise BadAnswer(f"{len(values)} log-probabilities of {count} tokens")
    return values


def stop_reason(
    answer: Answer, last_token: int, sampling: SamplingParams, tokens: int, end_of_turn: Collection[int]
) -> StopReason:
    """`tokens` is how many were sampled. The order is that of the transformers backend."""
    finish = answer.meta_info.finish_reason
    assert finish is not None
    if finish.type == "stop":
        if last_token in end_of_turn:
            return StopReason.END_OF_TURN
        if last_token in sampling.stop_token_ids:
            return StopReason.STOP_TOKEN
        return StopReason.STOP_STRING if isinstance(finish.matched, str) else StopReason.END_OF_TURN
    return StopReason.MAX_TOKENS if tokens >= sampling.max_tokens else StopReason.CONTEXT_FULL
