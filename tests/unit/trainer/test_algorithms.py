"""Algorithms as plug-ins: one of somebody else's, errors of its own, waiting for siblings, what is journaled of it."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from dataclasses import replace
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import structs

from mulligan.common.errors import DomainError, Reason
from mulligan.common.types import Outcome
from mulligan.trainer.batch import policy_gradient
from mulligan.trainer.data import Distillation, PolicyGradient
from mulligan.trainer.folder import RunFolder, RunState
from mulligan.trainer.harness import Harness
from mulligan.trainer.journal import StepJournal, StepStarted, journal_file, read_experiences
from mulligan.trainer.manager import RunManager
from mulligan.trainer.objective import Objective
from mulligan.trainer.objectives.negative_aware import NegativeAware
from mulligan.trainer.objectives.transfer import Transfer
from mulligan.trainer.run import ServicePorts
from mulligan.trainer.servicer import RunServicer
from mulligan.trainer.settings import ALGORITHMS, RunSettings
from mulligan.trainer.step import AlgorithmFailed, StepRunner
from mulligan.trainer.v1 import run_service_pb2
from mulligan.trainer.wire import foreign_from_proto, settings_from_proto, settings_to_proto, validated
from tests.support.fakes import FakeEnvironment, FakeLearner, FakeMemory, FakePolicy
from tests.support.waiting import until

untyped: Any = policy_gradient
BEST_OF_GROUP = '''
"""Each member plays, looks at what the others did, and plays again under a hint if it is not among the best."""

from pydantic import Field

from mulligan.trainer.batch import distillation, policy_gradient
from mulligan.trainer.settings import AlgorithmSettings


class Settings(AlgorithmSettings):
    name: str = "best_of_group"
    hint: str = "hint"
    weight: float = Field(2.0, ge=0)


async def play(member):
    first = await member.attempt("first")
    others = await member.siblings("first")
    if member.settings.hint == "break":
        raise KeyError("nothing here")
    if first.reward is None or any(other.reward > first.reward for other in others if other.reward is not None):
        again = await member.attempt("hinted", system=member.settings.hint, parent=first)
        verdict = await member.write("verdict", "better?", system="judge", parent=again)
        member.credit(verdict, 0.25, {"form": 0.25})
        await member.under("internalised", again)


def train(groups, settings):
    data = []
    for group in groups:
        for one in group:
            data += policy_gradient(one["first"], 1.0, settings.weight, "first")
            for target in one.targets:
                data += distillation(target, 0.7, 1.0, 1.0, "internalised")
    return data
'''


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An algorithm of somebody else's package; its name."""
    folder = tmp_path / "packages" / "acme"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "best_of_group.py").write_text(BEST_OF_GROUP)
    monkeypatch.syspath_prepend(str(folder.parent))
    yield "acme.best_of_group"
    for name in [name for name in sys.modules if name.partition(".")[0] == "acme"]:
        del sys.modules[name]


def config(name: str, concurrency: int = 1, **algorithm: Any) -> RunSettings:
    rollout = {"tasks_per_step": 1, "rollouts_per_task": 3, "concurrency": concurrency}
    plain = {"environment": "fake", "algorithm": {"name": name, **algorithm}, "rollout": rollout, "steps": 1}
    return validated(RunSettings, plain | {"loss": {"kl_coefficient": 0.0}, "evaluation": {"samples": 1}})


def says(system: str, last: str, sampling: Any) -> str:
    if system == "judge":
        return "much better"
    return "go" if system == "hint" or sampling.seed % 3 == 0 else "no"


async def runner(settings: RunSettings, recorder: Any) -> StepRunner:
    environment = FakeEnvironment({"t0": "go"})
    policy = FakePolicy(says)
    info = await environment.describe("fake")
    harness = Harness(environment, policy, info, await policy.info(), "x", 0)
    return StepRunner("run.1", settings, harness, FakeMemory(), FakeLearner(), recorder)


