"""What stands in a thought is never an answer, whatever marks it and whether or not it is closed; in every reader."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st

from mulligan.common.thoughts import without_thoughts
from mulligan.env.answers import boxed, marked, read_answer
from mulligan.env.base import StepResult
from mulligan.env.calls import play
from mulligan.env.envs.gymnasium.actions import read
from mulligan.env.grid import parse_action
from mulligan.env.tool_calls import find_calls
from mulligan.trainer.texts import reflection_in
from tests.support.effort import HOSTILE_CHARACTERS, LINEAR_TIME
from tests.support.fakes import PROMPTS

HARMONY = "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>"
CLOSED = [  # {} is the thought
    "<think>{}</think>",
    "<think>\n{}\n</think>\n\n",
    "<THINK>{}</Think>",
    "<thinking>{}</thinking>",
    "<thought>{}</thought>",
    "<reasoning>{}</reasoning>",
    "<seed:think>{}</seed:think>",
    "<antThinking>{}</antThinking>",
    '<think step="1">{}</think >',
    "<|think|>{}<|/think|>",
    "[THINK]{}[/THINK]",
    "◁think▷{}◁/think▷",
    "<|begin_of_thought|>{}<|end_of_thought|>",
    "<|START_THINKING|>{}<|END_THINKING|>",
    "<|channel>thought\n{}<channel|>",
    HARMONY,
    "<think>{0}<think>{0}</think>{0}</think>",
    "<think>{0}<reasoning>{0}</reasoning>{0}</think>",
    "<think>{0}<reasoning>{0}</think>",
    "<think>{0}</think><think>{0}</think>",
    "<think><think>{}</think>",  # the template's, and the model's own
    "<thinking>{0}<think>{0}</thinking>",
    "{}</think>",  # the template began it
    "{}[/THINK]",
    "{0}</think>{0}</think>",
    "{}<|end|><|start|>assistant<|channel|>final<|message|>",
]
UNCLOSED = [
    "<think>{}",
    "<think>\n{}, or",
    "<Thinking>{}",
    "[THINK]{}",
    "◁think▷{}",
    "<seed:think>{}",
    "<|channel|>analysis<|message|>{}",
    "<think>{0}</think><think>{0}",
    "<think>{0}<think>{0}</think>{0}",
    "{0}</think><think>{0}",
    "<think>{0}[/THINK]{0}",
]
# What reads, an answer that it finds, and what it says where there is none.
READERS: dict[str, tuple[Callable[[str], object], str, object]] = {
    "grid": (parse_action, "```Up```", None),
    "box": (boxed, "\\boxed{Paris}", None),
    "hotpotqa": (marked, "\\boxed{Paris}", None),
    "number": (lambda text: read_answer(text, "7"), "so it is 8.", ""),
    "reasoning-gym": (read_answer, "<answer>8</answer>", ""),
    "tool calls": (lambda text: find_calls(text, ["f"]), '<tool_call>{"name": "f", "arguments": {}}</tool_call>', []),
    "reflection": (lambda text: reflection_in(text, PROMPTS), "<prompt>rule</prompt>", ""),
    "gymnasium text": (lambda text: read(spaces.Text(20, min_length=0), text, ()), "north", ""),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("thought", CLOSED)
def test_a_thought_is_not_read_and_what_follows_it_is(reader: str, thought: str) -> None:
    reads, answer, nothing = READERS[reader]
    found = reads(answer)
    assert found and found != nothing
    assert reads(thought.format("no") + answer) == found
    assert reads(thought.format(answer)) == nothing
    assert reads(thought.format("no") + answer + "\n<think>or") == found


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("thought", UNCLOSED)
def test_a_thought_that_is_not_closed_lasts_to_the_end(reader: str, thought: str) -> None:
    reads, answer, nothing = READERS[reader]
    assert reads(thought.format(answer)) == nothing


def test_gymnasium_reads_no_number_in_a_thought() -> None:
    for text in ("<think>```2```", "<think>2"):
        with pytest.raises(ValueError, match="expected"):
            read(spaces.Discrete(4), text, ())
    assert read(spaces.Discrete(4), "<think>```2```</think>```3```", ()) == 3


def test_what_is_around_a_thought_stays() -> None:
    assert without_thoughts("I go. <think>no</think> ```Up```") == "I go.\n```Up```"
    assert without_thoughts("one<think>x</think>two<think>y</think>three") == "one\ntwo\nthree"
    for text in (" x < y, think > 2 <b>\n", "I think so.", "[1, 2]", "a<|end|>", "<thinker>", "</|>", ""):
        assert without_thoughts(text) == text


def test_a_tool_call_in_another_channel_is_kept() -> None:
    call = '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>'
    assert without_thoughts(f"<|channel|>analysis<|message|>I call.<|end|><|start|>assistant{call}") == call


PIECES = [
    *("<think>", "</think>", "<THINKING>", "</thinking>", "[THINK]", "[/THINK]", "◁think▷", "◁/think▷", "<th", "ink>"),
    *("<|channel|>", "analysis", "final", "<|message|>", "<|end|>", "<|start|>", "<channel|>", "<", "/", " ", "\n"),
]
OPENINGS = ["<think>", "<THINKING>", "[THINK]", "◁think▷", "<th", "a", " ", "\n"]
any_text = st.lists(st.sampled_from(PIECES), max_size=14).map("".join)
openings = st.lists(st.sampled_from(OPENINGS), max_size=5).map("".join)


@given(any_text)
def test_to_cut_twice_is_to_cut_once(text: str) -> None:
    once = without_thoughts(text)
    assert without_thoughts(once) == once


@given(any_text, openings)
def test_nothing_of_an_open_thought_is_left(text: str, inside: str) -> None:
    assert "SECRET" not in without_thoughts(f"{text}<think>{inside}SECRET")
    assert "SECRET" not in without_thoughts(f"SECRET{inside.replace('<think>', '')}</think>{text}")


@LINEAR_TIME
@pytest.mark.parametrize("part", [*PIECES, "<|channel|>final ", "<think>a</think>", "<think ", "<|"])
def test_time_is_linear_in_the_length_of_hostile_text(part: str) -> None:
    without_thoughts(part * (HOSTILE_CHARACTERS // len(part)))


class Echo:
    """An episode that knows nothing of thoughts, unless it says so."""

    observation = ""

    def __init__(self, reads_thoughts: bool | None = None) -> None:
        if reads_thoughts is not None:
            self.reads_thoughts = reads_thoughts

    def step(self, action: str) -> StepResult:
        return StepResult("o", action)


def test_no_environment_is_given_thoughts_but_one_that_reads_them() -> None:
    assert play(Echo(), "<think>a</think>b", 1).action == "b"
    assert play(Echo(), "<think>a", 1).action == ""
    assert play(Echo(True), "<think>a</think>b", 1).action == "<think>a</think>b"
    assert play(Echo(False), "<think>a</think>b", 1).action == "b"
