"""What is wrong with a run is told before a learner is created, which on a GPU is a loaded model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mulligan.common.errors import DomainError, Reason
from mulligan.common.inference import Feature, SamplingParams
from mulligan.trainer.folder import RunState
from mulligan.trainer.interfaces import LearnerPort
from mulligan.trainer.manager import RunManager
from mulligan.trainer.run import Run
from mulligan.trainer.settings import EvaluationSettings, RolloutSettings, RunSettings
from tests.support.fakes import FakePolicy
from tests.unit.trainer.test_run import World


async def no_learner(run_id: str, settings: RunSettings) -> LearnerPort:
    raise AssertionError("a learner was created")


def without_learner(world: World) -> Run:
    run = world.run()
    run.services = replace(run.services, open_learner=no_learner)
    return run


@pytest.mark.parametrize(
    ("changes", "policy", "field", "words"),
    [
        ({"algorithm": {"name": "spar"}}, {}, "algorithm.name", "environment 'fake' has no forks"),
        ({"algorithm": {"name": "chain_sft"}}, {"rewrites_history": True}, "algorithm.name", "rewrites earlier turns"),
        ({"policies": {"reflector": "nobody"}}, {}, "policies.reflector", "there is no policy 'nobody'"),
        ({"policies": {"judge": "nobody"}}, {}, "policies.judge", "there is no policy 'nobody'"),
        ({"policies": {"actor": "nobody"}}, {}, "policies.actor", "there is no policy 'nobody'"),
        (
            {"deterministic": False, "policies": {"evaluator": "nobody"}},
            {},
            "policies.evaluator",
            "there is no policy 'nobody'",
        ),
        (
            {"deterministic": False, "policies": {"evaluator": "actor"}},
            {},
            "policies.evaluator",
            "it is the actor",
        ),
        (
            {"evaluation": {"protocols": [{"name": "variants", "writer": "nobody", "operators": ["length"]}]}},
            {},
            "evaluation.protocols[0].writer",
            "there is no policy 'nobody'",
        ),
        (
            {"evaluation": {"protocols": [{"name": "refusal"}]}},
            {},
            "evaluation.protocols[0].name",
            "cannot be measured in 'fake'",
        ),
        ({}, {"frozen": True}, "policies.actor", "is frozen"),
        ({}, {"features": frozenset(Feature) - {Feature.LOG_PROBS}}, "policies.actor", "cannot be trained"),
        ({}, {"features": frozenset(Feature) - {Feature.TOP_K}}, "evaluation.top_k", "has no top_k"),
        ({}, {"dtype": "float16"}, "model.dtype", "the dtypes differ"),
    ],
)
async def test_no_learner_is_created_for_a_run_that_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    policy: dict[str, Any],
    field: str,
    words: str,
) -> None:
    world = World(tmp_path, **changes)
    for name, value in policy.items():
        setattr(world.policy, name, value)
    if "dtype" in policy:
        _with_strict_canary(world.policy, monkeypatch)
    with pytest.raises(DomainError) as caught:
        await without_learner(world).train()
    assert caught.value.reason in (Reason.INVALID_SETTING, Reason.UNKNOWN_POLICY)
    assert caught.value.metadata["field"] == field and words in caught.value.message
    assert not world.policy.calls


def _with_strict_canary(policy: FakePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    told = policy.info

    async def info(name: str = "") -> Any:
        return replace(await told(name), canary_tolerance=1e-3)

    monkeypatch.setattr(policy, "info", info)


async def test_no_learner_is_created_for_an_environment_that_the_policy_cannot_play(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.environment.player_count = 2
    with pytest.raises(DomainError, match="a game of 2 players"):
        await without_learner(world).train()


async def test_an_evaluation_that_is_refused_creates_none_either(tmp_path: Path) -> None:
    world = World(tmp_path)
    await world.run().train()
    world.folder.write_record(world.folder.record().now(RunState.STOPPED))
    manager = RunManager(tmp_path, without_learner(world).services)
    try:
        world.policy.features = frozenset(Feature) - {Feature.TOP_K}
        with pytest.raises(DomainError, match="top_k"):
            await manager.evaluate("fake", EvaluationSettings(), RolloutSettings(), 0, 1.0, run_id="run")
        with pytest.raises(DomainError, match="top_k"):
            await manager.publish("run")
    finally:
        await manager.close()


async def test_a_chain_of_unknown_tokens_is_refused_without_a_learner_too(tmp_path: Path) -> None:
    """Such a run completed, and its chains had no tokens."""
    world = World(tmp_path, algorithm={"name": "chain_sft"}, learner="none")
    world.policy.features = frozenset(Feature) - {Feature.TOKEN_IDS}
    with pytest.raises(DomainError, match=r"'chain_sft' trains on several turns .* reports no token_ids") as caught:
        await world.run().train()
    assert caught.value.metadata["field"] == "algorithm.name"


async def test_the_checked_policies_are_those_that_speak(tmp_path: Path) -> None:
    def reflects(system: str, last: str, sampling: SamplingParams) -> str:
        return "<prompt>from another</prompt>"

    world = World(tmp_path, policies={"reflector": "other"}, steps=1)
    world.policy.others["other"] = other = FakePolicy(reflects)
    await world.run().train()
    assert other.calls and any(entry.text == "from another" for entry in world.memory.entries)
