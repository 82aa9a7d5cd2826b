"""Conversations as token ids: rendered once with the model's chat template, and from then on only appended to.

Rendering a conversation again after each turn would decode what the model sampled and encode it anew, and the tokens
that are trained on would drift from those that were sampled. So the next prompt is the old tokens plus `extend`: what
the template puts between a sampled turn and the next. It is found with a stand-in for the sampled turn, whose text is
cut off again; what was sampled is never looked at.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol

from services.common.errors import DomainError, Reason, invalid_field
from services.common.inference import Continuation, Feature, Message, Role, Tool, ToolCall

_OPENING = Message(Role.USER, "Hi")
_STAND_IN = "standin"
_ANSWER = Message(Role.ASSISTANT, _STAND_IN)
_THOUGHT = Message(Role.ASSISTANT, "<think>\nstandin thought\n</think>\n\nstandin")
_CALL = Message(Role.ASSISTANT, "", (ToolCall(_STAND_IN, '{"standin": "argument"}'),))
_RESULT = Message(Role.TOOL, "resultprobe", name=_STAND_IN)
_TOOL = Tool("toolprobe", "Does it", '{"type": "object", "properties": {}}')
_SYSTEM_PROBE = "systemprobe"


class TemplateFailure(Exception):
    """The chat template refused a conversation; the message is the template's."""


class Template(Protocol):
    def __call__(
        self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]], add_generation_prompt: bool
    ) -> str:
        """The conversation as text, special tokens included. Raises TemplateFailure.

        Messages and tools have the form of OpenAI's chat completions, arguments and parameters as objects:
        https://huggingface.co/docs/transformers/chat_extras
        """


class Encode(Protocol):
    def __call__(self, text: str, /) -> list[int]:
        """Token ids; special tokens are recognised and none is added."""


