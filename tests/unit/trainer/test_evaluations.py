"""Evaluations of a run by a second policy, beside training: what they measure, and what a kill costs meanwhile."""

from __future__ import annotations

import asyncio
import errno
import json
from collections import Counter, defaultdict
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st

from mulligan.common.errors import DomainError, Reason, fault, incident
from mulligan.common.inference import (
    CallOptions,
    CanaryProbe,
    Completion,
    Prompt,
    PublishedWeights,
    SamplingParams,
    WeightsKind,
)
from mulligan.trainer.events import EvaluationEvent, StepEvent
from mulligan.trainer.folder import Checkpoint, RunFolder, UnfinishedEvaluation
from mulligan.trainer.manager import RunManager
from tests.support.effort import examples
from tests.support.fakes import FakePolicy
from tests.support.virtual_time import run_in_virtual_time
from tests.unit.trainer.test_pipeline import QUIET, SlowWorld, train
from tests.unit.trainer.test_run import STEPS, Crash, crash, notices

EVALUATED: dict[str, Any] = {"policies": {"evaluator": "second"}, "evaluation": {"every": 2, "samples": 2}}


class EvaluatedWorld(SlowWorld):
    """Has a second policy of the same model, which takes long for an attempt and reads the files of its weights. The
    trainer may be killed when it has taken an optimizer step."""

    def __init__(self, folder: Path, ahead: int, timing: int = 0, seconds: float = 40.0, **changes: Any):
        super().__init__(folder, ahead, timing, **(EVALUATED | changes))
        self.taken = 0  # optimizer steps, over all lives
        self.kill_at = 0
        # Optimizer steps in the weights that made the attempts of an evaluation, by the step that it is after.
        self.measured: defaultdict[int, set[int]] = defaultdict(set)
        self.serves = -1
        second = FakePolicy(lambda system, last, sampling: self._say(system, sampling.seed or 0))
        inner = second.generate
        take, update = self.learner.optim_step, self.policy.update_weights

        async def generate(
            prompt: Prompt, sampling: SamplingParams, options: CallOptions = CallOptions()
        ) -> Completion:
            await asyncio.sleep(seconds)
            completion = await inner(prompt, sampling, options)
            self.measured[int(options.request_id.split("-")[2])].add(self.serves)
            return completion

        async def update_weights(weights: PublishedWeights, policy: str = "") -> float | None:
            if weights.uri not in self.learner.files:
                raise DomainError(Reason.WEIGHTS_NOT_FOUND, f"uri: there is no file {weights.uri}")
            if policy == "second":
                self.serves = self.learner.files[weights.uri]
            return await update(weights, policy)

        async def optim_step() -> dict[str, float]:
            self.taken += 1
            metrics = await take()
            if self.taken == self.kill_at:
                raise Crash
            return metrics

        second.generate = generate  # type: ignore[method-assign]
        self.policy.others["second"] = second
        self.policy.update_weights = update_weights  # type: ignore[method-assign]
        self.learner.optim_step = optim_step  # type: ignore[method-assign]

    @property
    def evaluations(self) -> Counter[int]:
        entries = self.run().events.entries
        return Counter(entry.event.step for entry in entries if isinstance(entry.event, EvaluationEvent))


@pytest.mark.parametrize("ahead", [0, 1])
def test_evaluations_by_a_second_policy_run_beside_training(tmp_path: Path, ahead: int) -> None:
    world = EvaluatedWorld(tmp_path, ahead)
    train(world)
    events = [entry.event for entry in world.run().events.entries]
    order = [(type(event), event.step) for event in events if isinstance(event, StepEvent | EvaluationEvent)]
    assert [step for kind, step in order if kind is EvaluationEvent] == [0, 2, 4, 5]
    assert order.index((StepEvent, 0)) < order.index((EvaluationEvent, 0)), "the learner did not wait"
    given = world.policy.others["second"].updates
    assert [weights.policy_version for weights in given] == [1, 2, 3, 4], "numbers of its own"
    learned = [weights.uri for weights in given]
    assert learned == [f"file:///w%20{version}" for version in (1, 3, 5, 6)], "after 0, 2, 4 and 5 steps"
    assert sorted(world.learner.checkpoints) == ["run-000000", "run-000002", "run-000004", "run-000005"]
    assert "the learner waits for each evaluation" not in " ".join(notices(world.run()))


def test_without_a_second_policy_the_learner_waits_and_says_so_once(tmp_path: Path) -> None:
    world = SlowWorld(tmp_path, 1, evaluation={"every": 1, "samples": 1})
    train(world)
    told = [text for text in notices(world.run()) if text.startswith("the learner waits for each evaluation")]
    assert len(told) == 1 and "policies.evaluator" in told[0]
    in_turns = SlowWorld(tmp_path / "turns", 0, evaluation={"every": 1, "samples": 1})
    train(in_turns)
    assert not any("the learner waits" in text for text in notices(in_turns.run()))
    memory_alone = SlowWorld(tmp_path / "alone", 1, learner="none", evaluation={"every": 1, "samples": 1})
    train(memory_alone)
    assert not any("the learner waits" in text for text in notices(memory_alone.run()))


