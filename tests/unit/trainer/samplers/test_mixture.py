"""Shares are exact at every point of a run, by environment and by prefix."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mulligan.trainer.samplers import History, Task, UnfitSetting, mixture
from mulligan.trainer.samplers.mixture import Settings, schedule
from tests.support.sampling import numbered, play, request, sampled, tasks

TWO = {"lake": numbered(7, "a"), "quiz": numbered(3, "b")}
weights = st.lists(st.integers(1, 50), min_size=1, max_size=6)


@given(weights=weights, cuts=st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_each_part_has_its_share_after_every_task(weights: list[int], cuts: list[int]) -> None:
    """In however many steps the tasks are chosen."""
    shares = [Fraction(weight, sum(weights)) for weight in weights]
    given = [0] * len(shares)
    total = 0
    for count in cuts:
        for part in schedule(shares, list(given), count):
            given[part] += 1
            total += 1
            assert all(abs(given[part] - share * total) < 1 for part, share in enumerate(shares))


@given(share=st.integers(1, 9), per_step=st.integers(1, 20), seed=st.integers(0, 2), steps=st.integers(1, 12))
def test_a_run_has_exact_shares_of_its_environments(share: int, per_step: int, seed: int, steps: int) -> None:
    settings = Settings(shares={"lake": 1 - share / 10, "quiz": share / 10})
    total = quiz = 0
    for choice in play(mixture, settings, TWO, steps, tasks_per_step=per_step, seed=seed):
        total += len(choice.tasks)
        quiz += sum(task.environment == "quiz" for task in choice.tasks)
        assert abs(quiz - Fraction(share, 10) * total) < 1
    if total % 10 == 0:
        assert quiz == total // 10 * share


def test_every_pass_within_a_part_sees_each_task_once() -> None:
    settings = Settings(shares={"lake": 3, "quiz": 1})
    order = [task for choice in play(mixture, settings, TWO, 14) for task in choice.tasks]
    for name, listed in TWO.items():
        own = [task.task_id for task in order if task.environment == name]
        assert len(own) == {"lake": 42, "quiz": 14}[name]
        for start in range(0, len(own) // len(listed) * len(listed), len(listed)):
            assert sorted(own[start : start + len(listed)]) == [info.task_id for info in listed]


def test_a_task_is_of_the_longest_prefix_and_others_are_left_out() -> None:
    listed = tasks("easy-1", "easy-2", "easy-big-1", "hard-1", "odd-1")
    settings = Settings(shares={":easy-": 2, ":easy-big-": 1, "lake:hard-": 1})
    counts = Counter(task.task_id for choice in play(mixture, settings, {"lake": listed}, 10) for task in choice.tasks)
    assert counts == {"easy-1": 10, "easy-2": 10, "easy-big-1": 10, "hard-1": 10}


def test_the_order_of_the_shares_does_not_matter() -> None:
    """On the wire they have none."""
    one = Settings(shares={"lake": 0.3, "quiz": 0.7})
    other = Settings(shares={"quiz": 0.7, "lake": 0.3})
    assert list(play(mixture, one, TWO, 9)) == list(play(mixture, other, TWO, 9))


def test_a_replaced_task_is_followed_by_one_of_its_part() -> None:
    settings = Settings(shares={"lake": 3, "quiz": 1})
    history = History()
    first = mixture.choose(request(TWO), history, settings)
    history.add(sampled(first, 0, lambda task: (0.0, 0.0)))
    second = mixture.choose(request(TWO, round=1, replaced=tuple(first.tasks)), history, settings)
    assert [task.environment for task in second.tasks] == [task.environment for task in first.tasks]
    assert not set(first.tasks) & set(second.tasks), "the pass goes on"
    history.add(sampled(second, 0, lambda task: (0.0, 0.0), 1))
    third = mixture.choose(request(TWO, 1), history, settings)
    assert Counter(task.environment for task in third.tasks) == {"lake": 3, "quiz": 1}, "shares are those of the kept"


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        ({"quiz": 1.0}, "no share of 'lake', the environment of the run"),
        ({"laek": 0.5, "quiz": 0.5}, "no share of 'lake', the environment of the run; did you mean 'laek'?"),
        ({"lake:c": 1.0}, "'lake:c' has no task: none of the 7 training tasks of 'lake' begins with 'c'"),
        ({":a00O0": 0.1, "quiz": 1.0}, "begins with 'a00O0'; did you mean 'a000"),
        (
            {"lake": 0.5, "lake:": 0.5},
            "has no task: all 7 of its tasks are those of longer prefixes or of an equal key",
        ),
        ({"lake": 0.5, ":a": 0.5}, "'lake' has no task: all 7"),
    ],
)
def test_shares_that_fit_no_task_are_told(shares: dict[str, float], words: str) -> None:
    with pytest.raises(UnfitSetting) as caught:
        mixture.choose(request(TWO), History(), Settings(shares=shares))
    assert words in str(caught.value) and caught.value.field == "sampler.shares"


@pytest.mark.parametrize("shares", [{}, {"lake": 0}, {"lake": -0.5}, {"lake": float("inf")}, None])
def test_a_share_is_a_positive_number(shares: Any) -> None:
    with pytest.raises(ValidationError):
        Settings.model_validate({"shares": shares})


def test_it_names_the_environments_of_the_run() -> None:
    settings = Settings(shares={"lake": 1, ":a": 1, "quiz:x": 1, "quiz:y": 1})
    assert dict(settings.environments) == {"lake": "sampler.shares", "quiz": "sampler.shares"}


def test_an_empty_key_is_the_environment_of_the_run() -> None:
    (choice,) = play(mixture, Settings(shares={"": 1}), {"lake": numbered(4)}, 1)
    assert sorted(choice.tasks) == [Task("lake", f"t{number:04}") for number in range(4)]
