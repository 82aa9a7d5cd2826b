"""Conversations as tokens, on chat templates of the published kinds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from services.common.errors import DomainError, Reason
from services.common.inference import Continuation, Message, Role, Tool, ToolCall
from services.policy.backend import UnsupportedModel
from services.policy.backends.tokenizer import Tokenizer as Wrapped
from services.policy.chat import Chat

SPECIAL = [
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<bos>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[TOOL_CALLS]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "<|user|>",
    "<|observation|>",
]
MARKS = ["<think>", "</think>", "<tool_call>", "<｜User｜>"]  # added, and not flagged as special
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ '<|begin_of_text|>' }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n\n' }}"
    "{{ system + '<|eot_id|>' }}"
    "{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ '<bos>' }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
QWEN3 = (  # drops the thoughts of all turns but those after the last question
    "{% set last = namespace(index=0) %}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{% set last.index = loop.index0 %}{% endif %}{% endfor %}"
    "{% for message in messages %}{% set content = message['content'] %}{% if message['role'] == 'assistant' %}"
    "{% set thought = '' %}{% if '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > last.index and (loop.last or thought) %}"
    "{% set content = '<think>\n' + thought + '\n</think>\n\n' + content %}{% endif %}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = (  # leaves system messages out without a word; closes turns with a space before the token
    "{{ '<s>' }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] +"
    " ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + '</s>' }}{% endif %}"
    "{% endfor %}"
)
# What follows knows tools. Qwen 2.5: declared in the system turn, answered within a user's turn, many answers in one.
QWEN2 = (
    "{% if tools %}{{ '<|im_start|>system\n# Tools\n<tools>' }}{% for tool in tools %}{{ '\n' + (tool | tojson) }}"
    "{% endfor %}{{ '\n</tools><|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{% if message.role == 'tool' %}"
    "{% if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\n<tool_response>\n' + message.content + '\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% elif message.role == 'assistant' and message.tool_calls %}{{ '<|im_start|>assistant' }}"
    "{% if message.content %}{{ '\n' + message.content }}{% endif %}{% for call in message.tool_calls %}"
    '{{ \'\n<tool_call>\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{{ call.function.arguments | tojson }}"
    "{{ '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Llama 3.1: declared in the first user's turn, one call at a time, answered by a role of its own, quoted as JSON.
LLAMA31 = (
    "{{ '<|begin_of_text|>' }}{% for message in messages %}"
    "{% if message.role == 'user' and loop.first and tools %}{{ '<|start_header_id|>user<|end_header_id|>\n\n' }}"
    "{% for tool in tools %}{{ (tool | tojson(indent=4)) + '\n\n' }}{% endfor %}"
    "{{ (message.content | trim) + '<|eot_id|>' }}"
    "{% elif 'tool_calls' in message %}{% if message.tool_calls | length != 1 %}"
    "{{ raise_exception('This model only supports single tool-calls at once!') }}{% endif %}"
    "{% set call = message.tool_calls[0].function %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{{ '{\"name\": \"' + call.name + '\", \"parameters\": ' }}{{ (call.arguments | tojson) + '}<|eot_id|>' }}"
    "{% elif message.role == 'tool' %}{{ '<|start_header_id|>ipython<|end_header_id|>\n\n' }}"
    "{{ (message.content | tojson) + '<|eot_id|>' }}"
    "{% else %}{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' }}"
    "{{ (message.content | trim) + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# Hermes: a template of its own for tools, in which an answer must follow a call.
HERMES = {
    "default": CHATML,
    "tool_use": (
        "{{ '<|im_start|>system\nYou may call' }}{% for tool in tools %}{{ ' ' + (tool.function | tojson) }}"
        "{% endfor %}"
        "{{ '<|im_end|>\n' }}{% for message in messages %}{% if message.role == 'tool' %}"
        "{% set before = messages[loop.index0 - 1] %}{% if before.role != 'tool' %}{% if not before.tool_calls %}"
        "{{ raise_exception('a tool answers a call') }}{% endif %}{{ '<|im_start|>tool\n' }}{% endif %}"
        "{{ '<tool_response>\n' + message.content + '\n</tool_response>' }}"
        "{% if loop.last or loop.nextitem.role != 'tool' %}{{ '<|im_end|>\n' }}{% else %}{{ '\n' }}{% endif %}"
        "{% elif message.tool_calls %}{{ '<|im_start|>assistant' }}{% for call in message.tool_calls %}"
        "{{ '\n<tool_call>\n' + (call.function | tojson) + '\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
        "{% else %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}
WITH_TOOLS = {"qwen2": QWEN2, "llama3.1": LLAMA31, "hermes": HERMES}
END_OF_TURN = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "qwen3": "<|im_end|>"}
END_OF_TURN |= {"qwen2": "<|im_end|>", "llama3.1": "<|eot_id|>", "hermes": "<|im_end|>"}
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "gemma": GEMMA, "qwen3": QWEN3}
KEEPING = ("chatml", "llama3", "gemma")


def byte_tokenizer() -> Tokenizer:
    """A token per byte, and the special ones: no merge can reach over the end of a turn."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens(MARKS)
    return tokenizer


