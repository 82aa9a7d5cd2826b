"""Passes over all tasks: the choices of a run from before there were samplers."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from mulligan.trainer.samplers import History, Task, uniform
from mulligan.trainer.seeds import derive_seed
from tests.support.sampling import numbered, play, request, sampled


def as_before(task_count: int, tasks_per_step: int, step: int, seed: int) -> list[int]:
    """As runs chose their tasks before there were samplers: a copy."""
    start = step * tasks_per_step
    chosen: list[int] = []
    while len(chosen) < tasks_per_step:
        epoch, offset = divmod(start + len(chosen), task_count)
        order = list(range(task_count))
        random.Random(derive_seed(seed, "order", epoch)).shuffle(order)
        chosen.extend(order[offset : offset + tasks_per_step - len(chosen)])
    return chosen


@given(tasks=st.integers(1, 30), per_step=st.integers(1, 40), step=st.integers(0, 50), seed=st.integers(0, 3))
def test_the_choices_are_those_of_before(tasks: int, per_step: int, step: int, seed: int) -> None:
    listed = numbered(tasks)
    asked = request(listed, step, seed=seed, tasks_per_step=per_step)
    found = uniform.choose(asked, History(), uniform.Settings())
    before = as_before(tasks, per_step, step, seed)
    assert found.tasks == [Task("lake", listed[index].task_id) for index in before] and found.horizon is None


@given(tasks=st.integers(1, 30), per_step=st.integers(1, 40), seed=st.integers(0, 3))
def test_every_pass_over_the_tasks_sees_each_once(tasks: int, per_step: int, seed: int) -> None:
    listed = numbered(tasks)
    steps = -(-3 * tasks // per_step)
    choices = play(uniform, uniform.Settings(), listed, steps, seed=seed, tasks_per_step=per_step)
    order = [task.task_id for choice in choices for task in choice.tasks]
    for epoch in range(3):
        assert sorted(order[epoch * tasks : (epoch + 1) * tasks]) == [info.task_id for info in listed]


@given(rounds=st.lists(st.lists(st.integers(1, 4), max_size=3), min_size=1, max_size=5), tasks=st.integers(4, 40))
def test_replaced_tasks_are_followed_by_the_next_of_the_pass(rounds: list[list[int]], tasks: int) -> None:
    """However many are replaced in each round of each step."""
    history = History()
    order: list[str] = []
    for step, replaced in enumerate(rounds):
        for number, count in enumerate([0, *replaced]):
            gone = tuple(group.task for group in history.rounds[-1].groups[:count]) if number else ()
            asked = request(numbered(tasks), step, round=number, replaced=gone)
            choice = uniform.choose(asked, history, uniform.Settings())
            assert len(choice.tasks) == asked.count
            history.add(sampled(choice, step, lambda task: (0.0,), number))
            order += [task.task_id for task in choice.tasks]
    whole = len(order) // tasks * tasks
    for start in range(0, whole, tasks):
        assert len(set(order[start : start + tasks])) == tasks
    assert len(set(order[whole:])) == len(order) - whole
