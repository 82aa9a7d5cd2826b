"""Conversations as token ids: rendered once with the model's chat template, and from then on only appended to.

Rendering a conversation again after each turn would decode what the model sampled and encode it anew, and the tokens
that are trained on would drift from those that were sampled. So the next prompt is the old tokens plus `extend`: what
the template puts between a sampled turn and the next. It is found with a stand-in for the sampled turn, whose text is
cut off again; what was sampled is never looked at.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import Any, Protocol

from services.common.errors import DomainError, Reason
from services.common.types import Continuation, Message, Role

_OPENING = "Hi"
_STAND_IN = "standin"
_THOUGHT = "<think>\nstandin thought\n</think>\n\nstandin"
_SYSTEM_PROBE = "systemprobe"


class TemplateFailure(Exception):
    """The chat template refused a conversation; the message is the template's."""


class Template(Protocol):
    def __call__(self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool) -> str:
        """The conversation as text, special tokens included. Raises TemplateFailure."""


class Encode(Protocol):
    def __call__(self, text: str, /) -> list[int]:
        """Token ids; special tokens are recognised and none is added."""


class Chat:
    """A model's chat template.

    `rewrites_history` is true of a template that shows an earlier turn otherwise than it was sampled (Qwen3 drops old
    thinking): continuations are refused then, because the model would see what its template never shows it.

    A template without a system role (Gemma 2) gets leading system messages merged into the first user message, divided
    by an empty line, as the templates of the later Gemmas do it themselves.
    """

    def __init__(self, template: Template | None, encode: Encode, end_of_turn_token_ids: Collection[int]):
        self._template = template
        self._encode = encode
        self._end_of_turn = frozenset(end_of_turn_token_ids)
        self.has_system_role = template is not None and self._shows_system()
        self._closing = ""
        self.rewrites_history = template is not None and not self._keeps_history()
        self._render = lru_cache(maxsize=4096)(self._render_uncached)
        self._extend = lru_cache(maxsize=4096)(self._extend_uncached)

    def render(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """A conversation with a header for the assistant's turn. Raises DomainError TEMPLATE_ERROR, EMPTY_PROMPT."""
        return self._render(tuple(messages))

    def extend(self, continuation: Continuation) -> tuple[int, ...]:
        """The ids to append to `continuation.token_ids`.

        Raises DomainError TEMPLATE_REWRITES_HISTORY, TEMPLATE_ERROR, EMPTY_PROMPT.
        """
        if self.rewrites_history:
            raise DomainError(
                Reason.TEMPLATE_REWRITES_HISTORY,
                "the chat template of this model changes earlier turns: send all messages instead of a continuation",
            )
        if not continuation.token_ids:
            raise DomainError(Reason.EMPTY_PROMPT, "continuation.token_ids: a continuation continues something")
        return self._extend(continuation.messages, continuation.turn_closed)

    def _render_uncached(self, messages: tuple[Message, ...]) -> tuple[int, ...]:
        if not messages:
            raise DomainError(Reason.EMPTY_PROMPT, "messages: at least one is needed")
        return tuple(self._encode(self._apply(self._prepare(messages), add_generation_prompt=True)))

    def _extend_uncached(self, messages: tuple[Message, ...], turn_closed: bool) -> tuple[int, ...]:
        if not messages:
            raise DomainError(Reason.EMPTY_PROMPT, "continuation.messages: at least one is needed")
        before = [_dictionary(Role.USER, _OPENING), _dictionary(Role.ASSISTANT, _STAND_IN)]
        after = [_dictionary(message.role, message.content) for message in messages]
        text = self._apply([*before, *after], add_generation_prompt=True)
        appended = text.partition(_STAND_IN)[2]
        if not turn_closed:
            return tuple(self._encode(appended))
        # The model closed its turn itself: its closing token takes the place of the template's.
        ids = self._encode(appended)
        closing = self._encode(self._closing)
        for index, token in enumerate(ids[: len(closing)]):
            if token in self._end_of_turn:
                return tuple(ids[index + 1 :])
        return tuple(ids)

    def _prepare(self, messages: Sequence[Message]) -> list[dict[str, str]]:
        if self.has_system_role or messages[0].role is not Role.SYSTEM:
            return [_dictionary(message.role, message.content) for message in messages]
        leading = next((i for i, message in enumerate(messages) if message.role is not Role.SYSTEM), len(messages))
        if leading == len(messages) or messages[leading].role is not Role.USER:
            raise DomainError(
                Reason.TEMPLATE_ERROR,
                "messages: the chat template of this model has no system role, so a system message is put in front of "
                "the first user message, and no user message follows it",
            )
        merged = "\n\n".join(message.content for message in messages[: leading + 1])
        rest = messages[leading + 1 :]
        return [_dictionary(Role.USER, merged), *(_dictionary(message.role, message.content) for message in rest)]

    def _apply(self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool) -> str:
        if self._template is None:
            raise DomainError(Reason.TEMPLATE_ERROR, "this model has no chat template: send token_ids")
        try:
            return self._template(messages, add_generation_prompt=add_generation_prompt)
        except TemplateFailure as failure:
            raise DomainError(Reason.TEMPLATE_ERROR, f"the chat template refuses the messages: {failure}") from failure

    def _shows_system(self) -> bool:
        """Some templates raise on a system message, others leave it out without a word."""
        probe = [_dictionary(Role.SYSTEM, _SYSTEM_PROBE), _dictionary(Role.USER, _OPENING)]
        try:
            return _SYSTEM_PROBE in self._apply(probe, add_generation_prompt=True)
        except DomainError:
            return False

    def _keeps_history(self) -> bool:
        """Whether every conversation's text begins with what was shown and sampled before its last message.

        Also finds the text that closes an assistant's turn.
        """
        opening = _dictionary(Role.USER, _OPENING)
        following = [_dictionary(Role.USER, "Go on")]
        try:
            shown = self._apply([opening], add_generation_prompt=True)
            for text in (_STAND_IN, _THOUGHT):
                turns = [opening, _dictionary(Role.ASSISTANT, text)]
                finished = self._apply(turns, add_generation_prompt=False)
                continued = self._apply([*turns, *following], add_generation_prompt=True)
                if not finished.startswith(shown + text) or not continued.startswith(shown + text):
                    return False
                self._closing = finished.removeprefix(shown + text)
        except DomainError:  # a template for single turns: no conversation can be continued
            return False
        return True


def _dictionary(role: Role, content: str) -> dict[str, Any]:
    return {"role": role.value, "content": content}