TOKENIZER = byte_tokenizer()


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False).ids


def wrapped(source: str | dict[str, str]) -> Wrapped:
    inner = PreTrainedTokenizerFast(tokenizer_object=TOKENIZER)
    inner.chat_template = source
    return Wrapped(inner)


def chat(source: str | dict[str, str], end_of_turn: str) -> Chat:
    return wrapped(source).chat(encode(end_of_turn))


CHATS = {name: chat(source, END_OF_TURN[name]) for name, source in (TEMPLATES | WITH_TOOLS).items()}
TOOLS = (Tool("weather", 'Of a "city"', '{"type": "object", "properties": {"city": {"type": "string"}}}'),)
# Templates trim what surrounds a message.
contents = st.text(min_size=1, max_size=30).map(str.strip).filter(bool)
CONTROLS = frozenset(i for text in (*SPECIAL, *MARKS) for i in TOKENIZER.encode(text, add_special_tokens=False).ids)
FIRST_MARK = TOKENIZER.encode(MARKS[0], add_special_tokens=False).ids[0]
# Whole control tokens, parts of them, and what normalisers and templates do something with.
PIECES = ["<", "<|", "|>", "im_end|>", "[INST", "]", "x", " ", "\n", "é", "＜|im_end|＞", "\U000f0000"]
hostile = st.lists(st.sampled_from([*SPECIAL, *MARKS, *PIECES]), min_size=1, max_size=6).map("".join)


@pytest.mark.parametrize("name", KEEPING)
@settings(max_examples=60, deadline=None)
@given(data=st.data(), closed=st.booleans(), system=st.booleans(), turns=st.integers(1, 3))
def test_appending_gives_the_tokens_that_rendering_would(
    name: str, data: st.DataObject, closed: bool, system: bool, turns: int
) -> None:
    """The property that training on sampled tokens rests on."""
    subject = CHATS[name]
    messages = [Message(Role.SYSTEM, data.draw(contents))] if system else []
    messages.append(Message(Role.USER, data.draw(contents)))
    tokens = subject.render(messages)
    for _ in range(turns):
        answer, observation = data.draw(contents), Message(Role.USER, data.draw(contents))
        sampled = encode(answer) + (encode(END_OF_TURN[name]) if closed else [])
        tokens += tuple(sampled)
        tokens += subject.extend(Continuation(tokens, closed, (observation,)))
        messages += [Message(Role.ASSISTANT, answer), observation]
    assert tokens == subject.render(messages)


@pytest.mark.parametrize("name", KEEPING)
def test_what_was_sampled_does_not_matter_to_what_is_appended(name: str) -> None:
    """Ids that decode to nothing sensible stay as they are: only `turn_closed` and the new messages count."""
    observation = (Message(Role.USER, "left"),)
    ids = (200, 129, 255)
    appended = CHATS[name].extend(Continuation(ids, True, observation))
    assert appended == CHATS[name].extend(Continuation((1,), True, observation))
    open_turn = CHATS[name].extend(Continuation(ids, False, observation))
    assert open_turn == (*encode(END_OF_TURN[name]), *appended)


@pytest.mark.parametrize(
    ("name", "rewrites"), [("chatml", False), ("llama3", False), ("gemma", False), ("qwen3", True)]
)
def test_templates_that_rewrite_earlier_turns_are_found(name: str, rewrites: bool) -> None:
    assert CHATS[name].rewrites_history is rewrites


