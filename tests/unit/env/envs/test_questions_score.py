"""What is read in a reply to a question, and when it is right."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mulligan.env.envs.questions.score import is_right, number, read

CHOICES = ("a trout", "a bat", "a frog", "an ant")


@pytest.mark.parametrize(
    ("reply", "accepted", "expected"),
    [
        ("\\boxed{11}", "11", True),
        ("\\boxed{11.0}", "11", True),
        ("<answer>11</answer>", "11", True),
        ("It is 11.", "11", True),
        ("It is 11, not 12.", "11", False),
        ("The answer is 11. I took 2 steps.", "11", True),
        ("The answer is 11. I took 2 steps.", "2", False),
        ("The answer is 1/2.\nHope that helps, as 3 others did!", "0.5", True),
        ("So x = - 11", "-11", True),
        ("It is -$11.", "-11", True),
        ("The answer is the Sorn.\n\nHope that helps!", "Sorn", True),
        ("I think.\n<answer>the Sorn", "Sorn", True),
        ("\\boxed{x = 11}", "11", True),
        ("\\boxed{11 km}", "11", True),
        ("\\boxed{11\\text{ cm}^2}", "11", True),
        ("\\boxed{11 or 12}", "11", False),
        ("\\boxed{12 or 11}", "11", False),
        ("\\boxed{-11}", "11", False),
        ("\\boxed{1,234}", "1234", True),
        ("\\boxed{1234}", "1,234", True),
        ("\\boxed{0.5}", "1/2", True),
        ("\\boxed{\\frac{1}{2}}", "0.5", True),
        ("\\boxed{1/2}", "2", False),
        ("\\boxed{\\frac{5}{8}}", "5/8", True),
        ("\\boxed{\\frac{10}{16}}", "\\frac{5}{8}", True),
        ("\\boxed{50\\%}", "50%", True),
        ("\\boxed{1e999999999}", "3", False),
        ("\\boxed{1/0}", "0", False),
        ("\\boxed{" + "9" * 5000 + "}", "9", False),
        ("\\boxed{(3,4)}", "(3, 4)", True),
        ("\\boxed{\\left(3, 4\\right)}", "(3,4)", True),
        ("\\boxed{34}", "(3,4)", False),
        ("\\boxed{x^2+1}", "x^2 + 1", True),
        ("\\boxed{x2+1}", "x^2 + 1", False),
        ("\\boxed{\\dfrac{x}{2}}", "\\frac{x}{2}", True),
        ("\\boxed{the Sorn}", "Sorn", True),
        ("\\boxed{July 4, 1776}", "july 4 1776", True),
        ("\\boxed{U.S.}", "US", True),
        ("\\boxed{\\text{Monday}}", "Monday", True),
        ("\\boxed{I don’t know}", "I don't know.", True),
        ("\\boxed{a}", "A", True),
        ("\\boxed{the}", "A", False),
        ("\\boxed{}", "a", False),
        ("", "the", False),
    ],
)
def test_answers(reply: str, accepted: str, expected: bool) -> None:
    assert is_right(read(reply, [accepted]), [accepted]) is expected


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("B.", "B"),
        ("(B)", "B"),
        ("B. a bat", "B"),
        ("\\boxed{B}", "B"),
        ("\\boxed{\\text{B}}", "B"),
        ("<answer>(B) a bat</answer>", "B"),
        ("Not A.\nThe answer is B.", "B"),
        ("B. a bat\nAs bats have hair.", "B"),
        ("The answer is: **B**", "B"),
        ("**Answer**: B\n\nHope that helps!", "B"),
        ("\\boxed{A bat}", "B"),
        ("bat", "B"),
        ("\\boxed{A} no, \\boxed{B}", "B"),
        ("<think>A</think>B", "B"),
        ("<think>B</think>", ""),
        ("A lot of them", ""),
        ("E", ""),
        ("\\boxed{A or B}", ""),
        ("\\boxed{I don't know}", ""),
        ("", ""),
    ],
)
def test_choices(reply: str, letter: str) -> None:
    assert read(reply, ["C"], CHOICES) == letter


numbers = st.integers(-(10**12), 10**12)


@given(numbers, st.integers(1, 9_999))
def test_a_number_is_the_same_however_it_is_written(whole: int, below: int) -> None:
    assert number(f"{whole:,}") == number(f"{whole}.0") == number(f" {whole}.") == number(f"${whole}$"[:-1]) == whole
    assert number(f"{whole}/{below}") == Fraction(whole, below)
    if whole >= 0:
        assert number(f"\\frac{{{whole}}}{{{below}}}") == Fraction(whole, below)


@given(numbers, numbers)
def test_numbers_are_right_if_they_are_equal(one: int, other: int) -> None:
    assert is_right(read(f"\\boxed{{{one:,}}}", [str(other)]), [str(other)]) is (one == other)
    assert is_right(read(f"So it is {one}.", [str(one)]), [str(one)])


@given(st.text(max_size=80), st.lists(st.text(max_size=20), max_size=3), st.booleans())
def test_any_reply_can_be_read(reply: str, accepted: list[str], has_choices: bool) -> None:
    answer = read(reply, accepted, CHOICES if has_choices else ())
    assert is_right(answer, accepted) in (True, False)
    assert not is_right(answer, [])
