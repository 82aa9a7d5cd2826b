"""pass@k against the definition: the share of the subsets of k attempts in which one succeeds."""

from __future__ import annotations

from itertools import combinations
from statistics import fmean

import pytest

from mulligan.common.inference import SamplingParams
from mulligan.trainer.protocols.pass_at_k import pass_at
from tests.support.fakes import FakeEnvironment, FakePolicy, timeout
from tests.support.measuring import measured, seed_of

SOLVED = {seed_of("t0", 0), seed_of("t1", 1), seed_of("t1", 2)}


def policy() -> FakePolicy:
    """Solves t0 in its first attempt of four, and t1 in its second and third."""

    def says(system: str, last: str, sampling: SamplingParams) -> str:
        return "go" if sampling.seed in SOLVED else "no"

    return FakePolicy(says)


@pytest.mark.parametrize("attempts", range(1, 7))
def test_it_is_the_share_of_subsets_with_a_success(attempts: int) -> None:
    for successes in range(attempts + 1):
        solved = [number < successes for number in range(attempts)]
        for k in range(1, attempts + 1):
            assert pass_at(k, attempts, successes) == pytest.approx(fmean(map(any, combinations(solved, k))))


async def test_the_mean_over_tasks() -> None:
    found = await measured(FakeEnvironment({"t0": "go", "t1": "go"}), policy(), {"name": "pass_at_k"})
    assert found.metrics == pytest.approx(
        {
            "pass_at_k/pass@1": (1 / 4 + 2 / 4) / 2,
            "pass_at_k/pass@2": (1 / 2 + 5 / 6) / 2,
            "pass_at_k/pass@4": 1.0,
        }
    )
    assert (found.success, found.attempts) == (0.5, 2), "the share of successes is as it is without protocols"


async def test_the_attempts_of_the_evaluation_are_among_its_own() -> None:
    played = policy()
    table = {"name": "pass_at_k", "k": [4], "samples": 6}
    found = await measured(FakeEnvironment({"t0": "go", "t1": "go"}), played, table, samples=4)
    assert len(played.calls) == 2 * 6
    assert found.metrics == pytest.approx({"pass_at_k/pass@4": (1 - 5 / 15 + 1 - 1 / 15) / 2})


async def test_attempts_without_a_reward_do_not_count() -> None:
    def fails(episode_id: str) -> None:
        if episode_id.startswith(("evaluation-t0-r1", "evaluation-t0-r2", "evaluation-t1-r3")):
            raise timeout()

    environment = FakeEnvironment({"t0": "go", "t1": "go"}, fail=fails)
    found = await measured(environment, policy(), {"name": "pass_at_k", "k": [1, 3, 4]})
    assert found.metrics == pytest.approx(
        {
            "pass_at_k/pass@1": (1 / 2 + 2 / 3) / 2,
            "pass_at_k/pass@3": 1.0,  # of t1 alone
            "pass_at_k/excluded": 3.0,
        }
    )