def test_a_continuation_is_refused_when_the_template_rewrites() -> None:
    with pytest.raises(DomainError) as caught:
        CHATS["qwen3"].extend(Continuation((1,), True, (Message(Role.USER, "x"),)))
    assert caught.value.reason is Reason.TEMPLATE_REWRITES_HISTORY


def test_without_thoughts_the_chatml_template_of_qwen_keeps_history() -> None:
    """A generation prompt that history does not show counts as rewriting, too."""
    forced = CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>\n\n</think>\n\n' }}{% endif")
    assert chat(forced, "<|im_end|>").rewrites_history
    assert not chat(CHATML, "<|im_end|>").rewrites_history


def test_a_system_message_is_merged_where_the_template_has_no_such_role() -> None:
    system, user = Message(Role.SYSTEM, "Be brief."), Message(Role.USER, "Hello")
    gemma = CHATS["gemma"]
    assert not gemma.has_system_role and CHATS["llama3"].has_system_role
    assert gemma.render([system, user]) == gemma.render([Message(Role.USER, "Be brief.\n\nHello")])
    two = [system, Message(Role.SYSTEM, "Be kind."), user, Message(Role.ASSISTANT, "Hi"), user]
    merged = [Message(Role.USER, "Be brief.\n\nBe kind.\n\nHello"), *two[3:]]
    assert gemma.render(two) == gemma.render(merged)


def test_a_template_that_leaves_system_messages_out_gets_them_merged_too() -> None:
    mistral = chat(MISTRAL, "</s>")
    ids = mistral.render([Message(Role.SYSTEM, "Be brief."), Message(Role.USER, "Hello")])
    assert (
        TOKENIZER.decode(list(ids), skip_special_tokens=False).replace(" ", "") == "<s>[INST]Bebrief.\n\nHello[/INST]"
    )


@pytest.mark.parametrize(
    ("name", "messages", "words"),
    [
        ("gemma", [Message(Role.SYSTEM, "x")], "no system role"),
        ("gemma", [Message(Role.SYSTEM, "x"), Message(Role.ASSISTANT, "y")], "no system role"),
        ("gemma", [Message(Role.USER, "x"), Message(Role.USER, "y")], "roles must alternate"),
    ],
)
def test_what_the_template_refuses_is_a_template_error(name: str, messages: list[Message], words: str) -> None:
    with pytest.raises(DomainError, match=words) as caught:
        CHATS[name].render(messages)
    assert caught.value.reason is Reason.TEMPLATE_ERROR


def test_nothing_is_an_empty_prompt_and_no_template_an_error() -> None:
    chatml = CHATS["chatml"]
    user = (Message(Role.USER, "x"),)
    for call in (
        lambda: chatml.render([]),
        lambda: chatml.extend(Continuation((), True, user)),
        lambda: chatml.extend(Continuation((1,), True, ())),
    ):
        with pytest.raises(DomainError) as caught:
            call()
        assert caught.value.reason is Reason.EMPTY_PROMPT
    with pytest.raises(DomainError, match="no chat template"):
        Chat(None, wrapped(CHATML), []).render(list(user))


@pytest.mark.parametrize("name", list(WITH_TOOLS))
@settings(max_examples=60, deadline=None)
@given(data=st.data(), closed=st.booleans(), turns=st.integers(1, 3))
def test_appending_what_tools_answer_gives_the_tokens_that_rendering_would(
    name: str, data: st.DataObject, closed: bool, turns: int
) -> None:
    """Calls and answers in turn, then a question."""
    subject = CHATS[name]
    messages = [Message(Role.USER, data.draw(contents))]
    tokens = subject.render(messages, TOOLS)
    for turn in range(turns):
        city = data.draw(contents)
        call = Message(Role.ASSISTANT, "", (ToolCall("weather", json.dumps({"city": city})),))
        answers = data.draw(st.lists(contents, min_size=1, max_size=3))
        following = [Message(Role.TOOL, answer, name="weather") for answer in answers]
        if data.draw(st.booleans()) and turn == turns - 1:
            following.append(Message(Role.USER, data.draw(contents)))
        sampled = sampled_call(subject, [*messages, call], END_OF_TURN[name])
        tokens += sampled if closed else sampled[: -len(encode(END_OF_TURN[name]))]
        tokens += subject.extend(Continuation(tokens, closed, tuple(following)))
        messages += [call, *following]
    assert tokens == subject.render(messages, TOOLS)


