"""Full, unary and silent feedback, for every environment."""

from __future__ import annotations

import pytest

from mulligan.env.base import Environment, Split, StepResult
from mulligan.env.config import EnvSettings
from mulligan.env.feedback import RIGHT, WRONG, Feedback, with_feedback
from tests.support.environments import Awkward

ANSWERS = {
    "frozenlake": ("```Up```", 8),
    "sokoban": ("```Up```", 8),
    "hotpotqa": ("I give up.", 1),
}


def made(kind: str, feedback: str) -> Environment:
    table = {"kind": kind, "feedback": feedback}
    return EnvSettings(environments={"x": table}).create_environments()["x"]


def last(environment: Environment, task_id: str, actions: list[str]) -> StepResult:
    episode = environment.start(task_id)
    for action in actions:
        result = episode.step(action)
        if result.done:
            return result
    raise AssertionError("the episode goes on")


@pytest.mark.parametrize("kind", ANSWERS)
def test_only_the_closing_words_differ(kind: str) -> None:
    action, steps = ANSWERS[kind]
    environments = {feedback: made(kind, feedback) for feedback in Feedback}
    task_id = environments[Feedback.FULL].list_tasks(Split.TEST, 0, 1)[0].task_id
    results = {feedback: last(one, task_id, [action] * steps) for feedback, one in environments.items()}
    assert results[Feedback.UNARY].feedback == WRONG
    assert results[Feedback.SILENT].feedback == ""
    assert results[Feedback.FULL].feedback not in (WRONG, "")
    assert len({(one.observation, one.action, one.reward, one.truncated) for one in results.values()}) == 1
    for environment in environments.values():
        assert environment.info.prompts == environments[Feedback.FULL].info.prompts
        assert environment.info.task_counts == environments[Feedback.FULL].info.task_counts
        assert environment.list_tasks(Split.TEST, 3, 2) == environments[Feedback.FULL].list_tasks(Split.TEST, 3, 2)
    assert "unary feedback" in environments[Feedback.UNARY].info.description


def test_a_solved_task_is_said_to_be_right() -> None:
    environment = with_feedback(Awkward("x", 0.0), Feedback.UNARY)  # pays 0.25 a step, four times
    assert last(environment, "good", ["a"] * 4).feedback == RIGHT
    assert last(environment, "good", ["well", "a", "a", "a"]).feedback == WRONG


def test_rounding_does_not_make_a_solved_task_wrong() -> None:
    class Tenths:
        observation = "begin"

        def __init__(self) -> None:
            self.steps = 0

        def step(self, action: str) -> StepResult:
            self.steps += 1
            return StepResult("on", action, 0.1, done=self.steps == 10)

    environment = Awkward("x", 0.0)
    environment.start = lambda task_id: Tenths()  # type: ignore[method-assign,assignment,return-value]
    assert sum([0.1] * 10) < environment.info.max_reward
    assert last(with_feedback(environment, Feedback.UNARY), "good", ["a"] * 10).feedback == RIGHT


def test_what_is_no_result_is_left_to_the_server_to_report() -> None:
    assert with_feedback(Awkward("x", 0.0), Feedback.UNARY).start("no-result").step("a") is None


def test_full_feedback_costs_nothing() -> None:
    environment = Awkward("x", 0.0)
    assert with_feedback(environment, Feedback.FULL) is environment
