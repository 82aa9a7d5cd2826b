"""Refusals: of two tasks without an answer and three with one."""

from __future__ import annotations

import pytest

from mulligan.common.errors import DomainError, Reason
from mulligan.common.inference import SamplingParams
from tests.support.fakes import FakeEnvironment, FakePolicy
from tests.support.measuring import measured

ANSWERS = {"a": "go", "b": "go", "c": "go", "none": "refused", "nil": "refused", "untagged": "go"}
TAGS = {task: {"answerable": str(answer == "go").lower()} for task, answer in ANSWERS.items() if task != "untagged"}


def says(system: str, last: str, sampling: SamplingParams) -> str:
    """Solves a, refuses b and none, fails at the others."""
    task = last.removeprefix("board ")
    return {"a": "go", "b": "I don\u2019t know. ", "none": "refused"}.get(task, "no")


async def test_refusals_accuracy_and_false_refusals() -> None:
    found = await measured(FakeEnvironment(ANSWERS), FakePolicy(says), {"name": "refusal", "samples": 2}, tags=TAGS)
    assert found.metrics == pytest.approx(
        {"refusal/refusals": 1 / 2, "refusal/accuracy": 1 / 3, "refusal/false_refusals": 1 / 3}
    )


async def test_another_reading_of_refusals() -> None:
    table = {"name": "refusal", "read_as": ["NO"]}
    found = await measured(FakeEnvironment(ANSWERS), FakePolicy(says), table, tags=TAGS)
    assert found.metrics["refusal/false_refusals"] == pytest.approx(1 / 3)


async def test_without_answerable_tasks_there_are_refusals_alone() -> None:
    environment = FakeEnvironment({"none": "refused"})
    found = await measured(environment, FakePolicy(says), {"name": "refusal"}, tags=TAGS)
    assert found.metrics == {"refusal/refusals": 1.0}


@pytest.mark.parametrize("tags", [{}, {"a": {"answerable": "true"}}])
async def test_an_environment_where_all_has_an_answer_is_refused(tags: dict[str, dict[str, str]]) -> None:
    policy = FakePolicy(says)
    with pytest.raises(DomainError) as caught:
        await measured(FakeEnvironment(ANSWERS), policy, {"name": "turns"}, {"name": "refusal"}, tags=tags)
    assert caught.value.reason is Reason.INVALID_SETTING and caught.value.metadata == {"field": "protocols[1].name"}
    assert "'refusal' cannot be measured in 'fake'" in caught.value.message and not policy.calls
