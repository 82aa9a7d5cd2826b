"""Converts an `Ask` to a request for OpenAI's chat completions, and the answer to a sample.

https://platform.openai.com/docs/api-reference/chat
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from openai.types import CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice

from mulligan.common.errors import DomainError, Reason, invalid_field
from mulligan.common.foreign import kept
from mulligan.common.inference import Message, Role, SamplingParams, StopReason, Tool, ToolCall
from mulligan.policy.backend import Ask
from mulligan.policy.chat_messages import OpenCalls


class NotAnAnswer(Exception):
    """The endpoint answered something that is no chat completion; the message says what."""


# What a request may have. An endpoint that refuses one may name it.
REQUEST_FIELDS = frozenset(
    {
        *("model", "messages", "temperature", "top_p", "max_tokens", "max_completion_tokens"),
        *("seed", "stop", "tools", "response_format", "stream", "stream_options"),
    }
)


def chat_request(model: str, ask: Ask) -> dict[str, Any]:
    """The JSON body. Raises DomainError for messages, tools and schemas that cannot be expressed."""
    sampling = ask.sampling
    # top_p is always sent: many endpoints put the model's own default in the place of an absent one.
    request: dict[str, Any] = {
        "model": model,
        "messages": _messages(ask.messages),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_tokens,
    }
    if sampling.seed is not None:
        request["seed"] = sampling.seed
    if sampling.stop:
        request["stop"] = list(sampling.stop)
    if ask.tools:
        request["tools"] = [_tool(index, tool) for index, tool in enumerate(ask.tools)]
    if sampling.json_schema is not None:
        schema = _object("sampling.json_schema", sampling.json_schema)
        # strict: an endpoint that cannot follow the schema refuses it, instead of answering something else.
        form = {"name": "answer", "schema": schema, "strict": True}
        request["response_format"] = {"type": "json_schema", "json_schema": form}
    return request


def _messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """OpenAI connects a tool's answer to its call by an id. Our messages have none: the n-th answer of a tool belongs
    to the n-th call of that tool."""
    shown: list[dict[str, Any]] = []
    open_calls = OpenCalls()
    made = 0
    for index, message in enumerate(messages):
        field = f"messages[{index}]"
        if message.tool_calls and message.role is not Role.ASSISTANT:
            raise invalid_field(f"{field}.tool_calls", "none: only the assistant calls tools")
        if message.name and message.role is not Role.TOOL:
            raise invalid_field(f"{field}.name", "none: only a tool's answer has a name")
        entry: dict[str, Any] = {"role": message.role.value, "content": message.content}
        if message.tool_calls:
            entry["tool_calls"] = []
        for position, call in enumerate(message.tool_calls):
            _object(f"{field}.tool_calls[{position}].arguments", call.arguments)
            identifier = f"call{made:05d}"  # nine letters and digits: Mistral's templates take no other
            made += 1
            open_calls.add(call.name, identifier)
            function = {"name": call.name, "arguments": call.arguments}
            entry["tool_calls"].append({"id": identifier, "type": "function", "function": function})
        if message.role is Role.TOOL:
            answered = open_calls.answer(message.name or None)
            if answered is None:
                what = f"no call of {message.name!r}" if message.name else "no call"
                raise DomainError(Reason.TEMPLATE_ERROR, f"{field}: there is {what} before it to answer")
            entry["tool_call_id"] = answered
        shown.append(entry)
    return shown


def needs_tools(ask: Ask) -> str:
    """Name of the field that needs an endpoint with tools; empty if none does."""
    if ask.tools:
        return "tools"
    return "messages" if any(one.tool_calls or one.role is Role.TOOL for one in ask.messages) else ""


def _tool(index: int, tool: Tool) -> dict[str, Any]:
    parameters = _object(f"tools[{index}].parameters", tool.parameters)
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


def render_tool_calls(calls: Sequence[ToolCall]) -> str:
    """Calls as the Hermes and Qwen templates write them, one after another:

    <tool_call>
    {"name": "go", "arguments": {"x": 1}}
    </tool_call>
    """
    return "\n".join(
        f'<tool_call>\n{{"name": {json.dumps(call.name)}, "arguments": {call.arguments or "{}"}}}\n</tool_call>'
        for call in calls
    )


def only_choice(answer: object) -> tuple[Choice, CompletionUsage | None]:
    # What is no JSON comes as a string, and what is no chat completion with fields missing: nothing is validated.
    if not isinstance(answer, ChatCompletion) or not answer.choices or answer.choices[0].message is None:
        raise NotAnAnswer("no chat completion")
    return answer.choices[0], answer.usage


def text_of(message: ChatCompletionMessage) -> str:
    """The text of the message, followed by its tool calls."""
    called = message.tool_calls or ()
    calls = [ToolCall(call.function.name, call.function.arguments) for call in called if call.type == "function"]
    said = message.content or message.refusal or ""
    if not isinstance(said, str):
        raise NotAnAnswer(f"a message whose content is a {type(said).__name__}, not text")
    return said + ("\n" if said and calls else "") + render_tool_calls(calls)


def ending(
    choice: Choice | ChunkChoice, text: str, asked: SamplingParams, tokens: int | None
) -> tuple[StopReason, str]:
    """The stop reason, and the stop string that is missing at the end of `text`.

    Our completions include the stop string that ended them; most endpoints cut it off. It is put back if the endpoint
    says which one it was, as vLLM (`stop_reason`) and SGLang (`matched_stop`) do. TGI does not cut it off. With other
    endpoints a stop string looks like the end of the turn. `tokens` is the length of the completion, if known.
    """
    reason = choice.finish_reason
    # A string from here on: engines have reasons of their own.
    match str(reason):
        case "length":
            full = isinstance(tokens, int) and 0 <= tokens < asked.max_tokens
            return (StopReason.CONTEXT_FULL if full else StopReason.MAX_TOKENS), ""
        case "content_filter":
            raise invalid_field("prompt", "one whose answer the endpoint's content filter lets pass")
        case "stop" | "tool_calls" | "function_call" | "eos_token" | "stop_sequence":
            extra = choice.model_extra or {}
            for matched in (extra.get("matched_stop"), extra.get("stop_reason")):
                if isinstance(matched, str) and matched in asked.stop:
                    return StopReason.STOP_STRING, "" if matched in text else matched
            if any(text.endswith(stop) for stop in asked.stop):
                return StopReason.STOP_STRING, ""
            return StopReason.END_OF_TURN, ""
    raise NotAnAnswer(f"a completion that ended for a reason of its own: {kept('the endpoint', repr(reason))}")


class StreamedAnswer:
    """Puts the pieces of a streamed chat completion together."""

    def __init__(self, asked: SamplingParams):
        self._asked = asked
        self._text = ""
        self._calls: dict[int, tuple[str, str]] = {}
        self._last: ChunkChoice | None = None
        self._tokens: int | None = None

    def take(self, chunk: object) -> str:
        """The new text of this chunk. Tool calls are returned by `finish`, when they are complete."""
        if not isinstance(chunk, ChatCompletionChunk):
            raise NotAnAnswer("no chat completion")
        if chunk.usage is not None:
            self._tokens = chunk.usage.completion_tokens
        if not chunk.choices:
            return ""
        [choice, *_] = chunk.choices
        for call in (choice.delta.tool_calls if choice.delta else None) or ():
            name, arguments = self._calls.get(call.index, ("", ""))
            if call.function is not None:
                name = name + (call.function.name or "")
                arguments = arguments + (call.function.arguments or "")
            self._calls[call.index] = (name, arguments)
        if choice.finish_reason is not None:
            self._last = choice
        text = (choice.delta.content or choice.delta.refusal or "") if choice.delta else ""
        self._text += text
        return text

    def finish(self) -> tuple[StopReason, str]:
        """The stop reason, and the rest of the text."""
        if self._last is None:
            raise NotAnAnswer("a stream that broke off")
        reason, missing = ending(self._last, self._text, self._asked, self._tokens)
        calls = render_tool_calls([ToolCall(*self._calls[index]) for index in sorted(self._calls)])
        return reason, missing + ("\n" if self._text and calls else "") + calls