@pytest.mark.parametrize("concurrency", [1, 2, 8])
async def test_an_algorithm_from_outside_the_tree(outside: str, tmp_path: Path, concurrency: int) -> None:
    settings = config(outside, concurrency, weight=3)
    assert settings_from_proto(settings_to_proto(settings)) == settings, "its own settings cross the wire"
    journal = StepJournal(tmp_path, 0)
    journal.start(StepStarted(0, ["t0"], 0, 0))
    made = await runner(settings, journal)
    async with asyncio.timeout(60):
        sampled = await made.sample(0, ["t0"], 0)
    first = [one["first"].reward for one in sampled]
    assert first == [1.0 if "hinted" not in [s.role for s in one.samples] else 0.0 for one in sampled]
    assert 0 < sum(map(float, map(bool, first))) < 3, "the group has both kinds"
    await made.learn(0, sampled)
    journal.close()
    hinted = [one for one in read_experiences(journal_file(tmp_path, 0)) if one.sample("hinted")]
    for one in hinted:
        assert [sample.role for sample in one.samples] == ["first", "hinted", "verdict"]
        assert one["hinted"].parent_id == one["first"].sample_id and one["hinted"].system == "hint"
        verdict = one["verdict"]
        assert (verdict.text, verdict.reward, verdict.reward_parts) == ("much better", 0.25, {"form": 0.25})
        assert verdict.outcome is Outcome.COMPLETED and not verdict.is_episode
        (target,) = one.targets
        assert target.source_id == one["hinted"].sample_id and target.system == "solve"
        told = [(datum.branch, datum.source_id, datum.objective, datum.weight) for datum in one.trained]
        assert told == [
            ("first", one["first"].sample_id, "policy_gradient", 3.0),
            ("internalised", target.target_id, "distillation", 1.0),
        ]
    metrics = made.metrics(sampled)
    assert metrics["success_hinted"] == 1.0 and metrics["rollouts"] == 3 + 2 * len(hinted)


async def test_a_repeated_step_finds_every_sample_again(outside: str, tmp_path: Path) -> None:
    lives = []
    for _ in range(2):
        journal = StepJournal(tmp_path, 0)
        made = await runner(config(outside), journal)
        lives.append(await made.sample(0, ["t0"], 0))
        journal.close()
        asked = made.harness.policy.calls  # type: ignore[attr-defined]
        assert bool(asked) is (len(lives) == 1), "what was sampled before is not sampled again"
    assert lives[0] == lives[1]


async def test_an_algorithm_that_raises_fails_its_run_with_its_own_traceback(outside: str, tmp_path: Path) -> None:
    environment = FakeEnvironment({"t0": "go"})
    manager = RunManager(tmp_path, ServicePorts(environment, FakePolicy(says), FakeMemory(), opened))
    run = manager.start("broken", config(outside, hint="break"))
    await until(lambda: manager.record("broken").error != "")
    error = manager.record("broken").error
    assert "algorithm 'acme.best_of_group' raised" in error and "KeyError: 'nothing here'" in error
    assert "best_of_group.py" in error and 'raise KeyError("nothing here")' in error
    assert run.events.entries[-1].event.error == error  # type: ignore[union-attr]
    journal = StepJournal(run.folder.journal, 0)
    assert journal.find("broken-s0-t0-r0-first"), "what was sampled is kept"
    journal.close()
    await manager.close()


async def _cancels_its_subtask(*_: Any) -> None:
    subtask = asyncio.create_task(asyncio.sleep(60))
    subtask.cancel()
    await subtask


async def _exits(*_: Any) -> None:
    raise SystemExit(3)


def _is_cancelled(*_: Any) -> None:
    raise asyncio.CancelledError


@pytest.mark.parametrize(
    ("export", "code", "words"),
    [
        ("play", _cancels_its_subtask, "asyncio.exceptions.CancelledError"),
        ("play", _exits, "SystemExit: 3"),
        ("train", _is_cancelled, "asyncio.exceptions.CancelledError"),
    ],
)
async def test_an_algorithm_that_is_cancelled_or_exits_fails_its_run_and_nothing_else(
    outside: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, export: str, code: Any, words: str
) -> None:
    """Nobody asked for it, so the run does not end as if somebody had."""
    monkeypatch.setattr(ALGORITHMS.find(outside), export, code)
    manager = RunManager(tmp_path, ServicePorts(FakeEnvironment({"t0": "go"}), FakePolicy(says), FakeMemory(), opened))
    manager.start("broken", config(outside))
    await until(lambda: manager.record("broken").state is RunState.FAILED)
    error = manager.record("broken").error
    assert "algorithm 'acme.best_of_group' raised" in error and words in error and f"in {code.__name__}" in error
    await manager.close()


