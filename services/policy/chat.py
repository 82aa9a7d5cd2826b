"""Conversations as token ids. The chat template renders a conversation once; later turns are only appended.

Rendering it again after each turn would decode the sampled tokens and encode the text anew. The tokens that are trained
on would then differ from those that were sampled. So the next prompt is the old tokens plus those of `extend`: what the
template puts between a sampled turn and the next. To find that, the template renders a probe, which is a short
conversation of known text, followed by the new messages, and the probe's text is cut off. What was sampled is never
looked at. Two probes must give the same result, so that no text of a probe reaches a prompt.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product, takewhile
from typing import Any, Protocol

from mulligan.common.errors import DomainError, Reason
from mulligan.common.inference import Continuation, Feature, Message, Role, Tool, ToolCall
from mulligan.common.sized_cache import SizedCache
from mulligan.common.thoughts import begun_thought
from mulligan.policy.chat_messages import dictionaries, function
from mulligan.policy.literals import ControlTokens, Literals

_TOOL = Tool("toolprobe", "Does it", '{"type": "object", "properties": {}}')
_SYSTEM_PROBE = "systemprobe"
_RESULT = Message(Role.TOOL, "resultprobe", name="standin")


@dataclass(frozen=True, slots=True)
class Probe:
    """Stands for the conversation so far: a question and its answer, or a call of a tool."""

    question: Message
    answer: Message
    call: Message


def _probe(question: str, answer: str) -> Probe:
    call = ToolCall(answer, f'{{"{answer}": "argument"}}')
    return Probe(Message(Role.USER, question), Message(Role.ASSISTANT, answer), Message(Role.ASSISTANT, "", (call,)))


_PROBES = (_probe("Hi", "standin"), _probe("Go", "onward"))  # the answers end in different letters
_THOUGHT = Message(Role.ASSISTANT, "<think>\nstandin thought\n</think>\n\nstandin")
_FOLLOWING = Message(Role.USER, "Go on")
_CACHE_BYTES = 2**26  # of a model's prompts: some thousands of ordinary ones
_ENTRY_BYTES = 256  # of an entry, or a message, besides its texts


class TemplateFailure(Exception):
    """The chat template refused a conversation; the message is the template's."""


class NoTurnEnd(Exception):
    """The chat template closes an assistant's turn with no token; the message says with what."""


class Template(Protocol):
    def __call__(
        self, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]], add_generation_prompt: bool
    ) -> str:
        """The conversation as text, special tokens included. Raises TemplateFailure.

        Messages and tools have the form of OpenAI's chat completions:
        https://huggingface.co/docs/transformers/chat_extras
        """


class Encoder(Protocol):
    controls: ControlTokens
    longest_token: int  # in bytes

    def encode(self, text: str, /) -> list[int]:
        """Token ids; control tokens are recognised and none is added."""