def sampled_call(subject: Chat, messages: list[Message], end: str) -> tuple[int, ...]:
    """What a model that follows its template samples as its last turn: the call, up to the end of the turn."""
    prompt = subject.render(messages[:-1], TOOLS)
    rest = subject.render(messages, TOOLS)[len(prompt) :]
    (closing,) = encode(end)
    return rest[: rest.index(closing) + 1]


@pytest.mark.parametrize("name", list(WITH_TOOLS))
def test_tools_calls_and_answers_are_shown_to_the_model(name: str) -> None:
    call = Message(Role.ASSISTANT, "", (ToolCall("weather", '{"city": "Ulm", "days": [1, 2.5]}'),))
    messages = [Message(Role.USER, "How is it?"), call, Message(Role.TOOL, "sunny", name="weather")]
    text = TOKENIZER.decode(list(CHATS[name].render(messages, TOOLS)), skip_special_tokens=False)
    shown = [part.strip() for part in ('"weather"', '{"city": "Ulm", "days": [1, 2.5]}', "sunny", 'Of a \\"city\\"')]
    assert CHATS[name].has_tools
    assert [part for part in shown if part not in text] == []


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_what_a_template_would_leave_out_is_refused(name: str) -> None:
    subject, user = CHATS[name], Message(Role.USER, "x")
    assert not subject.has_tools
    calls = [lambda: subject.render([user], TOOLS), lambda: subject.render([user, Message(Role.TOOL, "y")])]
    calls.append(lambda: subject.render([Message(Role.ASSISTANT, "", (ToolCall("weather", "{}"),)), user]))
    if not subject.rewrites_history:
        calls.append(lambda: subject.extend(Continuation((1,), True, (Message(Role.TOOL, "y"),))))
    for call in calls:
        with pytest.raises(DomainError) as caught:
            call()
        assert caught.value.reason is Reason.UNSUPPORTED_OPTION
        assert caught.value.metadata["feature"] == "tools"


@pytest.mark.parametrize(
    ("messages", "tools", "field"),
    [
        ((), (Tool("a", "", "{"),), "tools[0].parameters"),
        ((), (*TOOLS, Tool("a", "", "[]")), "tools[1].parameters"),
        ((Message(Role.ASSISTANT, "", (ToolCall("a", "{}"), ToolCall("a", "x"))),), (), "[1].tool_calls[1].arguments"),
        ((Message(Role.USER, "", (ToolCall("a", "{}"),)),), (), "[1].tool_calls"),
        ((Message(Role.USER, "", name="a"),), (), "[1].name"),
    ],
)
def test_a_field_that_is_wrong_is_named(messages: tuple[Message, ...], tools: tuple[Tool, ...], field: str) -> None:
    user = Message(Role.USER, "x")
    with pytest.raises(DomainError) as caught:
        CHATS["qwen2"].render([user, *messages], tools)
    assert caught.value.reason is Reason.INVALID_FIELD
    assert caught.value.metadata["field"] == (f"messages{field}" if messages else field)
    if messages:
        with pytest.raises(DomainError) as caught:
            CHATS["qwen2"].extend(Continuation((1,), True, (user, *messages)))
        assert caught.value.metadata["field"] == f"continuation.messages{field}"


def test_answers_of_tools_are_not_appended_where_that_would_change_what_was_said() -> None:
    """A template that sums up earlier calls, and keeps all else."""
    summing = QWEN2.replace(
        "{% elif message.role == 'assistant' and message.tool_calls %}",
        "{% elif message.tool_calls and not loop.last %}{{ '<|im_start|>assistant\nI called '"
        " + message.tool_calls[0].function.name + '<|im_end|>\n' }}{% elif message.tool_calls %}",
    )
    subject = chat(summing, "<|im_end|>")
    assert subject.has_tools and not subject.rewrites_history
    assert subject.extend(Continuation((1,), True, (Message(Role.USER, "y"),)))
    with pytest.raises(DomainError) as caught:
        subject.extend(Continuation((1,), True, (Message(Role.TOOL, "y"),)))
    assert caught.value.reason is Reason.TEMPLATE_REWRITES_HISTORY


