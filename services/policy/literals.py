"""Text in a message that looks like a control token is encoded as text. Only the chat template writes control tokens.

An observation with `<|im_end|>` in it would otherwise end its own turn. So each such literal is replaced by one
private-use character before the template is applied, and encoded in pieces afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mulligan.common.errors import DomainError, Reason
from mulligan.policy.text_length import check_tokens_of

Span = tuple[int, int]  # start and end in a text, in characters
_MARKUP = re.compile(r"[<\[{(«◁｢].*[>\]})»▷｣]", re.DOTALL)
_PRIVATE = (*range(0xF0000, 0xFFFFE), *range(0x100000, 0x10FFFE), *range(0xE000, 0xF900))  # Unicode's private use
_UNSPEAKABLE = "\ufffd"  # in place of a control token that is a single character


@dataclass(frozen=True, slots=True)
class AddedToken:
    """A token that a tokenizer recognises before it splits a text into words."""

    token_id: int
    text: str
    special: bool

    @property
    def is_control(self) -> bool:
        """Flagged as special, or written like a mark: `<think>`, `[TOOL_CALLS]`. Others are words and white space."""
        return bool(self.text.strip()) and (self.special or _MARKUP.fullmatch(self.text) is not None)


class ControlTokens:
    """The control tokens of a tokenizer, and where a text holds them."""

    def __init__(self, added: Sequence[AddedToken], tokenize: Callable[[str], tuple[list[int], list[Span]]]):
        """`tokenize` gives the token ids of a text and the span of each; control tokens are recognised."""
        self._special: Mapping[int, bool] = {token.token_id: token.special for token in added if token.is_control}
        self._tokenize = tokenize
        texts = [token.text for token in added if token.is_control]
        self._heads = tuple({text[:2].lower() for text in texts})
        self._beginnings = frozenset(text[:end] for text in texts for end in range(1, len(text)))
        self._endings = frozenset(text[start:] for text in texts for start in range(1, len(text)))
        self._longest = max(map(len, texts), default=0)
        self._first = {text[0] for text in texts}
        self._last = {text[-1] for text in texts}

    def __contains__(self, token_id: int) -> bool:
        return token_id in self._special

    def is_special(self, token_id: int) -> bool:
        """Whether it is flagged as special."""
        return self._special.get(token_id, False)

    def may_be_in(self, text: str) -> bool:
        """If not, the text need not be tokenised to know that none is there."""
        lower = text.lower()
        # Normalisers turn characters that are not of ASCII into these.
        return not text.isascii() or any(head in lower for head in self._heads)

    def spans(self, text: str, *, special: bool = False) -> list[Span]:
        """Of all control tokens, or of those that are flagged as special."""
        if not self.may_be_in(text):
            return []
        ids, spans = self._tokenize(text)
        return [
            span
            for token, span in zip(ids, spans, strict=True)
            if token in self._special and (self._special[token] or not special)
        ]

    def edges(self, text: str) -> list[Span]:
        """The start and the end of a text, where the template's own text beside it could complete a control token.
        White space around the text is ignored, since templates strip it."""
        start = len(text) - len(text.lstrip())
        end = len(text.rstrip())
        sizes = range(min(self._longest, end - start), 0, -1)
        spans = []
        if not self._last.isdisjoint(text[start : start + self._longest]):
            head = next((size for size in sizes if text[start : start + size] in self._endings), 0)
            spans += [(start, start + head)] * bool(head)
        if not self._first.isdisjoint(text[max(start, end - self._longest) : end]):
            tail = next((size for size in sizes if text[end - size : end] in self._beginnings), 0)
            spans += [(end - tail, end)] * bool(tail)
        return spans


class Literals:
    """The literals of one conversation: `hide` replaces them in its messages, `encode` puts them back as plain text.
    Both raise MoreTokens."""

    def __init__(self, encode: Callable[[str], list[int]], controls: ControlTokens, longest: int = 0):
        """A text that has many more than `longest` tokens raises MoreTokens; 0: it may have any number."""
        self._encode = encode
        self._controls = controls
        self._longest = longest
        self._hidden: dict[str, str] = {}  # by the character that stands for it
        self._stand_ins: dict[str, str] = {}  # the other way round
        self._used: set[str] = set()
        self._private = map(chr, _PRIVATE)

    def hide(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> None:
        """In place. Marks of thoughts and calls in the assistant's own messages stay: the model samples them so."""
        trees = [(message, message["role"] == "assistant") for message in messages] + [(tool, False) for tool in tools]
        texts = {(text, own) for tree, own in trees for text in _strings(tree)}
        found = {(text, own): spans for text, own in texts if (spans := self._spans(text, own))}
        if not found:
            return
        self._used = {character for text, _ in texts for character in text}
        for tree, own in trees:
            for key, value in tree.items():
                tree[key] = self._masked(value, own, found)

    def encode(self, text: str) -> list[int]:
        """Token ids of the text that the template made of the messages. Raises MoreTokens."""
        check_tokens_of(self._encode_all, text, self._longest)
        return self._encode_all(text)

    def _encode_all(self, text: str) -> list[int]:
        ids: list[int] = []
        begin = 0
        for index, character in enumerate(text) if self._hidden else ():
            if character in self._hidden:
                ids += self._encode(text[begin:index]) + self._plain(self._hidden[character])
                begin = index + 1
        return ids + self._encode(text[begin:])

    def _spans(self, text: str, own: bool) -> list[Span]:
        """In order; those that overlap are one."""
        if self._controls.may_be_in(text):
            check_tokens_of(self._encode, text, self._longest)
        merged: list[Span] = []
        for span in sorted(self._controls.spans(text, special=own) + self._controls.edges(text)):
            if merged and span[0] < merged[-1][1]:
                merged[-1] = (merged[-1][0], max(span[1], merged[-1][1]))
            else:
                merged.append(span)
        return merged

    def _masked(self, value: Any, own: bool, found: Mapping[tuple[str, bool], list[Span]]) -> Any:
        if isinstance(value, dict):
            return {self._masked(key, own, found): self._masked(one, own, found) for key, one in value.items()}
        if isinstance(value, list):
            return [self._masked(one, own, found) for one in value]
        if not isinstance(value, str) or (value, own) not in found:
            return value
        parts = []
        begin = 0
        for start, end in found[value, own]:
            parts += [value[begin:start], self._stand_in(value[start:end])]
            begin = end
        return "".join([*parts, value[begin:]])

    def _stand_in(self, literal: str) -> str:
        known = self._stand_ins.get(literal)
        if known is not None:
            return known
        free = next((character for character in self._private if character not in self._used), None)
        if free is None:
            raise DomainError(Reason.TEMPLATE_ERROR, "messages: they hold every private-use character of Unicode")
        self._hidden[free] = literal
        self._stand_ins[literal] = free
        return free

    def _plain(self, text: str) -> list[int]:
        """Token ids without control tokens: the text is cut until none is recognised."""
        spans = self._controls.spans(text)
        if not spans:
            return self._encode(text)
        if len(text) == 1:
            return self._encode(_UNSPEAKABLE)
        cut = min(spans[0][0] + 1, len(text) - 1)
        return self._plain(text[:cut]) + self._plain(text[cut:])


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, one in value.items():
            yield from _strings(key)
            yield from _strings(one)
    elif isinstance(value, list):
        for one in value:
            yield from _strings(one)
