"""Messages and tools in the form that chat templates read: that of OpenAI's chat completions.

https://huggingface.co/docs/transformers/chat_extras. Templates differ in how they take a call's arguments: as an object
or as its JSON text.
"""

from __future__ import annotations

import json
from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Any

from mulligan.common.errors import invalid_field
from mulligan.common.inference import Message, Role, Tool, ToolCall


class OpenCalls:
    """Calls of tools that have no answer yet. As quick with many of them as with few."""

    def __init__(self) -> None:
        self._open: set[str] = set()
        self._all: deque[str] = deque()
        self._named: defaultdict[str, deque[str]] = defaultdict(deque)

    def add(self, name: str, identifier: str) -> None:
        self._open.add(identifier)
        self._all.append(identifier)
        self._named[name].append(identifier)

    def answer(self, name: str | None = None) -> str | None:
        """The id of the first open call, of this name if there is one, which is open no longer. None: there is none."""
        waiting = self._all if name is None else self._named.get(name)
        while waiting:
            identifier = waiting.popleft()
            if identifier in self._open:
                self._open.remove(identifier)
                return identifier
        return None


def dictionaries(field: str, messages: Sequence[Message], *, text_arguments: bool = False) -> list[dict[str, Any]]:
    """`field` is what a caller calls the list of messages. Raises DomainError INVALID_FIELD.

    Each call gets an id, and each answer of a tool the id of the call that it answers: the first of its name that has
    no answer yet, else the first. Ids are nine letters and digits, as Mistral's templates want them.
    """
    calls = 0
    open_calls = OpenCalls()
    shown = []
    for index, message in enumerate(messages):
        one = _dictionary(f"{field}[{index}]", message, text_arguments)
        for call in one.get("tool_calls", ()):
            call["id"] = _call_id(calls)
            open_calls.add(call["function"]["name"], call["id"])
            calls += 1
        if message.role is Role.TOOL:
            one["tool_call_id"] = open_calls.answer(message.name) or open_calls.answer() or _call_id(0)
        shown.append(one)
    return shown


def function(field: str, tool: Tool) -> dict[str, Any]:
    """Raises DomainError INVALID_FIELD."""
    parameters = _object(f"{field}.parameters", tool.parameters)
    described = {"name": tool.name, "description": tool.description, "parameters": parameters}
    return {"type": "function", "function": described}


def _dictionary(field: str, message: Message, text_arguments: bool) -> dict[str, Any]:
    if message.tool_calls and message.role is not Role.ASSISTANT:
        raise invalid_field(f"{field}.tool_calls", "none: only the assistant calls tools")
    if message.name and message.role is not Role.TOOL:
        raise invalid_field(f"{field}.name", "none: only a tool's answer has a name")
    shown: dict[str, Any] = {"role": message.role.value, "content": message.content}
    if message.name:
        shown["name"] = message.name
    if message.tool_calls:
        shown["tool_calls"] = [
            _call(f"{field}.tool_calls[{index}]", call, text_arguments) for index, call in enumerate(message.tool_calls)
        ]
    return shown


def _call(field: str, call: ToolCall, text_arguments: bool) -> dict[str, Any]:
    arguments = _object(f"{field}.arguments", call.arguments)
    given = call.arguments if text_arguments else arguments
    return {"type": "function", "function": {"name": call.name, "arguments": given}}


def _call_id(number: int) -> str:
    return f"call{number:05d}"


def _object(field: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise invalid_field(field, f"a JSON object ({error})") from error
    if not isinstance(value, dict):
        raise invalid_field(field, "a JSON object")
    return value
