"""Converts an `Ask` to a request to vLLM's /inference/v1/generate, and reads the answer.

With --logprobs-mode processed_logprobs the log-probabilities of output tokens are of softmax(logits / temperature), as
the contract says. But they are renormalised over the tokens that top-p, top-k or a grammar leave. If a request has one
of these, they are scored again.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import msgspec

from mulligan.common.foreign import kept
from mulligan.policy.backend import Ask
from mulligan.policy.backends._servers.answers import Aborted, BadAnswer, StreamReader, WeightSpan, labels_between
from mulligan.policy.backends._servers.connection import RequestRefused, Unreachable

_NOT_A_NUMBER = -9999.0  # what vLLM sends instead


class _LogProb(msgspec.Struct):
    token_id: int
    logprob: float
    top_logprobs: list[_LogProb] = []


class _LogProbs(msgspec.Struct):
    content: list[_LogProb] | None = None


class _PromptLogProb(msgspec.Struct):
    logprob: float


class _Choice(msgspec.Struct):
    token_ids: list[int] = []
    logprobs: _LogProbs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    weight_versions: list[WeightSpan] | None = None


class _Failure(msgspec.Struct):
    message: str = ""
    code: int = 500


class VllmAnswer(msgspec.Struct):
    """The answer to a request for one sample; in a stream, what is new in it."""

    choices: list[_Choice] = []
    prompt_logprobs: list[dict[int, _PromptLogProb] | None] | None = None
    error: _Failure | None = None

    @property
    def choice(self) -> _Choice:
        return self.choices[0]

    @property
    def finished(self) -> bool:
        return self.choice.finish_reason is not None

    @property
    def log_probs(self) -> list[float | None]:
        content = self.choice.logprobs.content if self.choice.logprobs is not None else None
        return [None if value.logprob <= _NOT_A_NUMBER else value.logprob for value in content or ()]

    def labels(self, begin: int, end: int) -> list[tuple[str, int]]:
        """The labels of the weights that sampled these tokens, each with its number of tokens."""
        return labels_between(self.choice.weight_versions or (), begin, end, "vLLM 0.32")


_decoder = msgspec.json.Decoder(VllmAnswer)


def decode(body: bytes) -> VllmAnswer:
    """Raises BadAnswer and Aborted. In a stream that began well, also RequestRefused and Unreachable."""
    try:
        answer = _decoder.decode(body)
    except msgspec.DecodeError as error:
        raise BadAnswer(f"no answer of vLLM: {kept('vLLM', body.decode(errors='replace'))}") from error
    if answer.error is not None:
        if 400 <= answer.error.code < 500:
            raise RequestRefused.by("vLLM", answer.error.message)
        raise Unreachable(f"vLLM fails: {kept('vLLM', answer.error.message)}")
    if len(answer.choices) != 1:
        raise BadAnswer(f"{len(answer.choices)} samples instead of one")
    if answer.choice.finish_reason == "abort":
        raise Aborted("the request was aborted")
    return answer


def is_renormalised(ask: Ask) -> bool:
    """Whether vLLM's log-probabilities are not those of the contract."""
    sampling = ask.sampling
    constrained = sampling.regex is not None or sampling.json_schema is not None
    return constrained or (sampling.temperature > 0 and (sampling.top_p < 1 or sampling.top_k > 0))


def encode(
    ask: Ask, adapter: str, context_length: int, end_of_turn: Collection[int], *, stream: bool, priority: bool
) -> bytes:
    """`end_of_turn` is sent along, because the server knows only the tokens of the model's configuration, not that of
    the chat template."""
    sampling = ask.sampling
    params: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "max_tokens": min(sampling.max_tokens, context_length - len(ask.token_ids)),
        "logprobs": 0,  # none beside that of the sampled token
    }
    if sampling.seed is not None:
        params["seed"] = sampling.seed
    if sampling.stop:
        params["stop"] = sampling.stop
    if stops := sorted({*sampling.stop_token_ids, *end_of_turn}):
        params["stop_token_ids"] = stops
    if sampling.regex is not None:
        params["structured_outputs"] = {"regex": sampling.regex}
    if sampling.json_schema is not None:
        params["structured_outputs"] = {"json": sampling.json_schema}
    request = _request(ask.token_ids, adapter, params) | {"stream": stream}
    if priority:
        request["priority"] = -ask.priority  # the lower goes first there
    return msgspec.json.encode(request)


def encode_label(token_ids: Sequence[int], adapter: str) -> bytes:
    """Asks for one token; the answer has the label of the weights."""
    return msgspec.json.encode(_request(token_ids, adapter, {"max_tokens": 1}))


def encode_score(token_ids: Sequence[int], adapter: str) -> bytes:
    """Asks for the log-probabilities of softmax(logits) of all tokens after the first. One more token is sampled."""
    return msgspec.json.encode(_request(token_ids, adapter, {"max_tokens": 1, "prompt_logprobs": 0}))


def decode_score(answer: VllmAnswer, token_ids: Sequence[int], begin: int) -> tuple[float, ...]:
    """The log-probabilities of the tokens from `begin`, which is at least 1. Raises BadAnswer."""
    rows = answer.prompt_logprobs or []
    if len(rows) != len(token_ids):
        raise BadAnswer(f"{len(rows)} log-probabilities of a prompt of {len(token_ids)} tokens")
    found = []
    for row, token in zip(rows[begin:], token_ids[begin:], strict=True):
        if row is None or token not in row:
            raise BadAnswer(f"no log-probability of token {token} of a prompt")
        found.append(_number(row[token].logprob))
    return tuple(found)


def encode_forced(prefix: Sequence[int], token: int, temperature: float, adapter: str) -> bytes:
    """Asks for the log-probability of one token after the prefix at this temperature, whatever is sampled.

    vLLM shows as many as are asked for, and the sampled token is among them: the token is asked for twice.
    """
    params = {"max_tokens": 1, "temperature": temperature, "logprobs": 2, "logprob_token_ids": [token, token]}
    return msgspec.json.encode(_request(prefix, adapter, params))


def decode_forced(answer: VllmAnswer, token: int) -> float:
    content = answer.choice.logprobs.content if answer.choice.logprobs is not None else None
    for value in content[0].top_logprobs if content else ():
        if value.token_id == token:
            return _number(value.logprob)
    raise BadAnswer(f"no log-probability of token {token}, which was asked for")


class VllmStream(StreamReader):
    """Each event has what is new. `changed`: the server was told to change its weights since the request was sent."""

    def read(
        self, answer: VllmAnswer, *, changed: bool
    ) -> tuple[list[int], tuple[float, ...], list[tuple[str, int]]] | None:
        """Token ids, log-probabilities and labels to pass on now. Raises BadAnswer."""
        self.token_ids += answer.choice.token_ids
        self._values += answer.log_probs
        return self._news(answer.labels if answer.finished else None, certain=not changed)


def _request(token_ids: Sequence[int], adapter: str, params: dict[str, Any]) -> dict[str, Any]:
    request = {"token_ids": token_ids, "sampling_params": params}
    return request | {"model": adapter} if adapter else request


def _number(value: float) -> float:
    """JSON has no NaN. The weight check must see it."""
    return math.nan if value <= _NOT_A_NUMBER else value