class Chat:
    """A model's chat template: `render` gives the token ids of a first prompt, `extend` those of a further turn. Both
    hide what looks like a control token in a message (`Literals`), apply the template, and encode its text.

    `rewrites_history`: the template shows earlier turns otherwise than they were sampled (Qwen3 drops old thoughts), so
    continuations are refused. `begun_thought`: the mark of a thought that the template opens for the model (`<think>`
    in DeepSeek R1's), or "". `has_tools`: it shows tools, calls of tools and their results.

    A template without a system role (Gemma 2) gets leading system messages merged into the first user message, after an
    empty line each, as the templates of later Gemmas do themselves.
    """

    def __init__(self, template: Template | None, encoder: Encoder, end_of_turn_token_ids: Collection[int]):
        self._template = template
        self._encoder = encoder
        self._end_of_turn = frozenset(end_of_turn_token_ids)
        self._text_arguments = False
        self._call_content = ""  # of the call that stands in for one that was sampled
        self._tools_failure = ""
        self.has_system_role = template is not None and self._shows_system()
        self.has_tools = template is not None and self._shows_tools()
        self._closing = ""
        self._known: dict[tuple[Probe, bool], str] = {}  # what the template shows of a probe, without and with tools
        self.begun_thought = self._begun_thought() if template is not None else ""
        self.rewrites_history = template is not None and not self._keeps_history()
        self._cache: SizedCache[array[int]] = SizedCache(_CACHE_BYTES)

    @property
    def longest_token(self) -> int:
        """Bytes of the longest token of the vocabulary."""
        return self._encoder.longest_token

    def render(self, messages: Sequence[Message], tools: Sequence[Tool] = (), longest: int = 0) -> tuple[int, ...]:
        """A conversation with a header for the assistant's turn. What has more than `longest` tokens will be refused,
        and is not cached; 0: anything may be. Raises MoreTokens where it is much longer, also if one text of it is.

        Raises DomainError TEMPLATE_ERROR, EMPTY_PROMPT, UNSUPPORTED_OPTION, INVALID_FIELD.
        """
        given = tuple(messages), tuple(tools)
        return self._cached((*given, None), longest, lambda: self._render_uncached(*given, longest))

    def extend(self, continuation: Continuation, longest: int = 0) -> tuple[int, ...]:
        """The ids to append to `continuation.token_ids`. `longest` is that of all of them together, as in `render`, and
        MoreTokens counts those to append.

        Raises DomainError TEMPLATE_REWRITES_HISTORY, TEMPLATE_ERROR, EMPTY_PROMPT, UNSUPPORTED_OPTION, INVALID_FIELD.
        """
        if self.rewrites_history:
            raise _rewrites_history()
        if not continuation.token_ids:
            raise DomainError(Reason.EMPTY_PROMPT, "continuation.token_ids: a continuation continues something")
        messages = continuation.messages
        closed = continuation.turn_closed
        room = max(longest - len(continuation.token_ids), 1) if longest else 0
        return self._cached((messages, (), closed), room, lambda: self._extend_uncached(messages, closed, room))

    def _cached(
        self,
        key: tuple[tuple[Message, ...], tuple[Tool, ...], bool | None],
        longest: int,
        make: Callable[[], tuple[int, ...]],
    ) -> tuple[int, ...]:
        kept = self._cache.get(key)
        if kept is not None:
            return tuple(kept)
        ids = make()
        if not longest or len(ids) <= longest:
            packed = array("i", ids)
            self._cache.put(key, packed, _bytes_of(key[0], key[1]) + sys.getsizeof(packed))
        return ids

    def _render_uncached(self, messages: tuple[Message, ...], tools: tuple[Tool, ...], longest: int) -> tuple[int, ...]:
        if not messages:
            raise DomainError(Reason.EMPTY_PROMPT, "messages: at least one is needed")
        if tools:
            self._need_tools("tools")
        checked = self._merged(messages, self._checked("messages", messages))
        shown = [function(f"tools[{index}]", tool) for index, tool in enumerate(tools)]
        literals = Literals(self._encoder.encode, self._encoder.controls, longest)
        literals.hide(checked, shown)
        return tuple(literals.encode(self._apply(checked, shown, add_generation_prompt=True)))

    def _extend_uncached(self, messages: tuple[Message, ...], turn_closed: bool, longest: int) -> tuple[int, ...]:
        if not messages:
            raise DomainError(Reason.EMPTY_PROMPT, "continuation.messages: at least one is needed")
        checked = self._checked("continuation.messages", messages)
        literals = Literals(self._encoder.encode, self._encoder.controls, longest)
        literals.hide(checked, [])
        appended, other = (self._after(probe, messages, checked) for probe in _PROBES)
        if appended != other:
            raise _rewrites_history()
        ids = literals.encode(appended)
        if not turn_closed:
            return tuple(ids)
        # The model closed its turn itself: its closing token takes the place of the template's.
        closing = self._encoder.encode(self._closing)
        for index, token in enumerate(ids[: len(closing)]):
            if token in self._end_of_turn:
                return tuple(ids[index + 1 :])
        return tuple(ids)

    def _after(self, probe: Probe, messages: Sequence[Message], checked: list[dict[str, Any]]) -> str:
        """What the template puts after an assistant's turn, its closing included, when these messages follow."""
        # Some templates show answers of tools only where there are tools, and some models have two templates.
        tools = [function("", _TOOL)] if any(map(_is_of_tools, messages)) else []
        if messages[0].role is not Role.TOOL:
            before = self._dictionaries(probe.question, probe.answer)
            text = self._apply([*before, *checked], tools, add_generation_prompt=True)
            known = self._known.get((probe, bool(tools)), "")
            if not known or not text.startswith(known):  # a template may show the date
                known = self._apply(before[:1], tools, add_generation_prompt=True) + probe.answer.content
                self._known[probe, bool(tools)] = known
            return _cut(text, known)
        # What tools answer follows a call, and some templates insist on it.
        before = self._dictionaries(probe.question, replace(probe.call, content=self._call_content))
        opened = self._apply(before[:1], tools, add_generation_prompt=True)
        called = self._apply(before, tools, add_generation_prompt=False)
        _cut(called, opened)
        if not called.endswith(self._closing):
            raise _rewrites_history()
        return self._closing + _cut(self._apply([*before, *checked], tools, add_generation_prompt=True), called)

    def _checked(self, field: str, messages: Sequence[Message]) -> list[dict[str, Any]]:
        if any(map(_is_of_tools, messages)):
            self._need_tools(field)
        return dictionaries(field, messages, text_arguments=self._text_arguments)

    def _dictionaries(self, *messages: Message) -> list[dict[str, Any]]:
        return dictionaries("", messages, text_arguments=self._text_arguments)

    def _need_tools(self, field: str) -> None:
        if self._template is not None and not self.has_tools:
            said = f"refuses a call of a tool: {self._tools_failure}" if self._tools_failure else "shows no tools"
            raise DomainError(
                Reason.UNSUPPORTED_OPTION,
                f"{field}: the chat template of this model {said}",
                field=field,
                feature=Feature.TOOLS.value,
            )

    def _merged(self, messages: Sequence[Message], checked: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """With system messages in a place where the template shows them."""
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
        return [*self._dictionaries(Message(Role.USER, merged)), *checked[leading + 1 :]]

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
        """Some templates raise on a system message, others drop it silently."""
        try:
            probe = self._dictionaries(Message(Role.SYSTEM, _SYSTEM_PROBE), _PROBES[0].question)
            return _SYSTEM_PROBE in self._apply(probe, add_generation_prompt=True)
        except DomainError:
            return False

    def _shows_tools(self) -> bool:
        """Whether a tool, a call and its result appear in the text: templates silently drop what they do not know. Also
        finds the form in which the template takes the arguments of a call."""
        probe = _PROBES[0]
        is_silent = False
        for self._text_arguments, self._call_content in product((False, True), ("", "I call it.")):
            call = replace(probe.call, content=self._call_content)
            try:
                text = self._apply(
                    self._dictionaries(probe.question, call, _RESULT),
                    [function("", _TOOL)],
                    add_generation_prompt=True,
                )
            except DomainError as failure:
                self._tools_failure = self._tools_failure or failure.message
                continue
            if all(word in text for word in (_TOOL.name, probe.answer.content, _RESULT.content)):
                return True
            is_silent = True
        if is_silent:
            self._tools_failure = ""
        return False

    def _begun_thought(self) -> str:
        try:
            return begun_thought(self._apply(self._dictionaries(_PROBES[0].question), add_generation_prompt=True))
        except DomainError:
            return ""

    def _keeps_history(self) -> bool:
        """Whether the text of a conversation begins with all that was shown and sampled before its last message. Also
        finds the text that closes an assistant's turn."""
        question = _PROBES[0].question
        try:
            shown = self._apply(self._dictionaries(question), add_generation_prompt=True)
            for answer in (_PROBES[0].answer, _THOUGHT):
                turns = self._dictionaries(question, answer, _FOLLOWING)
                finished = self._apply(turns[:2], add_generation_prompt=False)
                continued = self._apply(turns, add_generation_prompt=True)
                sampled = shown + answer.content
                if not finished.startswith(sampled) or not continued.startswith(sampled):
                    return False
                self._closing = finished.removeprefix(sampled)
        except DomainError:  # a template for single turns: no conversation can be continued
            return False
        return True


def _bytes_of(messages: Sequence[Message], tools: Sequence[Tool]) -> int:
    """About the memory that these take."""
    texts = [text for tool in tools for text in (tool.name, tool.description, tool.parameters)]
    for message in messages:
        texts += [message.content, message.name]
        texts += [text for call in message.tool_calls for text in (call.name, call.arguments)]
    return sum(map(sys.getsizeof, texts)) + _ENTRY_BYTES * (1 + len(messages))


def turn_end(template: Template, encoder: Encoder, end_of_turn_token_ids: Collection[int]) -> int | None:
    """The token with which the template closes an assistant's turn, when it is none of these; else None.

    A turn that has no closing of its own ends where the header of the next begins (GLM 4). Raises NoTurnEnd when
    neither holds a control token: then nothing that a model samples says that its turn is over.
    """
    try:
        turns = [dictionaries("", (probe.question, probe.answer, _FOLLOWING)) for probe in _PROBES]
        closing = _common_end([template(turn[:2], tools=[], add_generation_prompt=False) for turn in turns])
        following = _common_end([template(turn, tools=[], add_generation_prompt=True) for turn in turns])
    except TemplateFailure:
        return None  # a template for single turns
    ids = encoder.encode(closing or following)
    if not closing:
        ids = ids[:1]
    if any(token in end_of_turn_token_ids for token in ids):
        return None
    for token in ids:
        if token in encoder.controls:
            return token
    raise NoTurnEnd(f"the chat template closes an assistant's turn with {closing!r}, and not with a control token")


def _common_end(texts: Sequence[str]) -> str:
    backwards = zip(*(reversed(text) for text in texts), strict=False)
    same = takewhile(lambda characters: len(set(characters)) == 1, backwards)
    return "".join(characters[0] for characters in same)[::-1]


def _cut(text: str, known: str) -> str:
    """What follows `known`, with which the text must begin."""
    if not text.startswith(known):
        raise _rewrites_history()
    return text[len(known) :]


def _is_of_tools(message: Message) -> bool:
    return message.role is Role.TOOL or bool(message.tool_calls)


def _rewrites_history() -> DomainError:
    return DomainError(
        Reason.TEMPLATE_REWRITES_HISTORY,
        "the chat template of this model changes earlier turns: send all messages instead of a continuation",
    )
