"""The difficulty follows the reward, and a simulated policy learns faster by it than by uniform sampling."""

from __future__ import annotations

import random
from collections.abc import Iterator
from math import exp, tanh
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mulligan.common.types import Split, TaskInfo
from mulligan.trainer.samplers import Choice, History, SamplerSettings, Task, UnfitSetting, adarft, uniform
from mulligan.trainer.samplers.adarft import Settings, target_difficulty
from tests.support.sampling import play, request, sampled


def of_difficulties(*difficulties: float) -> list[TaskInfo]:
    return [TaskInfo(f"t{place}", Split.TRAIN, difficulty) for place, difficulty in enumerate(difficulties)]


def test_the_formula_by_hand() -> None:
    """Difficulties from 0 to 100, so the step is 50, as in the paper."""
    listed = of_difficulties(0, 40, 100)
    history = History()
    for step, reward in enumerate((1.0, 0.25)):
        choice = adarft.choose(request(listed, step), history, Settings())
        history.add(sampled(choice, step, lambda task, reward=reward: (reward,)))  # type: ignore[misc]
    raised = 50 * tanh(2 * 0.5)
    assert target_difficulty(request(listed, 1), history, Settings()) == raised
    assert target_difficulty(request(listed, 2), history, Settings()) == raised + 50 * tanh(2 * -0.25)
    other = Settings(target_reward=1.0, sensitivity=1.0, move=10.0, start=90.0)
    assert target_difficulty(request(listed, 1), history, other) == 90.0
    history.add(sampled(choice, 2, lambda task: (None, None)))
    assert target_difficulty(request(listed, 3), history, Settings()) == raised + 50 * tanh(2 * -0.25)


@pytest.mark.parametrize(("reward", "end"), [(0.0, 2.0), (1.0, 7.0)])
def test_the_difficulty_stays_among_those_of_the_tasks(reward: float, end: float) -> None:
    listed = of_difficulties(2, 3, 5, 7)
    history = History()
    for step in range(9):
        choice = adarft.choose(request(listed, step), history, Settings())
        history.add(sampled(choice, step, lambda task: (reward, reward)))
    assert target_difficulty(request(listed, 9), history, Settings()) == end


@given(
    difficulties=st.lists(st.floats(0, 9), min_size=4, max_size=30),
    rest=st.floats(0, 1),
    per_step=st.integers(1, 4),
)
def test_a_task_rests_while_others_are_chosen(difficulties: list[float], rest: float, per_step: int) -> None:
    listed = of_difficulties(*difficulties)
    settings = Settings(rest=rest)
    choices = play(adarft, settings, listed, 12, tasks_per_step=per_step)
    order = [task for choice in choices for task in choice.tasks]
    between = min(int(rest * len(listed)), len(listed) - per_step)
    for place, task in enumerate(order):
        begun = place - place % per_step  # its step sees what was chosen before
        assert task not in order[max(begun - between, 0) : place]


def test_a_task_that_is_replaced_is_not_chosen_again_in_its_step() -> None:
    listed = of_difficulties(*[1] * 3, *[5] * 9)
    history = History()
    chosen: list[Task] = []
    for number in range(3):
        gone = tuple(chosen[-4:]) if number else ()
        asked = request(listed, 0, round=number, replaced=gone)
        choice = adarft.choose(asked, history, Settings(rest=0))
        history.add(sampled(choice, 0, lambda task: (0.0, 0.0), number))
        chosen += choice.tasks
    assert len(set(chosen)) == len(chosen) == 12


def test_the_nearest_tasks_are_chosen_and_equal_ones_take_turns() -> None:
    listed = of_difficulties(*[1] * 20, *[5] * 20)
    easy, *_ = choices = list(play(adarft, Settings(start=1.0, rest=0), listed, 5, rewards=lambda task: (0.0,)))
    assert all(int(task.task_id[1:]) < 20 for choice in choices for task in choice.tasks)
    assert len({task for choice in choices for task in choice.tasks}) > len(easy.tasks)


def test_more_tasks_than_there_are_repeat() -> None:
    chosen = adarft.choose(request(of_difficulties(1, 2), tasks_per_step=5), History(), Settings()).tasks
    assert [task.task_id for task in chosen] == ["t0", "t1", "t0", "t1", "t0"]


class Learner:
    """Solves a task of difficulty d with the probability 1 / (1 + exp(2.5 · (d − ability))). Its ability grows with
    the variance of the rewards in each group: the signal that a policy gradient has."""

    def __init__(self, listed: list[TaskInfo], seed: int):
        self.difficulty = {info.task_id: info.difficulty for info in listed}
        self.ability = 0.5
        self._random = random.Random(seed)

    def chance(self, task_id: str) -> float:
        return 1 / (1 + exp(2.5 * (self.difficulty[task_id] - self.ability)))

    @property
    def success(self) -> float:
        return fmean(map(self.chance, self.difficulty))

    def group(self, task_id: str) -> tuple[float, ...]:
        rewards = tuple(float(self._random.random() < self.chance(task_id)) for _ in range(4))
        self.ability += 0.02 * fmean(rewards) * (1 - fmean(rewards))
        return rewards


def learns(sampler: object, settings: SamplerSettings, seed: int, steps: int) -> Iterator[tuple[float, float]]:
    """Success on all tasks, and the mean reward, after each step. Of the difficulties 1 to 6, those from 3 on are four
    times as frequent."""
    draw = random.Random(1)
    listed = of_difficulties(*draw.choices(range(1, 7), [1, 1, 4, 4, 4, 4], k=400))
    learner = Learner(listed, seed)
    earned: list[float] = []

    def rewards(task: object) -> tuple[float, ...]:
        earned.append(fmean(found := learner.group(task.task_id)))  # type: ignore[attr-defined]
        return found

    for _ in play(sampler, settings, listed, steps, rewards, seed=seed, tasks_per_step=16):  # type: ignore[arg-type]
        yield learner.success, fmean(earned[-16:])


@pytest.mark.parametrize("seed", range(3))
def test_on_mostly_hard_tasks_it_reaches_a_success_in_less_than_half_of_the_rollouts(seed: int) -> None:
    found = list(learns(adarft, Settings(), seed, 200))
    needed = next(step for step, (success, _) in enumerate(found, 1) if success >= 0.5)
    late = [reward for success, reward in found if 0.3 <= success <= 0.6]
    assert len(late) > 20 and abs(fmean(late) - 0.5) < 0.1, "it plays what it solves half of the time"
    assert all(success < 0.5 for success, _ in learns(uniform, uniform.Settings(), seed, 2 * needed))


@pytest.mark.parametrize("start", [-1.0, 0.5, 5.5, 1e9])
def test_a_start_beyond_the_difficulties_is_refused(start: float) -> None:
    listed = of_difficulties(1, 5, 3)
    with pytest.raises(UnfitSetting, match=r"sampler\.start: expected 1 to 5, as the tasks are difficult") as caught:
        adarft.choose(request(listed), History(), Settings(start=start))
    assert caught.value.field == "sampler.start"
    history = History()
    history.add(sampled(Choice([Task("lake", "t0")] * 4), 0, lambda task: (1.0,)))
    assert adarft.choose(request(listed, 1), history, Settings(start=start)).tasks, "a run that began so goes on"
    for fitting in (1.0, 5.0):
        assert target_difficulty(request(listed), History(), Settings(start=fitting)) == fitting
