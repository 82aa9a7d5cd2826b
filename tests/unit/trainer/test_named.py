"""An actor that is trained, a reflector that is not, and any policy that is measured, each under its name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mulligan.common.errors import DomainError, Reason
from mulligan.common.inference import Continuation, Feature, SamplingParams
from mulligan.common.types import Outcome, Split, TaskInfo
from mulligan.trainer.algorithms.erl import REFLECTION
from mulligan.trainer.data import PolicyGradient
from mulligan.trainer.evaluation import evaluate
from mulligan.trainer.folder import RunState
from mulligan.trainer.harness import Harness
from mulligan.trainer.journal import journal_file, read_experiences
from mulligan.trainer.manager import RunManager
from mulligan.trainer.player import Player
from mulligan.trainer.run import ServicePorts
from mulligan.trainer.sampling import NamedPolicy
from mulligan.trainer.settings import EvaluationSettings, RolloutSettings, RunSettings
from mulligan.trainer.step import StepRunner
from tests.support.fakes import FakeEnvironment, FakeLearner, FakeMemory, FakePolicy
from tests.support.playing import play_episode

TEXT_ALONE = frozenset({Feature.STREAM, Feature.TOOLS})


def says(text: str, **changes: Any) -> FakePolicy:
    return FakePolicy(lambda system, last, sampling: text, **changes)


def service(actor: FakePolicy, **others: FakePolicy) -> FakePolicy:
    """A policy service whose default policy is the actor."""
    return replace(actor, others=others)


async def chains(policy: FakePolicy, settings: RunSettings, learner: FakeLearner) -> tuple[StepRunner, list[Any]]:
    environment = FakeEnvironment({"t0": "go"})
    actor = await NamedPolicy.open(policy, settings.policies.actor)
    reflector = await NamedPolicy.open(policy, settings.policies.reflector)
    info = await environment.describe("fake")
    harness = Harness(environment, actor, info, actor.info, "x", 0, {"reflector": reflector} if reflector else {})
    runner = StepRunner("run", settings, harness, FakeMemory(), learner)
    return runner, await runner.sample(0, ["t0"], 0)


def settings(**policies: str) -> RunSettings:
    return RunSettings.model_validate(
        {"environment": "fake", "policies": policies, "rollout": {"rollouts_per_task": 2, "concurrency": 1}}
    )


@pytest.mark.parametrize("features", [frozenset(Feature), TEXT_ALONE])
async def test_a_reflector_writes_and_is_not_trained(features: frozenset[Feature]) -> None:
    """Without token ids there is nothing that could be trained on; with them, they are another model's."""
    told = FakePolicy(lambda system, last, sampling: "go" if "be wise" in system else "no")
    wise = says("be wise", version=7, features=features)
    policy = service(told, wise=wise)
    learner = FakeLearner()
    runner, experiences = await chains(policy, settings(reflector="wise"), learner)
    for chain in experiences:
        reflection = chain.sample("reflection")
        assert (reflection.text, reflection.policy, reflection.policy_version) == ("be wise", "wise", 7)
        assert reflection.outcome is Outcome.COMPLETED and reflection.reward == chain["second"].reward == 1
        assert bool(reflection.sequences[0].token_ids) == (Feature.TOKEN_IDS in features)
    assert len(wise.calls) == 2 and len(policy.calls) == 4
    await runner.learn(0, experiences)
    branches = {datum.branch for step in learner.steps for datum in step}
    assert branches == {"first", "second", "distilled"}
    await runner.memorise(experiences)
    assert [entry.provenance.policy_version for entry in runner.memory.entries] == [7, 7]  # type: ignore[attr-defined]


async def test_what_the_actor_reflects_is_trained_on() -> None:
    policy = says("no")
    learner = FakeLearner()
    environment = FakeEnvironment({"t0": "go"})
    actor = await NamedPolicy.open(policy, "")
    harness = Harness(environment, actor, await environment.describe("fake"), actor.info, "x", 0)
    runner = StepRunner("run", settings(), harness, FakeMemory(), learner)
    await runner.learn(0, await runner.sample(0, ["t0"], 0))
    data = learner.branch(REFLECTION)
    assert len(data) == 2 and all(isinstance(datum.objective, PolicyGradient) for datum in data)


async def test_an_episode_is_one_session_and_a_reflection_another() -> None:
    policy = says("no")
    environment = FakeEnvironment({"t0": "go"}, turns=3)
    actor = await NamedPolicy.open(policy, "actor")
    harness = Harness(environment, actor, await environment.describe("fake"), actor.info, "x", 0)
    await StepRunner("run", settings(), harness, FakeMemory(), FakeLearner()).sample(0, ["t0"], 0)
    sessions = [options.session_id for options in policy.options[:7]]
    first, reflection, second = (f"run-s0-t0-r0-{part}" for part in ("first-x-0", "reflection-x", "second-x-0"))
    assert sessions == [first] * 3 + [reflection] + [second] * 3
    assert len({options.request_id for options in policy.options}) == len(policy.options)
    assert {options.policy for options in policy.options} == {"actor"}


async def measured(policy: FakePolicy, name: str, turns: int = 3) -> list[Any]:
    environment = FakeEnvironment({"t0": "go"}, turns=turns)
    named = await NamedPolicy.open(policy, name)
    harness = Harness(environment, named, await environment.describe("fake"), named.info, "x", 0)
    tasks = [TaskInfo("t0", Split.TEST, 1.0)]
    return await evaluate(Player(harness, tasks, EvaluationSettings(samples=1, top_k=0), RolloutSettings(), 0))


