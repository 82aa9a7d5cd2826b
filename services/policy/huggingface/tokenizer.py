"""A tokenizer and chat template in the form in which transformers stores them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

from jinja2 import TemplateError
from transformers import AutoTokenizer

from mulligan.common.model_files import UnsupportedModel, short
from mulligan.policy.chat import Chat, NoTurnEnd, TemplateFailure, turn_end
from mulligan.policy.literals import AddedToken, ControlTokens, Span

_SHORT = 1_000  # characters: a few milliseconds at most


class Tokenizer:
    """`inner` is a fast tokenizer of transformers."""

    def __init__(self, inner: Any):
        self.inner = inner
        inner.backend_tokenizer.no_truncation()  # some files state one; a prompt that is too long is an error here
        inner.backend_tokenizer.no_padding()
        added = inner.added_tokens_decoder.items()
        self.longest_token = max(len(token.encode("utf-8", "replace")) for token in inner.get_vocab())
        self.controls = ControlTokens([AddedToken(i, str(t.content), bool(t.special)) for i, t in added], self._spans)

    @classmethod
    def load(cls, source: str) -> Tokenizer:
        """Loads from a hub id or a folder. Raises UnsupportedModel."""
        try:
            inner = AutoTokenizer.from_pretrained(source)
        except Exception as error:  # a loader fails in many ways, which mean the same to callers
            raise UnsupportedModel(f"the tokenizer of {source} cannot be loaded: {short(error)}") from error
        if not hasattr(inner, "backend_tokenizer"):
            raise UnsupportedModel(f"the tokenizer of {source} has no tokenizer.json form")
        if not inner.backend_tokenizer.get_vocab_size(with_added_tokens=False):
            raise UnsupportedModel(f"{source} has no tokenizer, or one without a vocabulary")
        return cls(inner)

    def encode(self, text: str) -> list[int]:
        """Token ids of the text. Control tokens in it are recognised; none is added."""
        # The inner tokenizer: transformers' wrapper takes five times as long, and is not made for several threads.
        inner = self.inner.backend_tokenizer
        if len(text) <= _SHORT:
            return cast("list[int]", inner.encode(text, add_special_tokens=False).ids)
        # Of a batch, because it lets other threads run meanwhile; without offsets it takes less time and memory.
        return cast("list[int]", inner.encode_batch_fast([text], add_special_tokens=False)[0].ids)

    def _spans(self, text: str) -> tuple[list[int], list[Span]]:
        inner = self.inner.backend_tokenizer
        encoding = (
            inner.encode(text, add_special_tokens=False)
            if len(text) <= _SHORT
            else inner.encode_batch([text], add_special_tokens=False)[0]
        )
        return encoding.ids, encoding.offsets

    def decode(self, token_ids: Sequence[int], *, special: bool = False) -> str:
        """With or without special tokens."""
        return str(self.inner.decode(token_ids, skip_special_tokens=not special))

    def decode_marked(self, token_ids: Sequence[int], text: str, end_of_turn: Collection[int]) -> str:
        """The text with its special tokens, except padding and those in `end_of_turn`. `text` is the text without
        any."""
        kept = [token for token in token_ids if token not in end_of_turn and token != self.inner.pad_token_id]
        return self.decode(kept, special=True) if any(map(self.controls.is_special, kept)) else text

    def end_of_turn(self, *others: object) -> tuple[int, ...]:
        """The tokens that end a turn: those that the tokenizer and `others` (the model's configuration and generation
        settings) name, and the one with which the chat template closes a turn. Raises UnsupportedModel if the template
        closes turns without a token."""
        found: set[int] = set()
        for source in (self.inner, *others):
            value = getattr(source, "eos_token_id", None)
            found |= {value} if isinstance(value, int) else set(value or ())
        if self.inner.chat_template:
            try:
                closing = turn_end(self._template, self, found)
            except NoTurnEnd as error:
                raise UnsupportedModel(f"{error}, so nothing tells when a reply is over") from error
            found |= {closing} if closing is not None else set()
        return tuple(sorted(found))

    def chat(self, end_of_turn: Sequence[int]) -> Chat:
        return Chat(self._template if self.inner.chat_template else None, self, end_of_turn)

    def _template(
        self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]], add_generation_prompt: bool
    ) -> str:
        try:
            text = self.inner.apply_chat_template(
                [dict(message) for message in messages],
                tools=[dict(tool) for tool in tools] or None,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise TemplateFailure(str(error)) from error
        return str(text)