def test_a_wait_for_the_evaluation_before_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = EvaluatedWorld(tmp_path, 1, seconds=VERY_LONG, evaluation={"every": 1, "samples": 1}, checkpoint_every=100)
    told: list[tuple[int, str]] = []

    async def watched() -> None:
        clock = asyncio.get_running_loop().time
        monkeypatch.setattr("mulligan.trainer.activity.time", SimpleNamespace(monotonic=clock))
        run = world.run()
        task = asyncio.create_task(run.train())
        while not task.done():
            now = run.activity.now()
            told.append((run.step, f"{now.doing} {now.done}/{now.total}"))
            await asyncio.sleep(VERY_LONG / 4)
        await task

    run_in_virtual_time(watched())
    waits = {step for step, text in told if text.startswith("waiting for the evaluation")}
    assert waits == set(range(1, STEPS + 1))
    others = [text for _, text in told if not text.startswith("waiting for the evaluation")]
    assert not any(int(text.rpartition("/")[2]) > VERY_LONG / 4 for text in others), "no wait is told as something else"
    assert len([text for text in notices(world.run()) if text.startswith("the learner waits")]) == 1


@settings(max_examples=examples(15), suppress_health_check=QUIET)
@given(timing=st.integers(0, 10**6), crashes=st.lists(st.integers(0, 120), min_size=1, max_size=3))
def test_no_evaluation_is_lost_in_a_crash(
    tmp_path_factory: pytest.TempPathFactory, timing: int, crashes: list[int]
) -> None:
    world = EvaluatedWorld(tmp_path_factory.mktemp("cut"), 1, timing, checkpoint_every=1)
    crash(world, crashes, 0, run_in_virtual_time)
    assert world.evaluations == {0: 1, 2: 1, 4: 1, 5: 1}
    assert world.measured == {step: {step} for step in (0, 2, 4, 5)}, "each of the weights that it is of"
    assert sorted(world.run().events.steps()) == list(range(STEPS))
    assert world.taken <= STEPS + len(crashes), "a kill costs one optimizer step at most"


ONE_AT_THE_START: dict[str, Any] = {"evaluation": {"every": 100, "samples": 2}, "checkpoint_every": 1}
VERY_LONG = 1000.0  # of an attempt: the evaluation before the first step outlasts all steps


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("kill_at", range(1, STEPS + 1))
def test_a_kill_beside_an_evaluation_costs_one_optimizer_step_and_not_the_evaluation(
    tmp_path: Path, ahead: int, kill_at: int
) -> None:
    world = EvaluatedWorld(tmp_path, ahead, seconds=VERY_LONG, **ONE_AT_THE_START)
    world.kill_at = kill_at
    with pytest.raises(Crash):
        train(world)
    assert not world.evaluations and world.folder.checkpoint().step == kill_at - 1  # type: ignore[union-attr]
    train(world)
    assert world.taken == STEPS + 1
    assert world.evaluations == {0: 1, STEPS: 1} and world.measured == {0: {0}, STEPS: {STEPS}}
    assert not any(text.startswith("lost") for text in notices(world.run()))
    checkpoint = world.folder.checkpoint()
    assert checkpoint is not None and checkpoint.step == STEPS


def test_what_an_evaluation_measures_stays_until_it_is_over_and_no_longer(tmp_path: Path) -> None:
    """The policy service of the evaluator forgets its weights when four more versions were published."""
    world = EvaluatedWorld(tmp_path, 0, seconds=VERY_LONG, **ONE_AT_THE_START)
    seen: list[list[str]] = []
    publish = world.learner.publish_weights

    async def publish_weights(policy_version: int, keep: Collection[int] = ()) -> PublishedWeights:
        published = await publish(policy_version, keep)
        seen.append([uri.rpartition("%20")[2] for uri in sorted(world.learner.files)])
        if policy_version == 5:
            world.policy.others["second"].version = 0
        return published

    world.learner.publish_weights = publish_weights  # type: ignore[method-assign]
    train(world)
    assert seen[-1] == ["1", "4", "5", "6"]
    assert any("lost version 1; publishing it again" in text for text in notices(world.run()))
    assert world.evaluations == {0: 1, STEPS: 1} and world.measured == {0: {0}, STEPS: {STEPS}}

    async def once_more() -> None:
        policy = await world.run().services.actor(world.folder.settings(), world.learner, lambda text: None)
        await policy.publish()

    run_in_virtual_time(once_more())
    assert seen[-1] == ["5", "6", "7"], "nothing holds it after the evaluation"


