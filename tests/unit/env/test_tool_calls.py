from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from mulligan.env.tool_calls import MAX_CALLS, Call, describe, find_calls, printable, read_arguments
from tests.support.effort import HOSTILE_CHARACTERS, LINEAR_TIME

NAMES = ("search",)


class Search(BaseModel):
    """Finds things."""

    query: str = Field(description="What to find", min_length=1)
    top_k: int = Field(5, ge=1)


@pytest.mark.parametrize(
    "answer",
    [
        '<tool_call>\n{"name": "search", "arguments": {"query": "a \\"b\\"", "top_k": 2}}\n</tool_call>',
        'Look it up:\n<tool_call>{"name": "search", "arguments": {"query": "a \\"b\\"", "top_k": 2}}</tool_call>',
        '<think>or {"name": "x"}?</think><tool_call>{"name":"search","arguments":{"query":"a \\"b\\"","top_k":2}}',
        '<tool_call>{"name": "search", "arguments": "{\\"query\\": \\"a \\\\\\"b\\\\\\"\\", \\"top_k\\": 2}"}',
        '<|python_tag|>{"name": "search", "parameters": {"query": "a \\"b\\"", "top_k": 2}}',
        '{"name": "search", "parameters": {"query": "a \\"b\\"", "top_k": 2}}',
        '```json\n{"name": "search", "arguments": {"query": "a \\"b\\"", "top_k": 2}}\n```',
        '```\n[{"name": "search", "arguments": {"query": "a \\"b\\"", "top_k": 2}}]\n```',
        '[TOOL_CALLS] [{"name": "search", "arguments": {"query": "a \\"b\\"", "top_k": 2}}]',
        '[TOOL_CALLS]search[ARGS]{"query": "a \\"b\\"", "top_k": 2}',
        "<function_calls>search(query='a \"b\"', top_k=2)</function_calls>",
        "[search(query='a \"b\"', top_k=2)]",
    ],
)
def test_a_call_is_found_in_the_format_of_every_template(answer: str) -> None:
    assert find_calls(answer, NAMES) == [Call("search", {"query": 'a "b"', "top_k": 2})]


def test_calls_are_found_in_order_and_no_more_than_a_turn_may_have() -> None:
    block = '<tool_call>{"name": "search", "arguments": {"query": "%d"}}</tool_call>'
    calls = find_calls("".join(block % number for number in range(MAX_CALLS + 5)), NAMES)
    assert [call.arguments["query"] for call in calls] == [str(number) for number in range(MAX_CALLS)]
    olmo = '<function_calls>search(query="a")\nsearch(query="b")</function_calls>'
    assert [call.arguments for call in find_calls(olmo, NAMES)] == [{"query": "a"}, {"query": "b"}]
    mistral = '[TOOL_CALLS]search[ARGS]{"query": "a"}[TOOL_CALLS]other[ARGS]{}'
    assert [call.name for call in find_calls(mistral, NAMES)] == ["search", "other"]
    names = "<function_calls>search(query='a', deep=[null, {'x': true}], no=false)</function_calls>"
    assert find_calls(names, NAMES)[0].arguments == {"query": "a", "deep": [None, {"x": True}], "no": False}
    llama = '[search(query="a"), other(query="b")]'
    assert [call.name for call in find_calls(llama, NAMES)] == ["search"]


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "The answer is \\boxed{Paris}.",
        '{"name": "Ada", "born": 1815}',
        '{"answer": "Paris"}',
        "[1, 2, 3]",
        "[Paris](https://example.org)",
        "search(query='a')",
        "<think><tool_call>{}</tool_call></think>Paris",
        "```python\nprint(1)\n```",
    ],
)
def test_an_answer_without_a_call_has_none(answer: str) -> None:
    assert find_calls(answer, NAMES) == []


@pytest.mark.parametrize(
    ("block", "problem"),
    [
        ("", "empty"),
        ('{"name": "search"', "not valid JSON"),
        ('{"query": "a"}', '"name" and "arguments"'),
        ('{"name": 3, "arguments": {}}', '"name" and "arguments"'),
        ('{"name": "search", "arguments": 3}', '"arguments" is not a JSON object'),
        ('{"name": "search", "arguments": "nonsense"}', '"arguments" is not a JSON object'),
        ("[{}, 3]", '"name" and "arguments"'),
        ("search for it", "neither JSON nor"),
        ("search('a')", "by name"),
        ("search(**{'query': 'a'})", "by name"),
        ("search(query=open('x'))", "literal"),
        ("os.remove(path='x')", "neither JSON nor"),
        ("x" * 10_000, "longer than 8192"),
        ("[" * 8_000, "neither JSON nor"),
        ('{"name":' * 1_000, "not valid JSON"),
    ],
)
def test_what_cannot_be_read_is_said_in_words(block: str, problem: str) -> None:
    first = find_calls(f"<tool_call>{block}</tool_call>", NAMES)[0]
    assert problem in first.problem


@LINEAR_TIME
@pytest.mark.parametrize(
    "part", ["<tool_call>", "<tool_call>{", "<function_calls>f(", "[TOOL_CALLS]f[ARGS]{", "</think>", "```", "{[", "\\"]
)
def test_time_is_linear_in_the_length_of_hostile_text(part: str) -> None:
    find_calls(part * (HOSTILE_CHARACTERS // len(part)), NAMES)


hostile = st.text(alphabet='<tool_call>/{}[]"\\:,() search=\ud800\0\n', max_size=80) | st.text(max_size=80)


@given(
    hostile,
    st.sampled_from(
        ["{}", "<tool_call>{}</tool_call>", "<function_calls>{}", "[TOOL_CALLS]{}", "[TOOL_CALLS]f[ARGS]{}"]
    ),
)
def test_any_text_is_read(text: str, frame: str) -> None:
    for call in find_calls(frame.replace("{}", text), NAMES):
        call.describe(200).encode()
        assert "\n" not in call.describe(200)


def test_a_tool_is_described_by_the_model_that_checks_its_arguments() -> None:
    tool = describe("search", Search)
    assert (tool.name, tool.description) == ("search", "Finds things.")
    assert json.loads(tool.parameters) == {
        "type": "object",
        "properties": {
            "query": {"type": "string", "description": "What to find", "minLength": 1},
            "top_k": {"type": "integer", "default": 5, "minimum": 1},
        },
        "required": ["query"],
    }
    assert read_arguments(Search, {"query": "a", "top_k": None, "more": 1}) == Search(query="a", top_k=5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "query: Field required"),
        ({"query": ""}, "query: String should have at least 1 character"),
        ({"query": 3}, "query: Input should be a valid string"),
        ({"query": "\ud800"}, "query: Input should be a valid string"),
        ({"query": "a", "top_k": 0}, "top_k: Input should be greater than or equal to 1"),
        ({"query": "a", "top_k": float("nan")}, "top_k: Input should be a finite number"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_arguments(Search, arguments)


def test_a_call_is_described_in_one_line() -> None:
    call = Call("search", {"query": "two\nlines \ud800", "top_k": 3, "deep": [[1]], "huge": 16**9000, "no": None})
    described = 'search(query="two lines \N{REPLACEMENT CHARACTER}", top_k=3, deep=…, huge=…, no=None)'
    assert call.describe(200) == described
    assert call.describe(10) == "search(que…"
    assert printable("a\x07b", 10) == "a\N{REPLACEMENT CHARACTER}b"
