"""Tries in one conversation: a policy that heeds what the environment says, and one that only tries again."""

from __future__ import annotations

import pytest

from mulligan.common.inference import SamplingParams
from tests.support.fakes import FakeEnvironment, FakePolicy
from tests.support.measuring import measured


def heeds(system: str, last: str, sampling: SamplingParams) -> str:
    """Solves t1 at once, t0 after feedback, t2 after any further try, and t3 never."""
    if "t1" in last or ("wrong" in last and "t0" in last) or ("gain" in last and "t2" in last):
        return "go"
    return "no"


async def test_feedback_against_trying_again() -> None:
    environment = FakeEnvironment({f"t{number}": "go" for number in range(4)})
    found = await measured(environment, FakePolicy(heeds), {"name": "turns", "tries": 3})
    assert found.metrics == pytest.approx(
        {
            "turns/guided_success@1": 1 / 4,
            "turns/guided_success@2": 3 / 4,
            "turns/guided_success@3": 3 / 4,
            "turns/guided_corrections": (1 + 0 + 1) / 3,
            "turns/guided_turns": (2 + 1 + 2) / 3,
            "turns/unguided_success@1": 1 / 4,
            "turns/unguided_success@2": 2 / 4,
            "turns/unguided_success@3": 2 / 4,
            "turns/unguided_corrections": (0 + 1) / 2,
            "turns/unguided_turns": (1 + 2) / 2,
            "turns/gain": 1 / 4,
        }
    )


async def test_the_turns_of_all_tries_count() -> None:
    def says(system: str, last: str, sampling: SamplingParams) -> str:
        return "go" if "go" in last or "wrong" in last else "no"

    environment = FakeEnvironment({"t0": "go"}, turns=3)
    found = await measured(environment, FakePolicy(says), {"name": "turns", "tries": 2, "label": "t", "samples": 2})
    assert found.metrics["t/guided_turns"] == 6.0 and found.metrics["t/guided_corrections"] == 1.0
    assert "t/unguided_turns" not in found.metrics, "no attempt succeeded"
    assert (found.metrics["t/unguided_success@2"], found.metrics["t/gain"]) == (0.0, 1.0)


async def test_the_first_try_is_the_same_with_and_without_feedback() -> None:
    policy = FakePolicy(lambda system, last, sampling: "go" if (sampling.seed or 0) % 3 == 0 else "no")
    environment = FakeEnvironment({f"t{number}": "go" for number in range(9)})
    found = await measured(environment, policy, {"name": "turns", "samples": 4})
    assert 0 < found.metrics["turns/guided_success@1"] == found.metrics["turns/unguided_success@1"] < 1
