"""Removes thoughts from a model's answer. Text in a thought is never an answer, a move, a tool call or a reflection.

This module knows the usual marks of thoughts:

    <think>…</think>, and the same with thinking, thought, reasoning, reason, scratchpad, seed:think, antThinking
    <|think|>…<|/think|>    [THINK]…[/THINK]    ◁think▷…◁/think▷
    <|begin_of_thought|>…<|end_of_thought|>     <|START_THINKING|>…<|END_THINKING|>
    <|channel|>analysis<|message|>… until another channel, message or turn begins; <|channel>thought…<channel|>

Case does not matter. Thoughts may nest, and a thought that is not closed lasts to the end. A closing mark without an
opening one means that the chat template wrote the opening one: everything before it is a thought.
"""

from __future__ import annotations

import re

_NAME = r"(?:seed:|ant)?think(?:ing)?|thoughts?|reason(?:ing)?|scratchpad"
# A closing mark closes the innermost open mark of its kind: its name, or its group without `open_` and `close_`. No
# pattern spans lines: a removed thought leaves a line break, so the parts around it cannot form a new mark.
_MARK = re.compile(
    rf"""
      <\|?(?P<open_tag>{_NAME})\b(?:[ ][^<>|\n]{{0,100}})?\|?>
    | <\|?[ ]?/[ ]?(?P<close_tag>{_NAME})[ ]?\|?>
    | (?P<open_bracket>\[THINK(?:ING)?\]) | (?P<close_bracket>\[/THINK(?:ING)?\])
    | (?P<open_kimi>◁think▷) | (?P<close_kimi>◁/think▷)
    | (?P<open_of>\<\|(?:begin_of_thought|start_thinking)\|>) | (?P<close_of><\|(?:end_of_thought|end_thinking)\|>)
    | (?P<open_channel><\|channel\|?>[ ]?(?:analysis|thought|thinking)\b(?:[^<\n]{{0,100}}<\|message\|>)?)
    | (?P<final_channel><\|channel\|>[ ]?final\b[^<\n]{{0,100}}<\|message\|>)
    | (?P<close_channel><\|(?:end|return|call)\|>(?:<\|start\|>[a-z]*)?|<\|start\|>[a-z]*|<channel\|>|(?=<\|channel\|>))
    """,
    re.IGNORECASE | re.VERBOSE,
)

_FIRST = ("<", "[", "◁")  # every mark begins with one of these


def without_thoughts(answer: str) -> str:
    """Returns the text outside the thoughts, joined; an answer without thoughts is returned unchanged. Takes linear
    time. Idempotent."""
    if not any(first in answer for first in _FIRST):  # most moves
        return answer
    said: list[str] = []
    inside: list[str] = []  # kinds of the open thoughts, innermost last
    end = 0  # of the last mark
    found = False
    for mark in _MARK.finditer(answer):
        action, _, kind = str(mark.lastgroup).partition("_")
        if kind == "tag":
            kind = str(mark[str(mark.lastgroup)]).casefold()
        if action == "open":
            between = answer[end : mark.start()]
            if not inside:
                said.append(between)
            if not (inside and inside[-1] == kind and not between.strip()):  # else: opened twice
                inside.append(kind)
        elif kind in inside:
            while inside.pop() != kind:
                pass
        elif action == "final" or kind != "channel":
            said.clear()  # the template opened the thought, or another thought mentions the mark
        else:
            continue  # such as the end of a turn
        found = True
        end = mark.end()
    if not found:
        return answer
    if not inside:
        said.append(answer[end:])
    return "\n".join(part for part in map(str.strip, said) if part)


def begun_thought(prompt: str) -> str:
    """The opening mark with which a prompt ends, ignoring white space, or "": a thought that the chat template opens
    for the model."""
    text = prompt.rstrip()
    last = max(_MARK.finditer(text), key=lambda mark: mark.end(), default=None)
    is_open = last is not None and last.end() == len(text) and str(last.lastgroup).startswith("open_")
    return last[0] if last is not None and is_open else ""