def test_an_evaluation_whose_weights_are_gone_is_told_as_lost_and_the_run_goes_on(tmp_path: Path) -> None:
    world = EvaluatedWorld(tmp_path, 0, seconds=VERY_LONG, **ONE_AT_THE_START)
    world.kill_at = 3
    with pytest.raises(Crash):
        train(world)
    del world.learner.files["file:///w%201"]
    train(world)
    assert world.evaluations == {STEPS: 1} and world.taken == STEPS + 1
    (told,) = [text for text in notices(world.run()) if "is lost" in text]
    assert told.startswith("the evaluation after step 0 is lost: it was cut off, and its weights cannot be published")
    assert world.run().summary()["test_success_before"] is None


class FailingOnce:
    """Fails to give the second policy its weights, once."""

    def __init__(self, world: EvaluatedWorld, error: Exception):
        self._update = world.policy.update_weights
        self._error: Exception | None = error
        world.policy.update_weights = self._called  # type: ignore[method-assign]

    async def _called(self, weights: PublishedWeights, policy: str = "") -> float | None:
        if policy == "second" and self._error is not None:
            error, self._error = self._error, None
            raise error
        return await self._update(weights, policy)


def cut_beside_its_first_evaluation(folder: Path) -> EvaluatedWorld:
    world = EvaluatedWorld(folder, 0, seconds=VERY_LONG, **ONE_AT_THE_START)
    world.kill_at = 3
    with pytest.raises(Crash):
        train(world)
    return world


def test_those_who_watch_are_told_no_path_of_weights_that_are_gone(tmp_path: Path) -> None:
    world = cut_beside_its_first_evaluation(tmp_path)
    FailingOnce(world, gone := FileNotFoundError(errno.ENOENT, "not there", "/home/secret/w 1"))
    with structlog.testing.capture_logs() as logs:
        train(world)
    assert world.evaluations == {STEPS: 1}
    (told,) = [text for text in notices(world.run()) if "is lost" in text]
    assert told.endswith(f"its weights cannot be published again: {fault(gone)}")
    (logged,) = [entry for entry in logs if "incident" in entry]
    assert logged["incident"] == incident(gone) and logged["exc_info"] is gone


def test_trouble_that_passes_costs_no_evaluation(tmp_path: Path) -> None:
    world = cut_beside_its_first_evaluation(tmp_path)
    FailingOnce(world, OSError(errno.EMFILE, "too many open files"))
    with pytest.raises(OSError, match="too many open files"):
        train(world)
    train(world)
    assert world.evaluations == {0: 1, STEPS: 1} and world.measured == {0: {0}, STEPS: {STEPS}}
    assert not any("is lost" in text for text in notices(world.run()))


def test_a_run_that_stops_saves_before_it_waits_for_an_evaluation(tmp_path: Path) -> None:
    """Who stops a run may kill it before the evaluation is over."""
    world = EvaluatedWorld(tmp_path, 0, seconds=VERY_LONG, **(ONE_AT_THE_START | {"checkpoint_every": 100}))
    run = world.run()
    seen: list[Checkpoint | None] = []
    take, inner = world.learner.optim_step, world.policy.others["second"].generate

    async def optim_step() -> dict[str, float]:
        if world.taken == 1:
            run.stop()
        return await take()

    async def generate(prompt: Prompt, sampling: SamplingParams, options: CallOptions = CallOptions()) -> Completion:
        completion = await inner(prompt, sampling, options)
        seen.append(world.folder.checkpoint())
        return completion

    world.learner.optim_step = optim_step  # type: ignore[method-assign]
    world.policy.others["second"].generate = generate  # type: ignore[method-assign]
    run_in_virtual_time(run.train())
    assert run.stopped and seen[0] is not None and seen[0].step == run.step == 2
    assert seen[0].evaluation is not None and seen[0].evaluation.step == 0
    assert world.evaluations == {0: 1}
    train(world)
    assert world.taken == STEPS and world.evaluations == {0: 1, STEPS: 1}


def test_publishing_a_run_by_hand_leaves_the_weights_of_its_evaluation(tmp_path: Path) -> None:
    """As `mulligan eval --run` does."""
    world = EvaluatedWorld(tmp_path, 0, seconds=VERY_LONG, **ONE_AT_THE_START)
    world.kill_at = 3
    with pytest.raises(Crash):
        train(world)

    async def publish() -> None:
        manager = RunManager(tmp_path, world.run().services)
        for _ in range(4):
            await manager.publish("run")
        await manager.close()

    run_in_virtual_time(publish())
    train(world)
    assert world.measured == {0: {0}, STEPS: {STEPS}}


