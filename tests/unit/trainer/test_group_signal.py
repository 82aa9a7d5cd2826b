"""A group has a signal where its data have a gradient: of every algorithm, whatever it trains on."""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mulligan.common.experience import Experience
from mulligan.common.inference import SamplingParams
from mulligan.common.rewards import differ
from mulligan.trainer.group_signal import moves, rounded
from mulligan.trainer.harness import Harness
from mulligan.trainer.settings import RunSettings
from mulligan.trainer.step import AlgorithmFailed, StepRunner
from tests.support.fakes import FakeEnvironment, FakeLearner, FakeMemory, FakePolicy


async def runner(first: str, algorithm: dict[str, Any], **run: Any) -> StepRunner:
    """All first attempts say `first`; later ones are right or wrong as their seed has it."""

    def says(system: str, last: str, sampling: SamplingParams) -> str:
        if system == "solve":
            return first
        return "go" if zlib.crc32(str(sampling.seed).encode()) % 2 else "no"

    plain = {"environment": "fake", "algorithm": algorithm, "rollout": {"rollouts_per_task": 4}, "seed": 5} | run
    environment, policy = FakeEnvironment({"t0": "go"}), FakePolicy(says)
    harness = Harness(environment, policy, await environment.describe("fake"), await policy.info(), "x", 0)
    settings = RunSettings.model_validate(plain)
    return StepRunner("run", settings, harness, FakeMemory(), FakeLearner() if settings.trains else None)


@pytest.mark.parametrize(
    ("first", "algorithm", "expected"),
    [
        ("no", {"name": "rlvr"}, False),
        ("no", {"name": "rlvr", "advantage": "raft"}, False),
        ("no", {"name": "rlvr", "advantage": "turn_level"}, False),
        ("no", {"name": "erl"}, True),
        ("no", {"name": "erl", "distillation_weight": 0}, True),
        ("no", {"name": "raw_retry"}, True),
        ("no", {"name": "try_again"}, True),
        ("no", {"name": "rltf"}, True),
        ("no", {"name": "critique_grpo"}, True),
        ("no", {"name": "hindsight"}, True),
        ("no", {"name": "hindsight", "bad_weight": 0}, False),
        ("no", {"name": "sdpo"}, True),
        ("no", {"name": "dpo_pairs"}, True),
        ("no", {"name": "chain_sft"}, True),
        ("no", {"name": "context_distillation", "knowledge": "reflection"}, True),
        ("no", {"name": "reflect_retry_reward", "reflections": 4}, True),
        ("no", {"name": "expert_iteration"}, False),
        ("no", {"name": "nft"}, False),
        ("go", {"name": "rlvr"}, False),
        ("go", {"name": "rlvr", "advantage": "raft"}, True),
        ("go", {"name": "rlvr", "advantage": "raft", "first_weight": 0}, False),
        ("go", {"name": "erl"}, False),
        ("go", {"name": "hindsight"}, True),
        ("go", {"name": "sdpo"}, True),
        ("go", {"name": "expert_iteration"}, True),
        ("go", {"name": "ufo", "advantage": "raft"}, True),
        ("go", {"name": "nft"}, False),
    ],
)
@pytest.mark.parametrize("kl", [0.0, 0.1])
async def test_a_group_of_equal_first_rewards(first: str, algorithm: dict[str, Any], expected: bool, kl: float) -> None:
    made = await runner(first, algorithm, loss={"kl_coefficient": kl})
    group = await made.sample(0, ["t0"], 0)
    assert not differ(one["first"].reward for one in group)
    assert made.has_signal(group) is expected
    if algorithm["name"] != "nft":  # its data have a gradient that is nearly 0
        assert moves(made.training_data(group)[0], made.settings.loss) is expected
    assert made.metrics(group)["groups_with_signal"] == expected


@given(st.lists(st.sampled_from([0.0, 1e-9, 0.1, 0.1 + 1e-8, 0.5, 1 - 1e-9, 1.0, 1.0 + 1e-9]), min_size=1, max_size=4))
async def test_policy_gradients_by_grpo_go_by_different_rewards_as_ever(rewards: list[float]) -> None:
    """What differs by rounding alone is no signal, although GRPO divides by the standard deviation."""
    made = await runner("no", {"name": "rlvr"})
    sampled = await made.sample(0, ["t0"], 0)
    group = [rewarded(one, reward) for one, reward in zip(sampled, rewards, strict=False)]
    assert made.has_signal(group) is differ(rewards)


def rewarded(one: Experience, reward: float) -> Experience:
    first = one["first"]
    return replace(one, samples=(replace(first, reward=reward, turns=(replace(first.turns[0], reward=reward),)),))


async def test_rewards_that_differ_by_rounding_become_the_least_of_them() -> None:
    made = await runner("no", {"name": "rlvr"})
    sampled = await made.sample(0, ["t0"], 0)
    told = [0.5, 0.5 + 1e-9, 1.0, 0.5 - 1e-9]
    group = [rewarded(one, reward) for one, reward in zip(sampled, told, strict=True)]
    least = told[3]
    assert [one["first"].reward for one in rounded(group)] == [least, least, 1.0, least]
    assert rounded(sampled) is sampled


async def test_what_cannot_be_trained_on_is_no_signal() -> None:
    made = await runner("no", {"name": "rlvr"})
    sampled = await made.sample(0, ["t0"], 0)
    group = [rewarded(one, float(place)) for place, one in enumerate(sampled)]
    assert made.has_signal(group)
    bare = [replace(one, samples=(replace(one["first"], sequences=()),)) for one in group]
    assert not made.has_signal(bare)


async def test_without_a_learner_a_group_teaches_what_it_leaves_in_the_memory() -> None:
    for algorithm, expected in (
        ({"name": "erl"}, True),
        ({"name": "erl", "memory_writes": "none"}, False),
        ({"name": "rlvr"}, False),
        ({"name": "rlvr", "memory_episodes": True}, True),
    ):
        made = await runner("no", algorithm, learner="none")
        group = await made.sample(0, ["t0"], 0)
        assert made.has_signal(group) is expected, algorithm
        await made.memorise(group)
        assert bool(made.memory.entries) is expected, algorithm  # type: ignore[attr-defined]


async def test_a_group_is_trained_for_once_however_often_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    made = await runner("no", {"name": "erl"})
    group = await made.sample(0, ["t0"], 0)
    train = Mock(wraps=made.algorithm.train)
    monkeypatch.setattr(made.algorithm, "train", train)
    assert [made.has_signal(list(group)) for _ in range(3)] == [True] * 3
    made.metrics(group)
    assert train.call_count == 1


async def test_what_is_no_datum_is_the_algorithms_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    made = await runner("no", {"name": "rlvr"})
    group = await made.sample(0, ["t0"], 0)
    monkeypatch.setattr(made.algorithm, "train", lambda groups, settings: [None])
    with pytest.raises(AlgorithmFailed, match="algorithm 'rlvr' gave a NoneType among its data; expected Datum alone"):
        made.has_signal(group)
