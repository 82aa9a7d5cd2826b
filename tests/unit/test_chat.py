"""Conversations as tokens, on chat templates of the published kinds."""

from __future__ import annotations

from collections.abc import Sequence

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from services.common.errors import DomainError, Reason
from services.common.types import Continuation, Message, Role
from services.policy.chat import Chat, TemplateFailure

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
END_OF_TURN = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "qwen3": "<|im_end|>"}
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


def chat(source: str, end_of_turn: str) -> Chat:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment.globals["raise_exception"] = raise_exception
    compiled = environment.from_string(source)

    def template(messages: Sequence[dict[str, str]], *, add_generation_prompt: bool) -> str:
        try:
            return compiled.render(messages=list(messages), add_generation_prompt=add_generation_prompt)
        except jinja2.TemplateError as error:
            raise TemplateFailure(str(error)) from error

    return Chat(template, encode, encode(end_of_turn))


CHATS = {name: chat(source, END_OF_TURN[name]) for name, source in TEMPLATES.items()}
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
