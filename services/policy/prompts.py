"""Prompts as token ids, made so that no caller takes the memory or the event loop from the others.

A tokenizer needs some hundred bytes of memory for each token, and a chat template copies its messages several times. So
three things come before a long prompt is tokenised whole:

- A prompt of more characters than `most_characters` is refused before it is rendered.
- A long text is tokenised in pieces first (`check_tokens_of`), and no further than it can fit.
- What is rendered and tokenised beside the event loop is that of a few prompts at a time (`BESIDE`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from mulligan.common.inference import Continuation, Message, Prompt, Tool
from mulligan.common.work_threads import WorkThreads
from mulligan.policy import preflight
from mulligan.policy.backend import Backend
from mulligan.policy.text_length import MoreTokens, check_tokens_of, most_characters

# Longer prompts are rendered and encoded in a thread, so that other calls do not wait for them.
_LONG = 20_000
_PART = 64  # characters that a message, a call or a tool counts as, besides its texts: templates work on each
_LONGEST_TOKEN = 128  # bytes, where the vocabulary is not known: the spaces of code are the longest in most
_LEAST_TOKENIZED = 65_536  # tokens that Tokenize answers with any model
# More at a time would not be faster, and each takes memory.
BESIDE = WorkThreads(4, "policy-prompts")


async def generated_ids(backend: Backend, prompt: Prompt, tools: tuple[Tool, ...]) -> tuple[int, ...]:
    """The token ids that this service adds to those of the caller, of a prompt to sample from. Raises DomainError
    PROMPT_TOO_LONG, and as `Chat.render` and `Chat.extend` do."""
    if isinstance(prompt, list):
        return ()
    model = backend.model
    room = model.context_length - 1
    held = len(prompt.token_ids) if isinstance(prompt, Continuation) else 0
    check_size("prompt", backend, _size(prompt, tools), max(room - held, 1) if model.context_length else 0)
    try:
        return await _added_ids(backend, prompt, tools, model.context_length)
    except MoreTokens as error:
        raise preflight.too_long("prompt", held + error.count, model, room, at_least=True) from None


async def tokenized_ids(backend: Backend, prompt: Prompt | str, tools: tuple[Tool, ...]) -> tuple[int, ...]:
    """What Tokenize answers. Raises DomainError PROMPT_TOO_LONG, and as `Chat.render` and `Chat.extend` do."""
    model = backend.model
    field = preflight.field_of(prompt)
    most = max(model.context_length, _LEAST_TOKENIZED)
    size = len(prompt) if isinstance(prompt, str) else _size(prompt, tools)
    check_size(field, backend, size, most, tokenize=True)
    try:
        if isinstance(prompt, str):
            work = partial(_encoded, backend, prompt, most)
            ids = await BESIDE.run(work) if size > _LONG else work()
        else:
            held = len(prompt.token_ids) if isinstance(prompt, Continuation) else 0
            ids = await _added_ids(backend, prompt, tools, held + most)
    except MoreTokens as error:
        raise preflight.too_long(field, error.count, model, most, at_least=True, tokenize=True) from None
    if len(ids) > most:
        raise preflight.too_long(field, len(ids), model, most, tokenize=True)
    return ids


def check_size(field: str, backend: Backend, size: int, most: int, *, tokenize: bool = False) -> None:
    """Raises DomainError PROMPT_TOO_LONG for a prompt of so many characters that it cannot have `most` tokens or less.
    0: it may have any number."""
    longest = backend.chat.longest_token if backend.chat is not None else _LONGEST_TOKEN
    beyond = size - most_characters(most, longest)
    if most and beyond > 0:
        count = most + beyond // most_characters(1, longest, slack=0) + 1
        raise preflight.too_long(field, count, backend.model, most, at_least=True, tokenize=tokenize)


def size_of(messages: Sequence[Message], tools: Sequence[Tool]) -> int:
    """The characters of all that a template may show."""
    size = _PART * (len(messages) + len(tools))
    for message in messages:
        size += len(message.content) + len(message.name) + _PART * len(message.tool_calls)
        size += sum(len(call.name) + len(call.arguments) for call in message.tool_calls)
    return size + sum(len(tool.name) + len(tool.description) + len(tool.parameters) for tool in tools)


def _size(prompt: Prompt, tools: tuple[Tool, ...]) -> int:
    messages = prompt.messages if isinstance(prompt, Continuation) else prompt
    return 0 if isinstance(messages, list) else size_of(messages, tools)


async def _added_ids(backend: Backend, prompt: Prompt, tools: tuple[Tool, ...], longest: int) -> tuple[int, ...]:
    """`longest` is that of the tokens of the caller and those that are added."""
    chat = backend.chat
    assert chat is not None
    assert not isinstance(prompt, list)
    work = (
        partial(chat.extend, prompt, longest)
        if isinstance(prompt, Continuation)
        else partial(chat.render, prompt, tools, longest)
    )
    return await BESIDE.run(work) if _size(prompt, tools) > _LONG else work()


def _encoded(backend: Backend, text: str, most: int) -> tuple[int, ...]:
    check_tokens_of(backend.encode, text, most)
    return tuple(backend.encode(text))
