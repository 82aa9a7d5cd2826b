"""What an answer of a server means, and the checks that all answers pass."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

import msgspec

from mulligan.common import numbers
from mulligan.common.inference import SamplingParams, StopReason


class BadAnswer(Exception):
    """An answer that a working server would not give, or one from weights that it was not given, or should no longer
    hold."""


class Aborted(Exception):
    """Somebody aborted the request."""


class WeightSpan(msgspec.Struct):
    """Tokens `start` up to `end` of a sample were computed by the weights of this name."""

    version: str
    start: int
    end: int


def labels_between(spans: Iterable[WeightSpan], begin: int, end: int, engine: str) -> list[tuple[str, int]]:
    """The names of the weights that sampled the tokens `begin` up to `end`, each with its number of tokens. Raises
    BadAnswer if the spans do not cover these tokens. `engine` is the engine's name and its first version with spans."""
    found: list[tuple[str, int]] = []
    for span in spans:
        count = min(span.end, end) - max(span.start, begin)
        if count > 0:
            found.append((span.version, count))
    if sum(count for _, count in found) != end - begin:
        raise BadAnswer(f"weight_versions do not cover the tokens: is this {engine} or later?")
    return found


class StreamReader:
    """Decides which tokens of one stream are passed on, and when. Only the last event says which weights sampled each
    token.

    As long as the server certainly holds what it held when the request was sent, tokens are from the weights `label`.
    From then on they are held back until the last event comes. Subclasses add what an event brings to `token_ids`, and
    its log-probabilities to `_values`.
    """

    def __init__(self, label: str):
        self._label = label
        self._certain = True
        self._values: list[float | None] = []
        self.token_ids: list[int] = []
        self._told = 0

    def _news(
        self, labels: Callable[[int, int], list[tuple[str, int]]] | None, *, certain: bool
    ) -> tuple[list[int], tuple[float, ...], list[tuple[str, int]]] | None:
        """Token ids, log-probabilities and labels to pass on now. `labels` is that of the last event. Raises
        BadAnswer."""
        begin = self._told
        end = len(self.token_ids)
        if labels is not None:
            if begin and any(label != self._label for label, _ in labels(0, begin)):
                raise BadAnswer("tokens that were sent were not sampled by the weights that the server held")
            found = labels(begin, end)
        else:
            self._certain = self._certain and certain
            end = min(end, len(self._values))
            if not self._certain or begin == end:
                return None
            found = [(self._label, end - begin)]
        self._told = end
        return self.token_ids[begin:end], known(self._values[begin:end], end - begin), found


def check_tokens(token_ids: Sequence[int], vocabulary_size: int) -> None:
    """Raises BadAnswer for token ids that are not in the vocabulary."""
    try:
        numbers.token_ids("token ids", token_ids, vocabulary_size)
    except ValueError as error:
        raise BadAnswer(str(error)) from error


def known(found: Sequence[float | None], count: int) -> tuple[float, ...]:
    """The log-probabilities. Raises BadAnswer unless they are `count` valid ones."""
    try:
        return numbers.log_probs("log-probabilities", found, count)
    except ValueError as error:
        raise BadAnswer(str(error)) from error


def check_scores(row: Sequence[float]) -> None:
    """Raises BadAnswer for numbers that are not log-probabilities. Only the weight check may see those."""
    known(row, len(row))


def stop_reason(
    token_ids: Sequence[int], sampling: SamplingParams, end_of_turn: Collection[int], stopped: bool, *, by_string: bool
) -> StopReason:
    """Why a sample of these tokens ended. The last token decides, not the server's word for the end: for a turn that
    closes with the last token that had room, it says `length`. The order is that of the transformers backend.

    `stopped`: the server says that the sample ended by itself. `by_string`: it ended with a stop string.
    """
    last = token_ids[-1] if token_ids else -1
    if last in end_of_turn:
        return StopReason.END_OF_TURN
    if last in sampling.stop_token_ids:
        return StopReason.STOP_TOKEN
    if stopped:
        return StopReason.STOP_STRING if by_string else StopReason.END_OF_TURN
    return StopReason.MAX_TOKENS if len(token_ids) >= sampling.max_tokens else StopReason.CONTEXT_FULL