def controls(ids: Sequence[int]) -> list[int]:
    return [token for token in ids if token in CONTROLS]


# Mistral: ids of nine letters and digits, either content or calls, tools before the last question.
MISTRAL_TOOLS = (
    "{% set last = namespace(index=0) %}{% for message in messages %}{% if message.role == 'user' %}"
    "{% set last.index = loop.index0 %}{% endif %}{% endfor %}"
    "{{ '<s>' }}{% for message in messages %}{% if message.role == 'user' %}"
    "{% if tools and loop.index0 == last.index %}"
    "{{ '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{{ '[INST]' + message.content + '[/INST]' }}{% elif message.tool_calls is defined %}"
    "{% if message.content %}{{ raise_exception('either content or calls') }}{% endif %}{{ '[TOOL_CALLS][' }}"
    "{% for call in message.tool_calls %}{% if call.id | length != 9 %}{{ raise_exception('ids have nine letters') }}"
    "{% endif %}{{ (call.function | tojson) + ', \"id\": \"' + call.id + '\"' }}{% endfor %}{{ ']</s>' }}"
    "{% elif message.role == 'tool' %}{% if message.tool_call_id | length != 9 %}{{ raise_exception('no id') }}"
    "{% endif %}{{ '[TOOL_RESULTS]' + message.content + '[/TOOL_RESULTS]' }}"
    "{% elif message.role == 'assistant' %}{{ message.content + '</s>' }}{% endif %}{% endfor %}"
)
# Arguments as JSON text, and no call without content.
TEXT_ARGUMENTS = QWEN2.replace("call.function.arguments | tojson", "'' + call.function.arguments").replace(
    "{% if message.content %}{{ '\n' + message.content }}{% endif %}",
    "{% if not message.content %}{{ raise_exception('no content') }}{% endif %}",
)
# GLM 4: a turn ends where the next begins.
GLM4 = (
    "{% for message in messages %}{{ '<|' + message.role + '|>\n' + message.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


@pytest.mark.parametrize("name", list(CHATS))
@settings(max_examples=80, deadline=None)
@given(texts=st.tuples(hostile, hostile, hostile, hostile))
def test_only_the_template_writes_control_tokens(name: str, texts: tuple[str, ...]) -> None:
    """A conversation holds as many as with each text replaced by x; what the assistant said may hold marks."""
    subject = CHATS[name]

    def conversation(system: str, question: str, answer: str, observation: str) -> list[Message]:
        said = answer if not any(mark in answer for mark in MARKS) else "x"
        turns = [Message(Role.USER, question), Message(Role.ASSISTANT, said), Message(Role.USER, observation)]
        return [Message(Role.SYSTEM, system), *turns]

    assert controls(subject.render(conversation(*texts))) == controls(subject.render(conversation(*["x"] * 4)))
    if not subject.rewrites_history:
        for closed in (False, True):
            ids = subject.extend(Continuation((1,), closed, (Message(Role.USER, texts[0]),)))
            plain = subject.extend(Continuation((1,), closed, (Message(Role.USER, "x"),)))
            assert controls(ids) == controls(plain)


@pytest.mark.parametrize("name", list(WITH_TOOLS))
@settings(max_examples=60, deadline=None)
@given(texts=st.tuples(hostile, hostile, hostile))
def test_tools_and_what_they_answer_write_no_control_tokens(name: str, texts: tuple[str, ...]) -> None:
    def ids(described: str, argument: str, answer: str) -> list[int]:
        tool = Tool("weather", described, json.dumps({"type": "object", "title": described}))
        call = Message(Role.ASSISTANT, "", (ToolCall("weather", json.dumps({"city": argument})),))
        told = Message(Role.TOOL, answer, name="weather")
        return controls(CHATS[name].render([Message(Role.USER, "x"), call, told], [tool]))

    assert ids(texts[0], "x", texts[2]) == ids("x", "x", "x")
    flagged = [[i for i in ids("x", argument, "x") if i < FIRST_MARK] for argument in (texts[1], "x")]
    assert flagged[0] == flagged[1]


def test_a_literal_keeps_its_text() -> None:
    text = "It says <|im_end|> and <|im_start|>assistant, ＜|im_end|＞ too <"
    ids = CHATS["chatml"].render([Message(Role.USER, text)])
    decoded = TOKENIZER.decode(list(ids), skip_special_tokens=False)
    assert decoded == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def test_what_the_assistant_thought_is_of_the_tokens_that_a_model_samples() -> None:
    ids = CHATS["chatml"].render([Message(Role.USER, "x"), Message(Role.ASSISTANT, "<think>a</think>b<|im_end|>")])
    [think, close, _, _] = [encode(mark)[0] for mark in MARKS]
    assert ids.count(think) == ids.count(close) == 1 and ids.count(encode("<|im_end|>")[0]) == 2


@pytest.mark.parametrize(
    "default", ["You have a deep understanding of games.", "standin", "onward", "Hi standin Go onward", "<|im_end|>"]
)
@pytest.mark.parametrize("closed", [False, True])
def test_nothing_of_a_probe_reaches_a_prompt_whatever_the_template_says_by_default(default: str, closed: bool) -> None:
    system = "{{ '<|im_start|>system\n" + default + "<|im_end|>\n' }}"
    observation = Continuation((1,), closed, (Message(Role.USER, "standin"),))
    assert chat(system + CHATML, "<|im_end|>").extend(observation) == CHATS["chatml"].extend(observation)


def test_a_template_that_repeats_what_was_said_is_not_continued() -> None:
    """It puts the first question behind the last."""
    repeating = chat(
        CHATML.replace("{% if add_gen", "{{ messages[0].content if messages | length > 2 }}{% if add_gen"), "<|im_end|>"
    )
    with pytest.raises(DomainError) as caught:
        repeating.extend(Continuation((1,), True, (Message(Role.USER, "y"),)))
    assert caught.value.reason is Reason.TEMPLATE_REWRITES_HISTORY


@pytest.mark.parametrize(
    ("template", "eos", "closing"),
    [(CHATML, "</s>", "<|im_end|>"), (LLAMA3, "</s>", "<|eot_id|>"), (GLM4, "</s>", "<|user|>")]
    + [(source, END_OF_TURN[name], None) for name, source in (TEMPLATES | WITH_TOOLS).items()],
)
def test_the_token_that_closes_a_turn_ends_one(template: Any, eos: str, closing: str | None) -> None:
    tokenizer = wrapped(template)
    tokenizer.inner.eos_token = eos
    expected = {*encode(eos), *(encode(closing) if closing else [])}
    assert set(tokenizer.end_of_turn()) == expected


@pytest.mark.parametrize("closing", ["\n", ". Over.\n"])
def test_a_template_that_closes_turns_with_text_is_refused_in_words(closing: str) -> None:
    spoken = "{% for message in messages %}{{ message.role + ': ' + message.content + '" + closing + "' }}{% endfor %}"
    tokenizer = wrapped(spoken)
    tokenizer.inner.eos_token = "</s>"
    with pytest.raises(UnsupportedModel, match="not with a control token, so nothing tells when a reply is over"):
        tokenizer.end_of_turn()


@pytest.mark.parametrize(("template", "end"), [(MISTRAL_TOOLS, "</s>"), (TEXT_ARGUMENTS, "<|im_end|>")])
def test_tools_are_shown_in_the_form_that_a_template_takes(template: str, end: str) -> None:
    subject = chat(template, end)
    assert subject.has_tools
    said = "" if template == MISTRAL_TOOLS else "I look."
    call = Message(Role.ASSISTANT, said, (ToolCall("weather", '{"city": "Ulm"}'),))
    told = Message(Role.TOOL, "sunny", name="weather")
    rendered = subject.render([Message(Role.USER, "x"), call, told], TOOLS)
    text = TOKENIZER.decode(list(rendered), skip_special_tokens=False)
    assert "weather" in text and '"city": "Ulm"' in text.replace("\\", "") and "sunny" in text
    assert subject.extend(Continuation((1,), True, (told,)))


def test_a_template_that_refuses_calls_says_why() -> None:
    calls = "{% elif message.role == 'assistant' and message.tool_calls %}"
    refusing = QWEN2.replace(calls, calls + "{{ raise_exception('one at a time') }}")
    subject = chat(refusing, "<|im_end|>")
    assert not subject.has_tools
    with pytest.raises(DomainError, match=r"refuses a call of a tool: .*one at a time"):
        subject.render([Message(Role.USER, "x")], TOOLS)
