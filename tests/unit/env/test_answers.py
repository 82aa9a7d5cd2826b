"""Which part of what an agent writes is its answer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mulligan.env.answers import AnswerFormat, boxed, last_letter, last_number, marked, read_answer
from tests.support.effort import HOSTILE_CHARACTERS, LINEAR_TIME


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer> 42 </answer>", "42"),
        ("<answer>1</answer> no: <answer>\n2\n</answer> yes", "2"),
        ("<think><answer>1</answer></think> so <answer>3</answer>", "3"),
        ("It is \\boxed{7}.", "7"),
        ("\\boxed{7} <answer>8</answer>", "8"),
        ("I add.\n\n 9 \n\n", "9"),
        ("<answer>10", "10"),  # an engine stopped at </answer> and left it out
        ("It is <answer>\n10\n", "10"),
        ("<answer>1</answer>, or <answer>10", "1"),
        ("I write <answer> and then it.\n10", "10"),
        ("\\boxed{7} <answer>10", "7"),
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
        *(("8 m^2", "8"), ("8 cm^{3}", "8"), ("2^3", "3")),
        *(("9 - 17 = - 8", "-8"), ("x = \u2212 8", "-8"), ("(- 8)", "-8"), ("-$8", "-8"), ("= - $8", "-8")),
        *(("\u20138", "-8"), ("-\\$8", "-8"), ("$-8$", "-8"), ("5\u20138", "8"), ("5-$8", "8"), ("9 - 8", "8")),
        *(("I list:\n- 8", "8"), ("x - 8", "8"), ("The rest - 8 of them", "8")),
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
        # A calculation or a choice of numbers is no number.
        ("The answer is 16/8", "8", "16/8"),
        ("The answer is 8/2.", "8", "8/2."),
        ("The answer is 8 or 9", "8", "8 or 9"),
        ("The answer is 8, not 9 or 10.", "7", "8"),
        ("The answer is 8 = 3 + 5", "7", "8"),
        ("The answer is 3 + 5.", "3", "3 + 5."),
        ("<answer>3 + 5</answer>", "5", "3 + 5"),
        ("<answer>3 + 5 = 8</answer>", "7", "8"),
        ("\\boxed{2 \\times 4 = 8}", "7", "8"),
        ("<answer>1/2 + 1/4</answer>", "1/4", "1/2 + 1/4"),
        ("<answer>3/4 of it</answer>", "1/2", "3/4"),
        ("<answer>-8</answer>", "7", "-8"),
        ("8 is the answer to 4 + 4.", "7", "8"),
        ("I add.\nSo **8** is my final answer.", "7", "8"),
        ("7 is the answer to the first part. The second is 12.", "7", "12"),
        ("5 was the wrong answer. It is 7.", "8", "7"),
        ("I thought 5 was the answer, but it's 7.", "8", "7"),
        ("Is 10 the answer? 10 is the answer only if x > 0. Hence 15", "7", "15"),
        ("3 + 12 is the answer, which makes 15", "7", "15"),
        *((text, "7", "-7") for text in ("\\boxed{x = - 7}", "<answer>2 - 9 = - 7</answer>", "The answer is x = - 7")),
        *((text, "1/2", "1/4") for text in ("The answer is 1/4 = 0.25", "<answer>1/4 = 0.25</answer>")),
        ("\\boxed{\\frac{1}{3} = 0.333}", "1/2", "1/3"),
        ("<answer>x = 1/3, y = 2</answer>", "1/2", "1/3"),
        *(
            (f"<answer>{text}</answer>", "7", "10")
            for text in ("5 + 5\n10", "5+5 equals 10", "5 + 5 \u2192 10", "5-15: 10")
        ),
        ("\\boxed{\\frac{20}{2} \\approx 10}", "7", "10"),
        ("<answer>Total 42 for 3-4 people: 42</answer>", "7", "42"),
        ("The answer is 12 or 13, probably 12.", "7", "12"),
        ("The answer is 3 + 5, so 8.", "7", "8"),
        ("<answer>3 -5</answer>", "5", "3 -5"),
        ("<answer>3 + -5</answer>", "5", "3 + -5"),
        ("<answer>1, -5</answer>", "7", "-5"),
        ("The answer is blue.", "red", "blue"),
        ("I think.\n**Answer:** blue", "red", "blue"),
        ("The final answer is: **blue**.", "red", "blue"),
        ("The answer is Is it.", "It is.", "Is it."),
        ("The answer is", "red", "The answer is"),
        ("8 of them are\nblue", "red", "blue"),
        # Behind "The answer is" the first number counts, or that of the right side; further sentences do not.
        ("The answer is 8. I used 2 steps.", "7", "8"),
        ("The answer is 9 - 1 = 8. I used 2 steps.", "7", "8"),
        ("So the answer is about 8 km.\nI used 2 steps.", "7", "8"),
        ("The answer is 9.\nNo: the answer is 8 of 9.", "7", "8"),
        ("The answer is -$8, not 9.", "7", "-8"),
        ("The answer is x = 3/4. I used 2 steps.", "1/2", "3/4"),
        ("**Answer:**\n8\n(of 9)", "7", "8"),
        ("To find the answer: first 3 + 4 = 7.\nThen 7 * 2 = 14", "7", "14"),
        ("The answer is not 3.\nIt is 8", "7", "8"),
        ("So x = 0x2f", "0x1", "0x2f"),
        ("The answer is -0x2F. I used 2 steps.", "0x1", "-0x2F"),
        ("It is 0x2g", "0x1", "0"),
        ("**Answer**: blue", "red", "blue"),
        ("The answer is `blue`.\n\nHope that helps!", "red", "blue"),
        ("The answer is blue. Hope that helps!", "red", "blue"),
        ("The answer is blue. Hope that helps!", "Is it. Yes", "blue. Hope that helps!"),
        ("To find the answer: look at the table.\nblue", "red", "blue"),
        ("I see.\nblue.", "red", "blue"),
        ("I see.\n**blue**.", "red", "blue"),
        ("So it is **blue**.", "red", "blue"),
        ("It is raining", "It is dry", "It is raining"),
        ("z = 3i - 2", "1i", "3i - 2"),
        ("D=4,E=8", "A=1,B=2", "D=4,E=8"),
        ("The answer is:\n```\n_ Q\nQ _\n```\nYes.", "Q _\n_ Q", "_ Q\nQ _"),
        ("The answer is:\n1 2\n3 4\n\nYes.", "5 6\n7 8", "1 2\n3 4"),
        ("I see.\n\n1 2\n3 4.", "5 6\n7 8", "1 2\n3 4"),
        ("*", "red", "*"),
        ("It is raining.", "", "It is raining"),  # of an unknown form
        ("y = 2x", "", "y = 2x"),
        ("5'2\"", "", "5'2\""),
    ],
)
def test_the_expected_answer_decides_what_kind_is_read(text: str, expected: str, answer: str) -> None:
    assert read_answer(text, expected) == answer


def test_a_fraction_is_expected_in_latex() -> None:
    for text in ("The answer is 751/897.", "$\\dfrac{751}{897}$", "\\frac{751}{897}"):
        assert read_answer(text, "$\\dfrac{3}{4}$", AnswerFormat.LAST_NUMBER) == "751/897"


def test_marks_go_before_boxes() -> None:
    assert marked("<answer>Sorn</answer> \\boxed{Bel}") == "Sorn"
    assert marked("<answer>Sorn \\boxed{Bel}") == boxed("\\boxed{Bel}") == "Bel"
    assert marked("Sorn") is None


@LINEAR_TIME
@pytest.mark.parametrize(
    "part",
    [
        *("1,", "1,111", "1.", "-", "1e", "<answer>", "</answer>", "answer is ", "\\frac{1}{", "9 /", "0x", "= - "),
        *("answer is\n", "answer: a", "the answer*", "-$", "a. ", "a=", "**", "so it is "),
    ],
)
def test_time_is_linear_in_the_length_of_hostile_text(part: str) -> None:
    for expected in ("7", "1/2", "red"):
        read_answer(part * (HOSTILE_CHARACTERS // len(part)), expected)


@given(
    st.integers(-(10**15), 10**15) | st.floats(-1e9, 1e9), st.sampled_from(["{}", "= {}.", "is {} km", "9 - 1 = {}"])
)
def test_a_number_in_a_sentence_is_read(number: float, frame: str) -> None:
    assert float(read_answer(frame.format(number), "7")) == number
    if isinstance(number, int):
        assert int(read_answer(frame.format(f"{number:,}"), "7")) == number


THOUGHT = "<think>7 <answer>7</answer> \\boxed{7} (D)\n</think>"


@pytest.mark.parametrize("thought", ["", THOUGHT])
@pytest.mark.parametrize(
    ("how", "text", "expected", "answer"),
    [
        ("last_number", "9 - 1 = 8", "7", "8"),
        ("last_number", "The answer is 8.", "7", "8"),
        ("last_number", "8 km, not 9 km", "7", "9"),
        ("last_number", "8 m^2", "7", "8"),
        ("last_number", "1,234,567 people.", "7", "1234567"),
        ("last_number", "\u22128", "7", "-8"),
        ("last_number", "It is -8.50.", "7", "-8.50"),
        ("last_number", "<answer>8</answer> of 9", "7", "9"),
        ("last_number", "so 3/4.", "1/2", "3/4"),
        ("last_number", "eight", "7", ""),
        ("last_number", "", "7", ""),
        ("boxed", "\\boxed{8} or \\boxed{9}.", "7", "9"),
        ("boxed", "\\boxed{9 - 1 = 8\\text{ km}}", "7", "8"),
        ("boxed", "\\boxed{1{,}234}", "7", "1234"),
        ("boxed", "\\boxed{\u22128.}", "7", "-8"),
        ("boxed", "\\boxed{blue}", "red", "blue"),
        ("boxed", "<answer>9</answer> \\boxed{8}", "7", "8"),
        ("boxed", "<answer>9</answer>", "7", ""),
        ("boxed", "The answer is 8.", "7", ""),
        ("boxed", "\\boxed{8", "7", ""),
        ("boxed", "", "7", ""),
        ("tag", "<answer>8</answer> no, <answer>9</answer>.", "7", "9"),
        ("tag", "<answer>about 1,234 km.</answer>", "7", "1234"),
        ("tag", "<answer>\u22128</answer> \\boxed{9}", "7", "-8"),
        ("tag", "<answer> blue </answer>", "red", "blue"),
        ("tag", "\\boxed{8}", "7", ""),
        ("tag", "<answer>8", "7", ""),
        ("tag", "", "7", ""),
        ("line", "7 and 1\n9 - 1 = 8\n\n", "7", "8"),
        ("line", "<answer>9</answer>\nThe answer is 8 km.", "7", "8"),
        ("line", "red\nThe answer is: blue.", "red", "blue"),
        ("line", "1,234.5\n\u22121,234.5.", "7", "-1234.5"),
        ("line", "8\nnone", "7", "none"),
        ("line", "", "7", ""),
        ("choice", "A cow drinks (B).", "B", "B"),
        ("choice", "(A) milk, (B) water: it is B", "B", "B"),
        ("choice", "I think that no one knows", "B", ""),
    ],
)
def test_each_format_reads_its_own_place_alone(thought: str, how: str, text: str, expected: str, answer: str) -> None:
    assert read_answer(f"{thought}{text}", expected, AnswerFormat(how)) == answer


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        *(("B", "B"), ("B.", "B"), ("(B)", "B"), ("**B**", "B"), ("B) water", "B"), ("B: water", "B")),
        *(("The answer is B because a cow drinks", "B"), ("Option C, not (A).", "A"), ("Answer: **C**", "C")),
        *(("A\nB\n", "B"), ("(A) and (B)", "B"), ("B. I think so.", "B"), ("It is (E), or (C)", "C")),
        *(("A cow", ""), ("I", ""), ("b", ""), ("BB", ""), ("B2", ""), ("(E)", ""), ("", "")),
    ],
)
def test_a_letter_is_read_where_it_stands_for_a_choice(text: str, letter: str) -> None:
    assert last_letter(text, "ABCD") == letter


@pytest.mark.parametrize("how", [one for one in AnswerFormat if one is not AnswerFormat.AUTO])
def test_each_format_but_the_first_says_what_it_reads(how: AnswerFormat) -> None:
    assert how.instruction and how.missing.startswith("No answer was found. What is read: ")
    assert AnswerFormat.AUTO.instruction == "" and AnswerFormat.AUTO.missing == "No answer was found."


@LINEAR_TIME
@pytest.mark.parametrize("how", AnswerFormat)
@pytest.mark.parametrize("part", ["(A", "A ", "answer is ", "A**", "<answer>", "\\boxed{", "1,", "\n"])
def test_each_format_is_linear_in_the_length_of_hostile_text(how: AnswerFormat, part: str) -> None:
    assert isinstance(read_answer(part * (HOSTILE_CHARACTERS // len(part)), "7", how), str)
