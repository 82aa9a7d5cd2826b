"""Constrained sampling: which tokens keep a completion matching a regular expression or a JSON schema.

https://github.com/guidance-ai/llguidance
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import llguidance
import numpy as np
import numpy.typing as npt
from llguidance.hf import from_tokenizer

from mulligan.common.errors import DomainError, invalid_field
from mulligan.common.inference import SamplingParams
from mulligan.common.model_files import UnsupportedModel
from mulligan.common.sized_cache import SizedCache
from mulligan.policy.huggingface.tokenizer import Tokenizer

_SILENT = 0
_SCHEMA = ("json_schema", "a JSON schema")
_PROBES = 500
_CACHE_BYTES = 2**26
_ENTRY_BYTES = 2**18  # of what a grammar is compiled to, about, and for each character of it (as measured: 40 to 150
_BYTES_OF_EACH = 128  # kB, and 20 to 110 bytes)


class Constraint:
    """The state of one completion."""

    def __init__(self, matcher: llguidance.LLMatcher, vocabulary_size: int):
        self._matcher = matcher
        self._size = vocabulary_size

    def allowed(self) -> npt.NDArray[np.bool_] | None:
        """For each token of the vocabulary, whether it may come next; None if no continuation can match."""
        if self._matcher.is_error():
            return None
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        allowed = np.unpackbits(bits, count=self._size, bitorder="little").astype(bool)
        return allowed if allowed.any() and not self._matcher.is_error() else None

    def advance(self, token: int) -> None:
        """Appends a token that was allowed."""
        self._matcher.consume_token(token)

    @property
    def problem(self) -> str:
        """Why no token is allowed, in one line."""
        error = " ".join(self._matcher.get_error().partition("<state>")[0].split())
        return error or "no token of the vocabulary continues it"


class Constraints:
    """Makes constraints for one tokenizer. Creating it takes a second for a large vocabulary.

    Raises UnsupportedModel if a text is not the concatenation of its tokens' bytes. Some tokenizers add spaces only
    when they decode: the grammar would then see another text than the caller.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary_size: int, end_of_turn: Sequence[int]):
        self._size = vocabulary_size
        if not end_of_turn:
            raise UnsupportedModel("no token ends a turn, and so a constrained completion")
        try:
            self._tokenizer = from_tokenizer(tokenizer.inner, n_vocab=vocabulary_size, eos_token=list(end_of_turn))
        except ValueError as error:
            raise UnsupportedModel(f"the tokenizer's tokens are not known as bytes: {error}") from error
        if not self._decodes_as(tokenizer):
            raise UnsupportedModel("the tokenizer's tokens are not the bytes of the text that they are decoded to")
        self._compiled: SizedCache[llguidance.LLMatcher] = SizedCache(_CACHE_BYTES)

    def _decodes_as(self, tokenizer: Tokenizer) -> bool:
        """Tests short sequences of random tokens."""
        rng = np.random.default_rng(0)
        for row in rng.integers(0, min(self._size, len(tokenizer.inner)), (_PROBES, 4)).tolist():
            ids = [token for token in row if not self._tokenizer.is_special_token(token)]
            try:
                text = b"".join(self._tokenizer.decode_bytes([token]) for token in ids).decode()
            except UnicodeDecodeError:  # a part of a character
                continue
            if tokenizer.decode(ids) != text:
                return False
        return True

    def of(self, sampling: SamplingParams) -> Constraint:
        """A new constraint for the request. Can take seconds. Raises DomainError INVALID_FIELD."""
        field, expected = ("regex", "a regular expression") if sampling.regex is not None else _SCHEMA
        try:
            constraint = Constraint(self._matcher_of(sampling.regex, sampling.json_schema).deep_copy(), self._size)
        except (ValueError, TypeError, RecursionError) as error:
            raise _refused(field, expected, str(error)) from error
        # The first step takes longest: better here than in the engine's thread, where others wait for it.
        if constraint.allowed() is None:
            raise _refused(field, f"{expected} that can be followed", constraint.problem)
        return constraint

    def _matcher_of(self, regex: str | None, json_schema: str | None) -> llguidance.LLMatcher:
        key = (regex, json_schema)
        found = self._compiled.get(key)
        if found is None:
            found = self._compile(regex, json_schema)
            self._compiled.put(key, found, _ENTRY_BYTES + _BYTES_OF_EACH * len(regex or json_schema or ""))
        return found

    def _compile(self, regex: str | None, json_schema: str | None) -> llguidance.LLMatcher:
        if regex is not None:
            return self._matcher(llguidance.LLMatcher.grammar_from_regex(regex))
        return self._matcher(llguidance.LLMatcher.grammar_from_json_schema(json.loads(json_schema or "")))

    def _matcher(self, grammar: str) -> llguidance.LLMatcher:
        return llguidance.LLMatcher(self._tokenizer, grammar, log_level=_SILENT)


def _refused(field: str, expected: str, error: str) -> DomainError:
    return invalid_field(f"sampling.{field}", f"{expected} ({error[:300]})")