async def test_a_policy_without_token_ids_is_measured_by_messages() -> None:
    hosted = says("go", features=TEXT_ALONE)
    (attempt,) = await measured(service(says("no"), hosted=hosted), "hosted")
    assert attempt.reward == 1 and len(hosted.calls) == 3
    assert [len(prompt) for prompt, _ in hosted.calls if isinstance(prompt, tuple)] == [2, 4, 6]
    assert all(sampling.seed is None for _, sampling in hosted.calls), "its engine takes no seed"


@pytest.mark.parametrize("change", [{"rewrites_history": True}, {"features": TEXT_ALONE}])
async def test_a_model_that_is_swapped_in_is_played_as_it_needs(change: dict[str, Any]) -> None:
    """It came after the policy had been asked what it is."""
    policy = says("go")
    environment = FakeEnvironment({"t0": "go"}, turns=3)
    named = await NamedPolicy.open(policy, "")
    for name, value in change.items():
        setattr(policy, name, value)
    harness = Harness(environment, named, await environment.describe("fake"), named.info, "x", 0)
    attempt = await play_episode(harness, "a", "t0", "solve", SamplingParams())
    assert attempt.outcome is Outcome.COMPLETED and attempt.error == "" and len(attempt.sequences) == 3
    assert not any(isinstance(prompt, Continuation) for prompt, _ in policy.calls)


def manager(folder: Path, policy: FakePolicy, learner: FakeLearner) -> RunManager:
    async def open_learner(run_id: str, settings: RunSettings) -> FakeLearner:
        return learner

    return RunManager(folder, ServicePorts(FakeEnvironment({"t0": "go"}), policy, FakeMemory(), open_learner))


async def test_any_policy_is_evaluated(tmp_path: Path) -> None:
    runs = manager(tmp_path, service(says("no"), hosted=says("go", version=3, features=TEXT_ALONE)), FakeLearner())
    settings = EvaluationSettings(samples=2, top_k=0)
    rollout = RolloutSettings()
    for name, success, version in (("", 0, 0), ("actor", 0, 0), ("hosted", 1, 3)):
        event, served = await runs.evaluate("fake", settings, rollout, 0, 1.0, name)
        assert (event.success, event.attempts, served) == (success, 2, version)
    with pytest.raises(DomainError) as caught:
        await runs.evaluate("fake", settings, rollout, 0, 1.0, "nobody")
    assert caught.value.reason is Reason.UNKNOWN_POLICY
    with pytest.raises(DomainError) as caught:
        await runs.evaluate("fake", EvaluationSettings(top_k=20), rollout, 0, 1.0, "hosted")
    assert caught.value.metadata == {"field": "top_k"}
    await runs.close()


RUN = {"environment": "fake", "steps": 1, "rollout": {"rollouts_per_task": 2, "tasks_per_step": 1}}


async def ended(runs: RunManager, run_id: str, **changes: Any) -> str:
    """The error of a run that is driven to its end; "" when it completed."""
    runs.start(run_id, RunSettings.model_validate(RUN | changes))
    assert runs._active is not None
    await runs._active
    record = runs.record(run_id)
    assert (record.state is RunState.COMPLETED) == (record.error == "")
    return record.error


async def test_a_run_trains_its_actor_with_another_reflector(tmp_path: Path) -> None:
    policy = service(says("no", canary_difference=1e-6), wise=says("be wise", features=TEXT_ALONE))
    runs = manager(tmp_path, policy, FakeLearner())
    assert await ended(runs, "one", policies={"actor": "actor", "reflector": "wise"}) == ""
    chain = read_experiences(journal_file(tmp_path / "one" / "journal", 0))[0]
    assert chain.sample("reflection") is not None and (
        chain["reflection"].policy,
        chain["reflection"].text,
    ) == ("wise", "be wise")
    assert policy.others["wise"].updates == [] and len(policy.updates) == 2
    assert runs.run("one").events.steps()[0].metrics["canary_difference"] == 1e-6
    await runs.close()


@pytest.mark.parametrize(
    ("policies", "words"),
    [
        ({"actor": "wise"}, "policies.actor: policy 'wise' .fake. cannot be trained: no token_ids"),
        ({"reflector": "actor"}, "policies.reflector: it is the actor"),
        ({"actor": "nobody"}, "UNKNOWN_POLICY: policies.actor: there is no policy 'nobody'"),
        ({"reflector": "nobody"}, "UNKNOWN_POLICY: policies.reflector: there is no policy 'nobody'"),
        ({"judge": "nobody"}, "UNKNOWN_POLICY: policies.judge: there is no policy 'nobody'"),
    ],
)
async def test_a_run_with_a_policy_that_will_not_do_ends_at_once(
    tmp_path: Path, policies: dict[str, str], words: str
) -> None:
    policy = service(says("no"), wise=says("be wise", features=TEXT_ALONE))
    runs = manager(tmp_path, policy, FakeLearner())
    with pytest.raises(AssertionError, match=words):
        assert await ended(runs, "one", policies=policies) == ""
    assert policy.updates == [] and policy.calls == []
    await runs.close()


async def test_a_run_of_another_model_than_the_policys_ends_at_once(tmp_path: Path) -> None:
    policy = says("no")
    runs = manager(tmp_path, policy, FakeLearner(fingerprint="another"))
    error = await ended(runs, "one", model={"source": "their/model"})
    assert "MODEL_MISMATCH" in error and "serves fake, and this run trains their/model" in error
    assert policy.updates == []
    await runs.close()
