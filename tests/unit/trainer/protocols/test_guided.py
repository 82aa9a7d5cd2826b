"""A text in the system prompt."""

from __future__ import annotations

import pytest

from mulligan.common.errors import DomainError
from mulligan.common.inference import SamplingParams
from tests.support.fakes import FakeEnvironment, FakePolicy, timeout
from tests.support.measuring import measured

TABLE = {"name": "guided", "text": "answer go"}


def obeys(system: str, last: str, sampling: SamplingParams) -> str:
    """Right at a by itself, and right at a and b when it is told what to answer."""
    return "go" if last[-1] == "a" or (system.startswith("answer go\n") and last[-1] == "b") else "no"


async def test_success_with_the_text_and_what_it_gains() -> None:
    policy = FakePolicy(obeys)
    found = await measured(FakeEnvironment(dict.fromkeys("abcd", "go")), policy, TABLE)
    assert found.metrics == pytest.approx({"guided/success": 2 / 4, "guided/gain": 1 / 4})
    assert found.success == pytest.approx(1 / 4), "the evaluation's own attempts are without the text"


async def test_attempts_without_a_reward_do_not_count() -> None:
    def fails(episode_id: str) -> None:
        if episode_id.startswith("evaluation-t1"):
            raise timeout()

    environment = FakeEnvironment(dict.fromkeys("abc", "go"), fail=fails)
    found = await measured(environment, FakePolicy(obeys), TABLE)
    assert {name: value for name, value in found.metrics.items() if "excluded" not in name} == pytest.approx(
        {"guided/success": 1 / 2, "guided/gain": 0.0}
    )


async def test_a_text_is_needed() -> None:
    with pytest.raises(DomainError, match="text"):
        await measured(FakeEnvironment({"a": "go"}), FakePolicy(obeys), {"name": "guided"})
