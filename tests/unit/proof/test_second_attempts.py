"""What is read off the journals of runs about second attempts."""

from __future__ import annotations

import pytest

from mulligan.common.experience import Experience, Sample, Turn
from mulligan.common.types import Outcome
from proof.second_attempts import LEGEND, kind, memory, path, window

NEAR = "A\tB\tD\nD\tD\tD\nD\tD\tD"
FAR = "A\tC\tB\nD\tC\tD\nD\tD\tD"
WRONG = "A player\nC goal\nB hole\nD floor"


def sample(role: str, reward: float | None, observation: str, text: str = "", feedback: str = "") -> Sample:
    return Sample(
        sample_id=role,
        role=role,
        outcome=Outcome.COMPLETED,
        sequences=(),
        temperature=1.0,
        reward=reward,
        turns=(Turn(observation, text, "", 0.0),),
        text=text,
        feedback=feedback,
    )


def experience(name: str, board: str, *, shown: str = "nothing", legend: str = "", second: float = 0.0) -> Experience:
    samples = [sample("first", 0.0 if legend else 1.0, board, feedback="fell into hole")]
    if legend:
        request = f"{board}\nDown\n{board}\nfell into hole\n{shown}"
        samples += [sample("reflection", second, request, legend), sample("second", second, board)]
    return Experience(name, "run", 0, "lake", "task", 0, tuple(samples))


@pytest.mark.parametrize(
    ("legend", "expected"),
    [
        (LEGEND, "right"),
        (WRONG, "wrong"),
        ("A player\nB goal\nD floor", "broken"),
        ("A player\nB goal\nB hole\nD floor", "broken"),
        ("A player\nB goal\nC  hole\nD floor", "broken"),
        ("A player B goal C hole D floor", "broken"),
        ("", "broken"),
        ("nothing", "none"),
    ],
)
def test_legends(legend: str, expected: str) -> None:
    assert kind(legend) == expected


def test_what_the_memory_said_and_how_far_the_goal_is() -> None:
    assert memory(experience("a", NEAR, shown=WRONG, legend=LEGEND)) == WRONG
    assert memory(experience("a", NEAR, legend=LEGEND)) == "nothing"
    assert (path(experience("a", NEAR)), path(experience("b", FAR))) == (1, 6)


def test_a_window_counts_what_was_read_written_and_solved() -> None:
    found = window(
        [
            experience("solved", NEAR),
            experience("right", NEAR, shown=LEGEND, legend=LEGEND, second=1.0),
            experience("far", FAR, shown=LEGEND, legend=LEGEND),
            experience("lucky", FAR, legend=WRONG, second=1.0),
            experience("copied", NEAR, shown=WRONG, legend=WRONG),
        ]
    )
    assert (found["first_attempts"], found["first_success"]) == (5, 0.2)
    assert (found["second_attempts"], found["second_success"]) == (4, 0.5)
    assert found["reflections"] == {"right": 2, "wrong": 2}
    assert found["second_success_by_reflection"] == {"right": 0.5, "wrong": 0.5}
    assert found["memory_shown"] == {"right": 2, "none": 1, "wrong": 1}
    assert found["right_reflections_by_memory"] == {"none": 0, "right": 1, "wrong": 0}
    assert found["reflections_equal_to_memory"] == 0.75
    assert found["remembered"] == {"right": 1, "wrong": 1}
    assert (found["moves_needed"], found["moves_needed_in_second_attempts"]) == (3, 3.5)
    assert found["second_success_with_right_legend_by_moves_needed"] == {"1": 1, "6": 0}


def test_a_window_without_second_attempts() -> None:
    found = window([experience("solved", NEAR)])
    assert found["second_success"] is None and found["moves_needed_in_second_attempts"] is None