class Chat:
    """A model's chat template.

    `rewrites_history` is true of a template that shows an earlier turn otherwise than it was sampled (Qwen3 drops old
    thinking): continuations are refused then, because the model would see what its template never shows it.

    `has_tools` is true of a template that shows tools, calls and what the tools answer.

    A template without a system role (Gemma 2) gets leading system messages merged into the first user message, divided
    by an empty line, as the templates of the later Gemmas do it themselves.
    """

    def __init__(self, template: Template | None, encode: Encode, end_of_turn_token_ids: Collection[int]):
        self._template = template
        self._encode = encode
        self._end_of_turn = frozenset(end_of_turn_token_ids)
        self.has_system_role = template is not None and self._shows_system()
        self.has_tools = template is not None and self._shows_tools()
        self._closing = ""
        self.rewrites_history = template is not None and not self._keeps_history()
        self._render = lru_cache(maxsize=4096)(self._render_uncached)
        self._extend = lru_cache(maxsize=4096)(self._extend_uncached)

    def render(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> tuple[int, ...]:
        """A conversation with a header for the assistant's turn.

        Raises DomainError TEMPLATE_ERROR, EMPTY_PROMPT, UNSUPPORTED_OPTION, INVALID_FIELD.
        """
        return self._render(tuple(messages), tuple(tools))

    def extend(self, continuation: Continuation) -> tuple[int, ...]:
        """The ids to append to `continuation.token_ids`.

        Raises DomainError TEMPLATE_REWRITES_HISTORY, TEMPLATE_ERROR, EMPTY_PROMPT, UNSUPPORTED_OPTION, INVALID_FIELD.
        """
        if self.rewrites_history:
            raise _rewrites_history()
        if not continuation.token_ids:
            raise DomainError(Reason.EMPTY_PROMPT, "continuation.token_ids: a continuation continues something")
        return self._extend(continuation.messages, continuation.turn_closed)

    def _render_uncached(self, messages: tuple[Message, ...], tools: tuple[Tool, ...]) -> tuple[int, ...]:
        if not messages:
            raise DomainError(Reason.EMPTY_PROMPT, "messages: at least one is needed")
        if tools:
            self._need_tools("tools")
        checked = self._checked("messages", messages)
        shown = [_function(f"tools[{index}]", tool) for index, tool in enumerate(tools)]
        return tuple(self._encode(self._apply(self._merged(messages, checked), shown, add_generation_prompt=True)))

    def _extend_uncached(self, messages: tuple[Message, ...], turn_closed: bool) -> tuple[int, ...]:
        if not messages:
            raise DomainError(Reason.EMPTY_PROMPT, "continuation.messages: at least one is needed")
        appended = self._after_stand_in(messages, self._checked("continuation.messages", messages))
        ids = self._encode(appended)
        if not turn_closed:
            return tuple(ids)
        # The model closed its turn itself: its closing token takes the place of the template's.
        closing = self._encode(self._closing)
        for index, token in enumerate(ids[: len(closing)]):
            if token in self._end_of_turn:
                return tuple(ids[index + 1 :])
        return tuple(ids)

    def _after_stand_in(self, messages: Sequence[Message], checked: list[dict[str, Any]]) -> str:
        """What the template puts after an assistant's turn, its closing included, when these messages follow."""
        # Some templates show answers of tools only where there are tools, and some models have two templates.
        tools = [_function("", _TOOL)] if any(map(_is_of_tools, messages)) else []
        before = [_dictionary("", message) for message in (_OPENING, _ANSWER)]
        if messages[0].role is not Role.TOOL:
            return self._apply([*before, *checked], tools, add_generation_prompt=True).partition(_STAND_IN)[2]
        # What tools answer follows a call, and some templates insist on it; what follows the call is found by the text
        # before, since templates write calls in many ways.
        before[-1] = _dictionary("", _CALL)
        opened = self._apply(before[:-1], tools, add_generation_prompt=True)
        called = self._apply(before, tools, add_generation_prompt=False)
        text = self._apply([*before, *checked], tools, add_generation_prompt=True)
        if not (called.startswith(opened) and text.startswith(called) and called.endswith(self._closing)):
            raise _rewrites_history()
        return self._closing + text.removeprefix(called)

    def _checked(self, field: str, messages: Sequence[Message]) -> list[dict[str, Any]]:
        if any(map(_is_of_tools, messages)):
            self._need_tools(field)
        return [_dictionary(f"{field}[{index}]", message) for index, message in enumerate(messages)]

    def _need_tools(self, field: str) -> None:
        if self._template is not None and not self.has_tools:
            raise DomainError(
                Reason.UNSUPPORTED_OPTION,
                f"{field}: the chat template of this model shows no tools",
                field=field,
                feature=Feature.TOOLS.value,
            )

    def _merged(self, messages: Sequence[Message], checked: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """System messages where the template shows them."""
        if self.has_system_role or messages[0].role is not Role.SYSTEM:
            return checked
        leading = next((i for i, message in enumerate(messages) if message.role is not Role.SYSTEM), len(messages))
        if leading == len(messages) or messages[leading].role is not Role.USER:
            raise DomainError(
                Reason.TEMPLATE_ERROR,
                "messages: the chat template of this model has no system role, so a system message is put in front of "
                "the first user message, and no user message follows it",
            )
        merged = "\n\n".join(message.content for message in messages[: leading + 1])
        return [_dictionary("", Message(Role.USER, merged)), *checked[leading + 1 :]]

    def _apply(
        self,
        messages: Sequence[dict[str, Any]],
        tools: Sequence[dict[str, Any]] = (),
        *,
        add_generation_prompt: bool,
    ) -> str:
        if self._template is None:
            raise DomainError(Reason.TEMPLATE_ERROR, "this model has no chat template: send token_ids")
        try:
            return self._template(messages, tools=tools, add_generation_prompt=add_generation_prompt)
        except TemplateFailure as failure:
            raise DomainError(Reason.TEMPLATE_ERROR, f"the chat template refuses the messages: {failure}") from failure

    def _shows_system(self) -> bool:
        """Some templates raise on a system message, others leave it out without a word."""
        return self._shows([_SYSTEM_PROBE], [Message(Role.SYSTEM, _SYSTEM_PROBE), _OPENING])

    def _shows_tools(self) -> bool:
        """What has no place in a template is left out without a word."""
        return self._shows([_TOOL.name, _STAND_IN, _RESULT.content], [_OPENING, _CALL, _RESULT], [_TOOL])

    def _shows(self, words: Sequence[str], messages: Sequence[Message], tools: Sequence[Tool] = ()) -> bool:
        probe = [_dictionary("", message) for message in messages]
        try:
            text = self._apply(probe, [_function("", tool) for tool in tools], add_generation_prompt=True)
        except DomainError:
            return False
        return all(word in text for word in words)

    def _keeps_history(self) -> bool:
        """Whether every conversation's text begins with what was shown and sampled before its last message.

        Also finds the text that closes an assistant's turn.
        """
        opening, following = _dictionary("", _OPENING), _dictionary("", Message(Role.USER, "Go on"))
        try:
            shown = self._apply([opening], add_generation_prompt=True)
            for answer in (_ANSWER, _THOUGHT):
                turns = [opening, _dictionary("", answer)]
                finished = self._apply(turns, add_generation_prompt=False)
                continued = self._apply([*turns, following], add_generation_prompt=True)
                sampled = shown + answer.content
                if not finished.startswith(sampled) or not continued.startswith(sampled):
                    return False
                self._closing = finished.removeprefix(sampled)
        except DomainError:  # a template for single turns: no conversation can be continued
            return False
        return True


def _is_of_tools(message: Message) -> bool:
    return message.role is Role.TOOL or bool(message.tool_calls)


def _dictionary(field: str, message: Message) -> dict[str, Any]:
    """`field` is what a caller calls the message."""
    if message.tool_calls and message.role is not Role.ASSISTANT:
        raise invalid_field(f"{field}.tool_calls", "none: only the assistant calls tools")
    if message.name and message.role is not Role.TOOL:
        raise invalid_field(f"{field}.name", "none: only a tool's answer has a name")
    shown: dict[str, Any] = {"role": message.role.value, "content": message.content}
    if message.name:
        shown["name"] = message.name
    if message.tool_calls:
        shown["tool_calls"] = [
            _call(f"{field}.tool_calls[{index}]", call) for index, call in enumerate(message.tool_calls)
        ]
    return shown


def _call(field: str, call: ToolCall) -> dict[str, Any]:
    arguments = _object(f"{field}.arguments", call.arguments)
    return {"type": "function", "function": {"name": call.name, "arguments": arguments}}


def _function(field: str, tool: Tool) -> dict[str, Any]:
    parameters = _object(f"{field}.parameters", tool.parameters)
    function = {"name": tool.name, "description": tool.description, "parameters": parameters}
    return {"type": "function", "function": function}


def _object(field: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise invalid_field(field, f"a JSON object ({error})") from error
    if not isinstance(value, dict):
        raise invalid_field(field, "a JSON object")
    return value


def _rewrites_history() -> DomainError:
    return DomainError(
        Reason.TEMPLATE_REWRITES_HISTORY,
        "the chat template of this model changes earlier turns: send all messages instead of a continuation",
    )
