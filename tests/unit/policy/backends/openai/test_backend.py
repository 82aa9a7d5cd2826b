"""The openai backend against an endpoint that answers as told: what the protocol allows and a real engine does not do
on demand. Against a real engine it stands in the contract suite."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mulligan.common.errors import DomainError, Reason
from mulligan.common.inference import (
    Feature,
    Message,
    Role,
    SamplingParams,
    StopReason,
    Tool,
    ToolCall,
    VersionSpan,
    WeightsKind,
)
from mulligan.policy.backend import Ask, Sampled, WeightsFile
from tests.support.endpoint import (
    KEY,
    QUESTION,
    Reply,
    answer,
    asks,
    backend,
    chats,
    delta,
    drained,
    refusal,
    scripted,
    usage,
)


async def test_all_of_an_ask_reaches_the_endpoint_under_its_standard_name() -> None:
    go = Tool("go", "Goes.", '{"type": "object", "properties": {"x": {"type": "integer"}}}')
    calls = (ToolCall("go", '{"x": 1}'), ToolCall("look", "{}"), ToolCall("go", '{"x": 2}'))
    messages = (
        Message(Role.SYSTEM, "play"),
        Message(Role.ASSISTANT, "so", calls),
        Message(Role.TOOL, "went", name="go"),
        Message(Role.TOOL, "went again", name="go"),
        Message(Role.TOOL, "seen"),
    )
    schema = '{"type": "string"}'
    sampling = SamplingParams(temperature=0.0, top_p=0.5, max_tokens=9, seed=2**40, stop=("a", "b"), json_schema=schema)
    async with scripted(chats(answer())) as endpoint, backend(endpoint, openai={"extra_body": {"top_k": -1}}) as opened:
        await opened.generate(Ask((), sampling, messages, (go,), session_id="s", request_id="r"))
    assert endpoint.asked[-1].headers["authorization"] == f"Bearer {KEY}"
    [body] = endpoint.chats
    ids = ["call00000", "call00001", "call00002"]
    assert body == {
        "model": "m",
        "messages": [
            {"role": "system", "content": "play"},
            {
                "role": "assistant",
                "content": "so",
                "tool_calls": [
                    {"id": identifier, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                    for identifier, call in zip(ids, calls, strict=True)
                ],
            },
            {"role": "tool", "content": "went", "tool_call_id": ids[0]},
            {"role": "tool", "content": "went again", "tool_call_id": ids[2]},
            {"role": "tool", "content": "seen", "tool_call_id": ids[1]},
        ],
        "temperature": 0.0,
        "top_p": 0.5,
        "max_tokens": 9,
        "seed": 2**40,
        "stop": ["a", "b"],
        "tools": [
            {
                "type": "function",
                "function": {"name": "go", "description": "Goes.", "parameters": json.loads(go.parameters)},
            }
        ],
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": {"type": "string"}, "strict": True},
        },
        "top_k": -1,
    }


async def test_what_is_not_asked_for_is_not_sent_and_an_adapter_is_another_model() -> None:
    async with scripted(chats(answer())) as endpoint, backend(endpoint, adapters={"fast": "m:lora"}) as opened:
        await opened.generate(Ask((), SamplingParams(), QUESTION, adapter="fast"))
        assert opened.model.adapters == ("fast",)
    [body] = endpoint.chats
    assert set(body) == {"model", "messages", "temperature", "top_p", "max_tokens"} and body["model"] == "m:lora"


def told(message: Message) -> Ask:
    return Ask((), SamplingParams(), (message,))


@pytest.mark.parametrize(
    ("ask", "reason", "field"),
    [
        (asks(json_schema="{"), Reason.INVALID_FIELD, "sampling.json_schema"),
        (asks(json_schema="[]"), Reason.INVALID_FIELD, "sampling.json_schema"),
        (Ask((), SamplingParams(), QUESTION, (Tool("t", "", "1"),)), Reason.INVALID_FIELD, "tools[0].parameters"),
        (told(Message(Role.TOOL, "x", name="go")), Reason.TEMPLATE_ERROR, None),
        (told(Message(Role.USER, "x", name="go")), Reason.INVALID_FIELD, "messages[0].name"),
        (told(Message(Role.USER, "x", (ToolCall("go", "{}"),))), Reason.INVALID_FIELD, "messages[0].tool_calls"),
        (
            told(Message(Role.ASSISTANT, "x", (ToolCall("go", "[]"),))),
            Reason.INVALID_FIELD,
            "messages[0].tool_calls[0].arguments",
        ),
    ],
)
async def test_what_cannot_be_expressed_is_refused_before_the_endpoint_sees_it(
    ask: Ask, reason: Reason, field: str | None
) -> None:
    async with scripted(chats(answer())) as endpoint, backend(endpoint) as opened:
        for call in (opened.generate(ask), drained(opened, ask)):
            with pytest.raises(DomainError) as caught:
                await call
            assert caught.value.reason is reason and caught.value.metadata.get("field") == field
    assert endpoint.chats == []


@pytest.mark.parametrize(
    ("ask", "field"),
    [
        (Ask((), SamplingParams(), QUESTION, (Tool("t", "", "{}"),)), "tools"),
        (told(Message(Role.TOOL, "x")), "messages"),
        (told(Message(Role.ASSISTANT, "x", (ToolCall("go", "{}"),))), "messages"),
    ],
)
async def test_tools_are_refused_of_an_endpoint_that_knows_none(ask: Ask, field: str) -> None:
    async with scripted(chats(answer())) as endpoint, backend(endpoint, openai={"without": ("tools",)}) as opened:
        with pytest.raises(DomainError) as caught:
            await opened.generate(ask)
    assert caught.value.reason is Reason.UNSUPPORTED_OPTION and endpoint.chats == []
    assert caught.value.metadata == {"field": field, "feature": "tools"}


CALLS = [
    {"id": "1", "type": "function", "function": {"name": "go", "arguments": '{"x": 1}'}},
    {"id": "2", "type": "function", "function": {"name": 'l"k', "arguments": ""}},
]
RENDERED = (
    '<tool_call>\n{"name": "go", "arguments": {"x": 1}}\n</tool_call>\n'
    '<tool_call>\n{"name": "l\\"k", "arguments": {}}\n</tool_call>'
)


@pytest.mark.parametrize(("said", "text"), [("Well.", f"Well.\n{RENDERED}"), (None, RENDERED)])
async def test_tool_calls_stand_in_the_text(said: str | None, text: str) -> None:
    pieces = [
        {"index": 0, "id": "1", "type": "function", "function": {"name": "go", "arguments": '{"x"'}},
        {"index": 0, "function": {"arguments": ": 1}"}},
        {"index": 1, "id": "2", "type": "function", "function": {"name": 'l"k', "arguments": ""}},
    ]
    events = [delta(content=said), *(delta(tool_calls=[piece]) for piece in pieces), delta("tool_calls"), "[DONE]"]
    whole = answer(said, "tool_calls", message={"tool_calls": CALLS})
    async with scripted(chats(whole, Reply(events=events))) as endpoint, backend(endpoint) as opened:
        once = await opened.generate(asks())
        assert (once.text, once.stop_reason) == (text, StopReason.END_OF_TURN)
        parts = await drained(opened, asks())
        assert "".join(part.text for part in parts) == text
        assert [part.stop_reason for part in parts][-1] is StopReason.END_OF_TURN


END = StopReason.END_OF_TURN
STRING = StopReason.STOP_STRING
ENDINGS: dict[str, tuple[tuple[str, str, int], dict[str, Any], tuple[str, StopReason]]] = {
    "the turn is over": (("one", "stop", 3), {}, ("one", END)),
    "vllm: a stop string": (("one ", "stop", 3), {"stop_reason": "two"}, ("one two", STRING)),
    "vllm: a token": (("one", "stop", 3), {"stop_reason": 7}, ("one", END)),
    "sglang: a stop string": (("one ", "stop", 3), {"matched_stop": "two"}, ("one two", STRING)),
    "sglang: not cut off": (("one two", "stop", 3), {"matched_stop": "two"}, ("one two", STRING)),
    "sglang: the template's": (("one", "stop", 3), {"matched_stop": "<|im_end|>"}, ("one", END)),
    "tgi": (("one two", "stop_sequence", 3), {}, ("one two", STRING)),
    "tgi: end": (("one", "eos_token", 3), {}, ("one", END)),
    "one that does not tell": (("one ", "stop", 3), {}, ("one ", END)),
    "enough": (("one", "length", 8), {"stop_reason": None}, ("one", StopReason.MAX_TOKENS)),
    "the context is full": (("one", "length", 7), {}, ("one", StopReason.CONTEXT_FULL)),
}


@pytest.mark.parametrize("name", list(ENDINGS))
async def test_why_it_stopped(name: str) -> None:
    (content, finish, tokens), extra, (text, reason) = ENDINGS[name]
    middle = len(content) // 2
    events: list[Any] = [
        delta(role="assistant", content=""),
        delta(content=content[:middle]),
        delta(content=content[middle:]),
    ]
    events += [delta(finish, last=extra), usage(tokens), "[DONE]"]
    replies = chats(answer(content, finish, tokens, **extra), Reply(events=events))
    async with scripted(replies) as endpoint, backend(endpoint) as opened:
        ask = asks(max_tokens=8, stop=("two", "three"))
        once = await opened.generate(ask)
        assert once == Sampled((), (), reason, (VersionSpan(4, 0),), text)
        *parts, last = await drained(opened, ask)
        assert all(part.stop_reason is None for part in parts) and last.stop_reason is reason
        assert last.policy_versions == (VersionSpan(4, 0),)
        assert "".join(part.text for part in [*parts, last]) == text


async def test_a_prompt_that_fits_without_max_tokens_fills_the_context() -> None:
    """Endpoints refuse prompt + max_tokens beyond the context; the contract lets a completion end there."""
    full = refusal(400, "This model's maximum context length is 10 tokens.")
    async with scripted(chats(full, answer(finish="length"))) as endpoint, backend(endpoint) as opened:
        assert (await opened.generate(asks(max_tokens=99))).stop_reason is StopReason.CONTEXT_FULL
        assert [body.get("max_tokens") for body in endpoint.chats] == [99, None]
    async with scripted(chats(full)) as endpoint, backend(endpoint) as opened:
        with pytest.raises(DomainError) as caught:
            await opened.generate(asks())
    assert caught.value.reason is Reason.PROMPT_TOO_LONG and caught.value.metadata["context_length"] == "4096"


async def test_a_model_that_calls_the_limit_otherwise_is_asked_otherwise_from_then_on() -> None:
    renamed = refusal(400, "Use 'max_completion_tokens' instead.", param="max_tokens", code="unsupported_parameter")
    async with scripted(chats(renamed, answer())) as endpoint, backend(endpoint) as opened:
        await opened.generate(asks(max_tokens=5))
        await opened.generate(asks(max_tokens=6))
    limits = [(body.get("max_tokens"), body.get("max_completion_tokens")) for body in endpoint.chats]
    assert limits == [(5, None), (None, 5), (None, 6)]


async def test_it_says_what_it_cannot_do() -> None:
    async with scripted(chats(answer())) as endpoint, backend(endpoint, openai={"without": ("seed",)}) as opened:
        info = opened.model
        assert info.features == {Feature.STREAM, Feature.TOOLS, Feature.JSON_SCHEMA}
        assert (info.fingerprint, info.vocabulary_size, info.context_length, info.dtype) == ("", 0, 4096, "")
        assert opened.chat is None and info.rewrites_history and opened.policy_version == 4
        weights = WeightsFile(Path("w"), WeightsKind.FULL, 5, "0" * 64)

        async def passes(*_: object) -> None:
            return None

        for call in (opened.score([[1]], 1.0), opened.update_weights(weights, passes), opened.release_memory()):
            with pytest.raises(DomainError) as caught:
                await call
            assert caught.value.reason is Reason.UNSUPPORTED_OPTION
        assert await opened.replicas[0].checksum() == ""
        await opened.update_weights(WeightsFile(None, WeightsKind.ORIGINAL, 9, ""), passes)
        assert (await opened.generate(asks())).policy_versions == (VersionSpan(9, 0),)
        for refused in (lambda: opened.encode("x"), lambda: opened.decode([1])):
            with pytest.raises(DomainError, match="token_ids"):
                refused()
