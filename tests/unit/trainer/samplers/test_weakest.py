"""Tasks that fail come more often, none is forgotten, and none fills a step."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mulligan.trainer.samplers import Choice, History, Task, weakest
from mulligan.trainer.samplers.weakest import Settings, weight
from tests.support.sampling import numbered, play, request, sampled

LAKE = Task("lake", "t0000")


def test_the_weight_is_the_share_that_failed_of_the_last_visits() -> None:
    history = History()
    settings = Settings(visits=2, floor=0.1)
    assert weight(LAKE, history, settings, 1.0) == 1.0, "nothing is known of it"
    for step, rewards in enumerate([(0.0, 0.0), (0.5, None), (1.0, 1.0), (None, None), (1.0, 0.0)]):
        history.add(sampled(Choice([LAKE]), step, lambda task, rewards=rewards: rewards))  # type: ignore[misc]
        assert weight(LAKE, history, settings, 1.0) == pytest.approx([1.0, 1.0, 1 / 3, 0.1, 0.5][step])
    assert weight(LAKE, history, Settings(visits=4), 0.5) == pytest.approx(1 / 5), "0.5 solves it, too"


@given(tasks=st.integers(1, 12), per_step=st.integers(1, 30), repeats=st.integers(1, 4), rounds=st.integers(0, 2))
def test_no_task_is_in_a_step_more_often_than_it_may_or_must(
    tasks: int, per_step: int, repeats: int, rounds: int
) -> None:
    history = History()
    replaced = ()
    chosen: Counter[Task] = Counter()
    for number in range(rounds + 1):
        asked = request(numbered(tasks), tasks_per_step=per_step, round=number, replaced=replaced)
        choice = weakest.choose(asked, history, Settings(repeats=repeats))
        assert len(choice.tasks) == asked.count
        history.add(sampled(choice, 0, lambda task: (0.0,), number))
        replaced = tuple(choice.tasks[: len(choice.tasks) // 2 + 1])  # type: ignore[assignment]
        chosen.update(choice.tasks)
        assert max(chosen.values()) <= max(repeats, -(-chosen.total() // tasks))


def test_a_task_comes_in_proportion_to_its_failures() -> None:
    """One task in a step, so that nothing is drawn without replacement: shares of 4/7, 2/7, 1/7."""
    success = {"t0000": 0.2, "t0001": 0.6, "t0002": 0.8}
    found = {
        Task("lake", task_id): [float(place < 10 * share) for place in range(10)] for task_id, share in success.items()
    }
    history = History()
    for task in list(found):
        history.add(sampled(Choice([task]), 0, lambda task: found[task]))
    counts: Counter[str] = Counter()
    for step in range(1, 3501):
        (task,) = weakest.choose(request(numbered(3), step, tasks_per_step=1), history, Settings()).tasks
        counts[task.task_id] += 1
    assert [counts[task_id] / 3500 for task_id in success] == pytest.approx([4 / 7, 2 / 7, 1 / 7], abs=0.03)


def test_a_task_that_is_always_solved_is_still_sampled() -> None:
    choices = play(weakest, Settings(floor=0.05), numbered(20), 200, rewards=lambda task: (float(task == LAKE),))
    late = Counter(task for place, choice in enumerate(choices) if place > 20 for task in choice.tasks)
    assert len(late) == 20 and 0 < late[LAKE] < min(count for task, count in late.items() if task != LAKE)