async def opened(run_id: str, settings: RunSettings) -> FakeLearner:
    return FakeLearner()


async def test_a_run_whose_algorithm_is_gone_is_refused_by_name_and_hides_no_other(tmp_path: Path) -> None:
    async def open_learner(run_id: str, settings: RunSettings) -> FakeLearner:
        raise AssertionError("nothing is trained")

    for name in ("gone", "other"):
        RunFolder(tmp_path / name).create(name, config("rlvr"))
    folder = RunFolder(tmp_path / "gone")
    algorithm = folder.record().settings["algorithm"] | {"name": "acme.removed", "depth": 2, "advantage": "acme.too"}
    settings = folder.record().settings | {"algorithm": algorithm}
    folder.write_record(structs.replace(folder.record(), settings=settings))
    other = RunFolder(tmp_path / "other")
    other.write_record(other.record().now(RunState.COMPLETED))

    services = ServicePorts(FakeEnvironment({"t0": "go"}), FakePolicy(says), FakeMemory(), open_learner)
    manager = RunManager(tmp_path, services)
    manager.go_on()  # the trainer starts all the same
    problem = "algorithm.name: 'acme.removed' is no algorithm: No module named 'acme"
    assert manager.record("gone").state is RunState.FAILED and problem in manager.record("gone").error
    with pytest.raises(DomainError, match=r"the settings of run gone cannot be read here: algorithm\.name") as caught:
        await manager.resume("gone")
    assert (caught.value.reason, caught.value.metadata["field"]) == (Reason.INVALID_SETTING, "algorithm.name")
    response = await RunServicer(manager).ListRuns(run_service_pb2.ListRunsRequest(), None)
    runs = {run.run_id: run for run in response.runs}
    assert runs["gone"].state == run_service_pb2.RUN_STATE_FAILED and problem in runs["gone"].error
    assert settings_from_proto(runs["other"].config) == other.settings()
    known = foreign_from_proto(runs["gone"].config)
    assert (known.algorithm.name, known.environment, known.rollout) == ("acme.removed", "fake", config("rlvr").rollout)
    await manager.close()


