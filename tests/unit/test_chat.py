"""Conversations as tokens, on chat templates of the published kinds."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from services.common.errors import DomainError, Reason
from services.common.inference import Continuation, Message, Role, Tool, ToolCall
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
]
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
    return tokenizer


TOKENIZER = byte_tokenizer()


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False).ids


def chat(source: str | dict[str, str], end_of_turn: str) -> Chat:
    inner = PreTrainedTokenizerFast(tokenizer_object=TOKENIZER)
    inner.chat_template = source
    return Wrapped(inner).chat(encode(end_of_turn))


CHATS = {name: chat(source, END_OF_TURN[name]) for name, source in (TEMPLATES | WITH_TOOLS).items()}
TOOLS = (Tool("weather", 'Of a "city"', '{"type": "object", "properties": {"city": {"type": "string"}}}'),)
# Templates trim what surrounds a message, and a mark of a special token is one, wherever it stands.
contents = st.text(min_size=1, max_size=30).map(str.strip).filter(lambda text: text and "<" not in text)


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
        Chat(None, encode, []).render(list(user))


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
