"""The same questions in several contexts."""

from __future__ import annotations

from typing import Any

import pytest

from mulligan.common.errors import DomainError
from mulligan.common.inference import SamplingParams
from tests.support.fakes import FakeEnvironment, FakePolicy
from tests.support.measuring import measured

CONTEXTS = ("none", "other_examples", "community", "examples", "both")
TASKS = {f"{question}/{context}": "go" for question in "pqrs" for context in CONTEXTS}
TAGS = {task: dict(zip(("question", "context"), task.split("/"), strict=True)) for task in TASKS}
RIGHT = {"none": "p", "other_examples": "", "community": "pq", "examples": "pqr", "both": "pqrs"}


def says(system: str, last: str, sampling: SamplingParams) -> str:
    question, _, context = last.removeprefix("board ").partition("/")
    return "go" if question in RIGHT[context] else "no"


async def test_accuracy_and_gain_of_each_context() -> None:
    policy = FakePolicy(says)
    found = await measured(FakeEnvironment(TASKS), policy, {"name": "steerability", "samples": 2}, tags=TAGS)
    assert found.metrics == pytest.approx(
        {
            "steerability/accuracy_none": 0.25,
            "steerability/accuracy_other_examples": 0.0,
            "steerability/accuracy_community": 0.5,
            "steerability/accuracy_examples": 0.75,
            "steerability/accuracy_both": 1.0,
            "steerability/gain_other_examples": -0.25,
            "steerability/gain_community": 0.25,
            "steerability/gain_examples": 0.5,
            "steerability/gain_both": 0.75,
        }
    )
    own = [sampling for _, sampling in policy.calls if sampling.temperature == 0.75]
    assert len(own) == 2 * len(TASKS) and {(one.top_p, one.top_k) for one in own} == {(0.9, 0)}


async def test_a_question_that_lacks_a_context_does_not_count() -> None:
    tasks = {task: answer for task, answer in TASKS.items() if task != "q/both"}
    table = {"name": "steerability", "baseline": "examples"}
    found = await measured(FakeEnvironment(tasks), FakePolicy(says), table, tags=TAGS)
    assert found.metrics["steerability/accuracy_community"] == pytest.approx(1 / 3)
    assert found.metrics["steerability/gain_both"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("tags", "settings", "words"),
    [
        ({}, {}, "no tags 'context' and 'question'"),
        ({task: {"context": "none", "question": task} for task in TASKS}, {}, "in several contexts"),
        (TAGS, {"baseline": "vanilla"}, "no test task is in the context 'vanilla' (baseline); there are: none, other"),
        ({task: {**tags, "question": task} for task, tags in TAGS.items()}, {}, "no question is there in all contexts"),
    ],
)
async def test_an_environment_without_contexts_is_refused(tags: Any, settings: dict[str, Any], words: str) -> None:
    policy = FakePolicy(says)
    with pytest.raises(DomainError, match=r"protocols\[0\]\.name: 'steerability' cannot be measured") as caught:
        await measured(FakeEnvironment(TASKS), policy, {"name": "steerability", **settings}, tags=tags)
    assert words in caught.value.message and not policy.calls