WEIGHTS = PublishedWeights(3, WeightsKind.FULL, "file:///w%203", "0" * 64, "f", (CanaryProbe((1, 2), (-0.1,)),))


def test_a_checkpoint_has_the_evaluation_to_the_bit_and_one_without_reads_as_before(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for evaluation in (None, UnfinishedEvaluation(4, WEIGHTS, 17), UnfinishedEvaluation(0, WEIGHTS)):
        folder.write_checkpoint(Checkpoint("run-000005", 5, 20, evaluation))
        assert folder.checkpoint() == Checkpoint("run-000005", 5, 20, evaluation)
        assert ("evaluation" in (tmp_path / "checkpoint.json").read_text()) == (evaluation is not None)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("step", 6, "evaluation.step: expected at most"),
        ("policy_version", 0, "weights.policy_version"),
        ("policy_version", 2**63, "weights.policy_version"),
        ("kind", "original", "weights.kind"),
        ("kind", "half", "weights.kind"),
        ("uri", "", "weights.uri"),
        ("uri", "file:///w\0", "weights.uri"),
        ("sha256", "abc", "weights.sha256"),
        ("fingerprint", "f" * 201, "weights.fingerprint"),
        ("canary", [{"token_ids": [1, 2], "log_probs": []}], "weights.canary"),
        ("canary", [{"token_ids": [1, -2], "log_probs": [-0.1]}], "weights.canary"),
        ("canary", [{"token_ids": [1, 2], "log_probs": [None]}], "weights.canary"),
    ],
)
def test_a_checkpoint_with_weights_that_are_none_is_damaged(tmp_path: Path, field: str, value: Any, said: str) -> None:
    folder = RunFolder(tmp_path)
    folder.write_checkpoint(Checkpoint("run-000005", 5, 20, UnfinishedEvaluation(4, WEIGHTS, 17)))
    path = tmp_path / "checkpoint.json"
    document = json.loads(path.read_text())
    del document["crc32"]
    evaluation = document["evaluation"]
    (evaluation if field in evaluation else evaluation["weights"])[field] = value
    path.write_text(json.dumps(document))
    with pytest.raises(DomainError, match=said) as caught:
        folder.checkpoint()
    assert caught.value.reason is Reason.STATE_DAMAGED


def test_a_policy_that_forgot_all_versions_gets_no_number_whose_file_an_evaluation_needs(tmp_path: Path) -> None:
    world = EvaluatedWorld(tmp_path, 0, seconds=VERY_LONG, **ONE_AT_THE_START)
    world.kill_at = 3
    with pytest.raises(Crash):
        train(world)
    world.policy.version = world.policy.others["second"].version = 0
    train(world)
    assert world.measured == {0: {0}, STEPS: {STEPS}}


def test_what_an_evaluation_reads_of_the_memory_is_as_old_as_its_weights(tmp_path: Path) -> None:
    """Also when it is repeated after a kill: the memory has grown since."""
    reads = {"algorithm": {"memory_readers": "both", "memory_writes": "all"}}
    world = EvaluatedWorld(tmp_path, 0, seconds=VERY_LONG, **(ONE_AT_THE_START | reads))
    world.kill_at = 4
    with pytest.raises(Crash):
        train(world)
    assert world.memory.version > 0
    world.memory.queries.clear()
    train(world)
    read = [query.version for query, trial in world.memory.queries]
    assert 0 in read


def test_an_evaluation_that_fails_ends_the_run_before_the_next_step(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"evaluation": {"every": 0, "samples": 1}, "checkpoint_every": 100}
    world = EvaluatedWorld(tmp_path, 0, seconds=0, **changes)

    async def generate(prompt: Prompt, sampling: SamplingParams, options: CallOptions = CallOptions()) -> Completion:
        raise RuntimeError("the evaluator is broken")

    world.policy.others["second"].generate = generate  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="the evaluator is broken"):
        train(world)
    assert sorted(world.run().events.steps()) == [0], "the step that was under way"


async def test_an_evaluator_that_cannot_be_one_is_refused_by_name(tmp_path: Path) -> None:
    world = SlowWorld(tmp_path, 1, policies={"evaluator": "second"})
    with pytest.raises(DomainError, match=r"policies\.evaluator: there is no policy 'second'"):
        await world.run().train()
    world.policy.others["second"] = FakePolicy(lambda *_: "", frozen=True)
    with pytest.raises(DomainError, match=r"policies\.evaluator: policy 'second' is frozen"):
        await world.run().train()
    same = SlowWorld(tmp_path / "same", 1, policies={"evaluator": "actor"})
    with pytest.raises(DomainError, match=r"policies\.evaluator: it is the actor; .* training waits for evaluations"):
        await same.run().train()
