"""Which part of what an agent writes is its answer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mulligan.env.answers import boxed, last_number, marked, read_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer> 42 </answer>", "42"),
        ("<answer>1</answer> no: <answer>\n2\n</answer> yes", "2"),
        ("<think><answer>1</answer></think> so <answer>3</answer>", "3"),
        ("It is \\boxed{7}.", "7"),
        ("\\boxed{7} <answer>8</answer>", "8"),
        ("I add.\n\n 9 \n\n", "9"),
        ("<answer>10", "<answer>10"),
        ("11</answer>", "11</answer>"),
        ("", ""),
        (" \n ", ""),
        ("<answer></answer>", ""),
        ("<answer>" * 100_000, "<answer>" * 100_000),
    ],
)
def test_answers_are_read(text: str, answer: str) -> None:
    assert read_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *(("8", "8"), ("The answer is 8.", "8"), ("9 - 1 = 8", "8"), ("9-1=8", "8"), ("(9)-1 = 8", "8"), ("9-8", "8")),
        *(("It is -8", "-8"), ("= -8", "-8"), ("\u22128", "-8"), ("x = 9 - -8", "-8"), ("+8", "+8"), ("$8$", "8")),
        *(("$1,234.50", "1234.50"), ("1,234,567 people", "1234567"), ("1, 2, 8", "8"), ("1,2,8", "8"), ("12,34", "34")),
        *(("1\u202f234", "1234"), ("1'234", "1234"), ("1{,}234", "1234"), ("1\\,234", "1234"), ("0101", "0101")),
        *(("8 apples", "8"), ("8km", "8"), ("8%", "8"), ("**8**", "8"), ("_8_", "8"), ("[8]", "8"), ("No.8", "8")),
        *(("of H2O 8 l", "8"), ("8 of H2O", "8"), (".5", ".5"), ("8.0.", "8.0"), ("1e-3", "1e-3"), ("2**3 = 8", "8")),
        *(("none", ""), ("", ""), ("x2", ""), ("-", "")),
    ],
)
def test_the_last_number(text: str, number: str) -> None:
    assert last_number(text) == number
    assert read_answer(text, "7") == number


@pytest.mark.parametrize(
    ("text", "expected", "answer"),
    [
        ("<answer>8 apples</answer> of 9", "7", "8"),
        ("<Answer>The answer is 8</ANSWER>", "7", "8"),
        ("\\boxed{8\\text{ km}}", "7", "8"),
        ("<answer>none</answer> of 9", "7", "none"),
        ("The answer is 3/4.", "1/2", "3/4"),
        ("\\boxed{\\frac{3}{4}}", "1/2", "3/4"),
        ("3 / 4 of 5", "1/2", "3/4"),
        ("The answer is 3.", "1/2", "3"),
        ("The answer is blue.", "red", "blue"),
        ("I think.\n**Answer:** blue", "red", "blue"),
        ("The final answer is: **blue**.", "red", "blue"),
        ("The answer is Is it.", "It is.", "Is it."),
        ("The answer is", "red", "The answer is"),
        ("8 of them are\nblue", "red", "blue"),
    ],
)
def test_the_expected_answer_decides_what_kind_is_read(text: str, expected: str, answer: str) -> None:
    assert read_answer(text, expected) == answer


def test_marks_go_before_boxes() -> None:
    assert marked("<answer>Sorn</answer> \\boxed{Bel}") == "Sorn"
    assert marked("<answer>Sorn \\boxed{Bel}") == boxed("\\boxed{Bel}") == "Bel"
    assert marked("Sorn") is None


@pytest.mark.parametrize(
    "part", ["1,", "1,111", "1.", "-", "1e", "<answer>", "</answer>", "answer is ", "\\frac{1}{", "9 /"]
)
def test_time_is_linear_in_the_length_of_hostile_text(part: str) -> None:
    """Quadratic time would run into the suite's time limit."""
    for expected in ("7", "1/2", "red"):
        read_answer(part * (2**20 // len(part)), expected)


@given(
    st.integers(-(10**15), 10**15) | st.floats(-1e9, 1e9), st.sampled_from(["{}", "= {}.", "is {} km", "9 - 1 = {}"])
)
def test_a_number_in_a_sentence_is_read(number: float, frame: str) -> None:
    assert float(read_answer(frame.format(number), "7")) == number
    if isinstance(number, int):
        assert int(read_answer(frame.format(f"{number:,}"), "7")) == number