async def test_data_that_no_learner_takes_are_the_algorithms_fault(
    outside: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await runner(config(outside, weight=1e308), StepJournal(tmp_path, 0))
    sampled = await made.sample(0, ["t0"], 0)
    assert made.training_data(sampled)[0], "large is allowed"
    made.settings = config(outside)
    monkeypatch.setattr(made.algorithm, "train", lambda groups, _: policy_gradient(groups[0][0]["first"], 1, nan, "b"))
    with pytest.raises(AlgorithmFailed, match=r"run.1-s0-t0-r0-first: weight: expected a finite number, got nan"):
        made.training_data(sampled)


@pytest.mark.parametrize(
    ("give", "words"),
    [
        (lambda groups, _: None, "gave a NoneType; expected a list of data"),
        (lambda groups, _: [groups[0][0]["first"]], "gave a Sample among its data; expected Datum alone"),
        (
            lambda groups, _: [
                replace(policy_gradient(groups[0][0]["first"], 1.0, 1.0, "b")[0], datum_id="somebody.else")
            ],
            "the datum 'somebody.else' is of no sample or target of the step",
        ),
        (
            lambda groups, _: [replace(policy_gradient(groups[0][0]["first"], 1.0, 1.0, "b")[0], branch="")],
            "gave a datum of the branch ''; expected a name",
        ),
        (
            lambda groups, _: untyped(groups[0][0]["first"], "1", 1.0, "b"),
            "raised\n(?s:.)*TypeError: must be real number, not str",
        ),
        (
            lambda groups, _: untyped(groups[0][0]["first"], 1.0, None, "b"),
            "raised\n(?s:.)*TypeError: must be real number, not NoneType",
        ),
    ],
)
async def test_what_are_no_data_of_the_step_are_the_algorithms_fault(
    outside: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, give: Any, words: str
) -> None:
    made = await runner(config(outside), StepJournal(tmp_path, 0))
    sampled = await made.sample(0, ["t0"], 0)
    monkeypatch.setattr(made.algorithm, "train", give)
    with pytest.raises(AlgorithmFailed, match=f"algorithm 'acme.best_of_group' (?s:.)*{words}"):
        await made.learn(0, sampled)


async def test_numbers_of_other_libraries_are_trained_on_and_journaled(
    outside: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = StepJournal(tmp_path, 0)
    journal.start(StepStarted(0, ["t0"], 0, 0))
    made = await runner(config(outside), journal)

    async def play(member: Any) -> None:
        first = await member.attempt("first")
        member.credit(await member.write("verdict", "well?", parent=first), np.float32(0.5), {"form": np.float64(0.5)})

    def train(groups: Any, settings: Any) -> list[Any]:
        one, other = (untyped(member["first"], 0.0, np.float32(0.5), "b")[0] for member in groups[0][:2])
        values = np.full(sum(other.loss_mask), 0.5, np.float32)
        changed = replace(one.objective, advantage=np.float32(2)), replace(other.objective, advantages=values)
        return [replace(datum, objective=objective) for datum, objective in zip((one, other), changed, strict=True)]

    monkeypatch.setattr(made.algorithm, "play", play)
    monkeypatch.setattr(made.algorithm, "train", train)
    sampled = await made.sample(0, ["t0"], 0)
    await made.learn(0, sampled)
    journal.close()
    read = read_experiences(journal_file(tmp_path, 0))
    assert [(one["verdict"].reward, one["verdict"].reward_parts) for one in read] == [(0.5, {"form": 0.5})] * 3
    [one] = read[0].trained
    [other] = read[1].trained
    assert (one.weight, one.numbers["advantage"], one.values) == (0.5, 2.0, {})
    assert set(other.values["advantages"]) == {0.5}


async def test_an_algorithm_says_which_groups_have_a_signal(
    outside: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await runner(config(outside), StepJournal(tmp_path, 0))
    sampled = await made.sample(0, ["t0"], 0)
    assert made.metrics(sampled)["groups_with_signal"] == 1.0, "the rewards of the first samples differ"
    monkeypatch.setattr(made.algorithm, "has_signal", lambda group, settings: settings.weight > 2, raising=False)
    assert made.metrics(sampled)["groups_with_signal"] == 0.0
    monkeypatch.delattr(made.algorithm, "has_signal")
    monkeypatch.setattr(made.algorithm, "has_signal", lambda group, settings: group[0]["none"], raising=False)
    with pytest.raises(AlgorithmFailed, match="KeyError: 'none'"):
        made.has_signal(sampled)


@pytest.mark.parametrize(
    ("table", "field", "words"),
    [
        ({"name": "elr"}, "algorithm.name", "there is no algorithm 'elr'; did you mean 'erl'?"),
        ({"name": "acme.nothing"}, "algorithm.name", "No module named"),
        ({"name": "json"}, "algorithm.name", "'json' is no algorithm: it has no `Settings`"),
        (
            {"name": "rlvr", "distillation_weight": 1.0},
            "algorithm.distillation_weight",
            "no such setting of algorithm 'rlvr'",
        ),
        ({"name": "erl", "memory_entires": 1}, "algorithm.memory_entires", "did you mean 'memory_entries'?"),
        ({"advantage": "gpro"}, "algorithm.advantage", "did you mean 'grpo'?"),
        (
            {"advantage": "rloo", "advantage_settings": {"bas": 1}},
            "algorithm.advantage_settings.bas",
            "no such setting of advantage estimator 'rloo'",
        ),
        ({"aggregation": "mean"}, "algorithm.aggregation", "sequence_mean_token_sum"),
        ({"memory_entries": 101}, "algorithm.memory_entries", "less than or equal to 100"),
        ({"second_attempt": "refection"}, "algorithm.second_attempt", "did you mean 'reflection'?"),
        ({"name": "rlvr", "second_attempt": "reflection"}, "algorithm.second_attempt", "are two algorithms"),
    ],
)
def test_settings_that_fit_no_algorithm_are_named(table: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(DomainError) as caught:
        validated(RunSettings, {"environment": "fake", "algorithm": table})
    assert caught.value.reason is Reason.INVALID_SETTING and caught.value.metadata["field"] == field
    assert words in caught.value.message


@pytest.mark.parametrize(
    ("second_attempt", "name"),
    [("none", "rlvr"), ("reflection", "erl"), ("raw_retry", "raw_retry"), ("try_again", "try_again")],
)
def test_settings_from_before_algorithms_had_names(second_attempt: str, name: str) -> None:
    """All of ERL's settings stood in every run, also in those that had no use for them."""
    old = {"second_attempt": second_attempt, "memory_entries": 1, "distillation_weight": 0.5, "first_weight": 0.25}
    settings = validated(RunSettings, {"environment": "fake", "algorithm": old})
    assert settings.algorithm.name == name and settings.algorithm.first_weight == 0.25  # type: ignore[attr-defined]
    assert settings_from_proto(settings_to_proto(settings)) == settings


async def test_an_estimator_and_an_aggregation_of_choice(tmp_path: Path) -> None:
    """RLOO over 1, 0 and 0: r minus the mean of the others; each sequence divided by its tokens."""
    settings = config("rlvr", advantage="rloo", aggregation="sequence_mean_token_mean")
    assert settings_from_proto(settings_to_proto(settings)) == settings
    made = await runner(settings, StepJournal(tmp_path, 0))
    sampled = await made.sample(0, ["t0"], 0)
    rewards = [one["first"].reward or 0.0 for one in sampled]
    data, _ = made.training_data(sampled)
    for datum, reward in zip(data, rewards, strict=True):
        others = (sum(rewards) - reward) / 2
        assert isinstance(datum.objective, PolicyGradient)
        assert datum.objective.advantage == pytest.approx(reward - others)
        assert datum.weight == pytest.approx(1 / 3 / sum(datum.loss_mask))


async def test_turn_level_advantages_are_one_for_each_token_and_journaled(tmp_path: Path) -> None:
    settings = config("rlvr", advantage="turn_level")
    journal = StepJournal(tmp_path, 0)
    made = await runner(settings, journal)
    journal.start(StepStarted(0, ["t0"], 0, 0))
    sampled = await made.sample(0, ["t0"], 0)
    await made.learn(0, sampled)
    journal.close()
    read = read_experiences(journal_file(tmp_path, 0))
    for one in read:
        (datum,) = one.trained
        (sequence,) = one["first"].sequences
        assert len(datum.values["advantages"]) == sequence.sampled_count and datum.numbers["advantage"] == 0
    signs = {one["first"].reward: {value > 0 for value in one.trained[0].values["advantages"]} for one in read}
    assert signs == {1.0: {True}, 0.0: {False}}


async def test_only_what_compares_with_the_old_policy_is_scored_before_several_optimizer_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sample is trained in five ways, under one id."""
    made = await runner(config("rlvr", optimizer_steps=2), StepJournal(tmp_path, 0))
    sampled = await made.sample(0, ["t0"], 0)
    given: list[Objective] = [
        Distillation(1.0),
        Transfer(1.0, ratio=1.0),
        Transfer(1.0, 0.1),
        NegativeAware(1.0, 0.5),
        PolicyGradient(1.0, (-0.5,) * 3, (-1.0,) * 3),
    ]

    def train(groups: Any, settings: Any) -> list[Any]:
        [datum] = policy_gradient(groups[0][0]["first"], 1.0, 1.0, "b")
        return [replace(datum, objective=objective) for objective in given]

    monkeypatch.setattr(made.algorithm, "train", train)
    await made.learn(0, sampled)
    learner = made.learner
    assert isinstance(learner, FakeLearner)
    old = (-0.25,) * 3
    assert [[datum.objective for datum in call] for call in learner.forwards] == [[given[1], given[3]]]
    trained = {repr(datum.objective) for step in learner.steps for datum in step}
    expected = [given[0], Transfer(1.0, 0.0, old, 1.0), given[2], NegativeAware(1.0, 0.5, old), given[4]]
    assert trained == {repr(objective) for objective in expected}
