"""Conversations as tokens, on chat templates of the published kinds."""

from __future__ import annotations

import gc
import json
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mulligan.common.errors import DomainError, Reason
from mulligan.common.inference import Continuation, Message, Role, Tool, ToolCall
from mulligan.common.model_files import UnsupportedModel
from mulligan.env.tool_calls import find_calls
from mulligan.policy.chat import Chat
from tests.support.chat_templates import (
    CHATML,
    CHATS,
    END_OF_TURN,
    GLM4,
    KEEPING,
    LLAMA3,
    MISTRAL,
    MISTRAL_TOOLS,
    QWEN2,
    TEMPLATES,
    TEXT_ARGUMENTS,
    TOKENIZER,
    TOOLS,
    WITH_TOOLS,
    chat,
    encode,
    wrapped,
)
from tests.support.effort import examples

# Templates trim what surrounds a message.
contents = st.text(min_size=1, max_size=30).map(str.strip).filter(bool)


@pytest.mark.parametrize("name", KEEPING)
@settings(max_examples=examples(60))
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
        answer = data.draw(contents)
        observation = Message(Role.USER, data.draw(contents))
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
    system = Message(Role.SYSTEM, "Be brief.")
    user = Message(Role.USER, "Hello")
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
    calls: tuple[Callable[[], object], ...] = (
        lambda: chatml.render([]),
        lambda: chatml.extend(Continuation((), True, user)),
        lambda: chatml.extend(Continuation((1,), True, ())),
    )
    for call in calls:
        with pytest.raises(DomainError) as caught:
            call()
        assert caught.value.reason is Reason.EMPTY_PROMPT
    with pytest.raises(DomainError, match="no chat template"):
        Chat(None, wrapped(CHATML), []).render(list(user))


@pytest.mark.parametrize("name", list(WITH_TOOLS))
@settings(max_examples=examples(60))
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
    subject = CHATS[name]
    user = Message(Role.USER, "x")
    assert not subject.has_tools
    calls: list[Callable[[], object]] = [lambda: subject.render([user], TOOLS)]
    calls.append(lambda: subject.render([user, Message(Role.TOOL, "y")]))
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


def test_marks_that_are_special_tokens_reach_the_reader() -> None:
    tokenizer = wrapped(MISTRAL_TOOLS)
    ids = encode('[TOOL_CALLS]local_search[ARGS]{"query": "Ulm"}</s>')
    text = tokenizer.decode(ids)
    assert find_calls(text, ["local_search"]) == []
    marked = tokenizer.decode_marked(ids, text, encode("</s>"))
    assert marked == '[TOOL_CALLS]local_search[ARGS]{"query": "Ulm"}'
    assert [call.name for call in find_calls(marked, ["local_search"])] == ["local_search"]
    plain = encode("Up</s>")
    assert tokenizer.decode_marked(plain, tokenizer.decode(plain), encode("</s>")) == "Up"


@pytest.mark.parametrize(
    ("begun", "mark"), [("<think>\n", "<think>"), ("[THINK]", "[THINK]"), ("<think>\n\n</think>\n\n", ""), ("", "")]
)
def test_a_thought_that_the_template_begins_is_known(begun: str, mark: str) -> None:
    template = CHATML.replace("assistant\n' }}{% endif", f"assistant\n{begun}' }}}}{{% endif")
    assert chat(template, "<|im_end|>").begun_thought == mark


def large(place: int, size: int = 20_000) -> list[Message]:
    return [Message(Role.USER, f"{place} " + "x " * (size // 2))]


def test_the_memory_of_prompts_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """By their bytes, whatever their number: a caller may send prompts of megabytes."""
    most = 2**19
    monkeypatch.setattr("mulligan.policy.chat._CACHE_BYTES", most)
    subject = chat(CHATML, "<|im_end|>")
    tracemalloc.start()
    try:
        for place in range(60):
            subject.render(large(place))
            subject.extend(Continuation((1,), False, tuple(large(place))))
        gc.collect()
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most / 2 < subject._cache.bytes <= most
    assert kept < 1.5 * most


def test_a_prompt_that_will_be_refused_is_not_cached() -> None:
    subject = chat(CHATML, "<|im_end|>")
    ids = subject.render(large(0), longest=100)
    added = subject.extend(Continuation((1,) * 90, False, (Message(Role.USER, "a b c d e f g h i j"),)), longest=100)
    assert len(ids) > 100 and len(added) + 90 > 100 and subject._cache.bytes == 0
    assert subject.render(large(0), longest=len(ids)) == ids
    assert subject._cache.bytes > 0


def test_a_prompt_is_rendered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = chat(QWEN2, "<|im_end|>")
    user = [Message(Role.USER, "hello")]
    first = subject.render(user, TOOLS), subject.extend(Continuation((1,), True, tuple(user)))
    assert subject.render(user) != first[0]

    def none(*arguments: Any, **options: Any) -> str:
        raise AssertionError("rendered again")

    monkeypatch.setattr(subject, "_template", none)
    assert (subject.render(user, TOOLS), subject.extend(Continuation((2, 3), True, tuple(user)))) == first
    with pytest.raises(AssertionError):
        subject.extend(Continuation((1,), False, tuple(user)))
