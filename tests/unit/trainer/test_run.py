"""A run ends the same wherever it was cut, and its journal holds what it says."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mulligan.common.errors import DomainError, ServiceUnavailable
from mulligan.common.experience import Experience, Sample
from mulligan.common.inference import PublishedWeights
from mulligan.trainer.data import ModelLimits
from mulligan.trainer.events import EvaluationEvent, NoticeEvent, StepEvent
from mulligan.trainer.folder import RunFolder, RunState
from mulligan.trainer.history import read_history
from mulligan.trainer.journal import (
    SampleRecorded,
    StepJournal,
    journal_file,
    journaled_steps,
    read_experiences,
    read_records,
)
from mulligan.trainer.manager import RunManager
from mulligan.trainer.run import Run, ServicePorts
from mulligan.trainer.sampling import ForeignWeights
from mulligan.trainer.settings import RunSettings
from tests.support.effort import examples
from tests.support.fakes import FakeEnvironment, FakeEnvironments, FakeLearner, FakeMemory, FakePolicy
from tests.support.waiting import until

STEPS = 5


class Crash(BaseException):
    """Ends a run as SIGKILL would: nothing catches it."""


class World:
    """The services that outlive a trainer, and the number of things that may still happen before it crashes."""

    def __init__(self, folder: Path, **changes: Any):
        self.folder = RunFolder(folder / "run")
        self.budget: int | None = None
        # Seeds decide what is said, so a repeated call says the same.
        self.policy = FakePolicy(lambda system, last, sampling: self._say(system, sampling.seed or 0))
        self.environment = FakeEnvironment({f"t{n}": "go" for n in range(4)}, fail=lambda episode: self.happen())
        self.quiz = FakeEnvironment({f"q{n}": "go" for n in range(3)}, fail=lambda episode: self.happen())
        self.memory = FakeMemory()
        self.learner = FakeLearner()
        settings = RunSettings.model_validate(
            {
                "environment": "fake",
                "steps": STEPS,
                "checkpoint_every": 2,
                "keep_checkpoints": 3,  # with fewer, when checkpoints come depends on how long saving takes
                "deterministic": True,
                "rollout": {"tasks_per_step": 2, "rollouts_per_task": 2} | changes.pop("rollout", {}),
                "evaluation": {"every": 2, "samples": 1},
                "loss": {"kl_coefficient": 0.1},
            }
            | changes
        )
        self.folder.create("run", settings)

    def happen(self) -> None:
        if self.budget is not None:
            self.budget -= 1
            if self.budget < 0:
                raise Crash

    def _say(self, system: str, seed: int) -> str:
        self.happen()
        if system == "reflect":
            return f"<prompt>{seed % 1000}</prompt>"
        return "go" if seed % 3 == 0 else "no"

    def run(self) -> Run:
        async def open_learner(run_id: str, settings: RunSettings) -> FakeLearner:
            self.learner.state = 0  # a fresh process: only checkpoints outlive it
            return self.learner

        environments = FakeEnvironments({"fake": self.environment, "quiz": self.quiz})
        return Run("run", self.folder, ServicePorts(environments, self.policy, self.memory, open_learner))

    def result(self) -> Any:
        run = Run("run", self.folder, self.run().services)
        experiences: list[Experience] = []
        for step in journaled_steps(self.folder.journal):
            experiences += read_experiences(journal_file(self.folder.journal, step))
        timing = ("seconds", "policy_version", "staleness_mean", "staleness_max")
        metrics = {
            step: {
                name: value
                for name, value in event.metrics.items()
                if name not in timing and not name.endswith("_seconds")
            }
            for step, event in run.events.steps().items()
        }
        evaluations = [run.events.evaluations(name) for name in ("", "quiz")]
        history = read_history(self.folder, "fake", STEPS).rounds
        written = [(entry.reflection_id, entry.text) for entry in self.memory.entries]
        # versions and episode ids differ between lives of a run; nothing else may
        chains = [
            (
                chain.experience_id,
                chain.environment,
                chain.task_id,
                [(part.sequences[0].token_ids, part.sequences[0].loss_mask) for part in chain.samples],
                chain["first"].reward,
                chain.sample("reflection") and (chain["reflection"].text, chain["reflection"].reward),
                chain.target("distilled") and chain.targets[0].sequences,
                chain.memory_entry_ids,
                [len(part.turns) for part in chain.samples if part.is_episode],
            )
            for chain in experiences
        ]
        return chains, metrics, evaluations, written, self.learner.state, history


async def test_a_run_from_start_to_end(tmp_path: Path) -> None:
    world = World(tmp_path)
    run = world.run()
    await run.train()
    assert run.step == STEPS and not run.stopped
    assert sorted(run.events.steps()) == list(range(STEPS))
    assert sorted(run.events.evaluations()) == [0, 2, 4, 5]
    assert sorted(world.learner.checkpoints) == [f"run-{step:06}" for step in (0, 2, 4, 5)]
    versions = [update.policy_version for update in world.policy.updates]
    assert versions == list(range(1, STEPS + 2)), "the initial weights and one version per step"
    assert "further_evaluations" not in run.summary()
    assert run.summary()["rollouts"] == sum(
        1 + (chain.sample("reflection") is not None) + (chain.sample("second") is not None)
        for step in range(STEPS)
        for chain in read_experiences(journal_file(world.folder.journal, step))
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    world = World(tmp_path_factory.mktemp("whole"))
    asyncio.run(world.run().train())
    return world.result()


REPLACING = {"replace_rounds": 2}
# Runs whose tasks depend on what was earned before: of one environment, and of several.
CHOOSY: list[dict[str, Any]] = [
    {"sampler": {"name": "weakest"}, "rollout": REPLACING, "algorithm": {"name": "rlvr"}},
    {"sampler": {"name": "adarft", "rest": 0.0}},
    {"sampler": {"name": "mixture", "shares": {"fake": 0.6, "quiz": 0.4}}, "rollout": REPLACING, "seed": 2},
]


@example(crashes=[15, 15, 0], torn=34, every=2)  # two torn ends make a whole frame, with a wrong checksum
@settings(max_examples=examples(40), suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(crashes=st.lists(st.integers(0, 90), min_size=1, max_size=4), torn=st.integers(0, 40), every=st.integers(1, 3))
def test_a_crash_anywhere_loses_nothing_and_counts_nothing_twice(
    tmp_path_factory: pytest.TempPathFactory, uninterrupted: Any, crashes: list[int], torn: int, every: int
) -> None:
    """`every`: steps between checkpoints."""
    world = World(tmp_path_factory.mktemp("cut"), checkpoint_every=every)
    crash(world, crashes, torn)
    assert world.result() == uninterrupted
    sampled = sampled_parts(world)
    assert len(sampled) == len(set(sampled)), "what was journaled before a crash is not sampled again after it"


@pytest.fixture(scope="module")
def choosy(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What each of CHOOSY gives."""
    worlds = [World(tmp_path_factory.mktemp("whole"), **changes) for changes in CHOOSY]
    for world in worlds:
        asyncio.run(world.run().train())
    return [world.result() for world in worlds]


@settings(max_examples=examples(30), suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    number=st.integers(0, len(CHOOSY) - 1),
    crashes=st.lists(st.integers(0, 150), min_size=1, max_size=4),
    torn=st.integers(0, 40),
)
def test_after_a_crash_the_sampler_chooses_what_it_would_have_chosen(
    tmp_path_factory: pytest.TempPathFactory, choosy: list[Any], number: int, crashes: list[int], torn: int
) -> None:
    world = World(tmp_path_factory.mktemp("cut"), **CHOOSY[number])
    crash(world, crashes, torn)
    assert world.result() == choosy[number]
    sampled = sampled_parts(world)
    assert len(sampled) == len(set(sampled))


def test_the_choosy_runs_replace_groups_and_play_each_environment(choosy: list[Any]) -> None:
    for (_, metrics, _, _, _, history), changes in zip(choosy, CHOOSY, strict=True):
        replaced = [step.get("replaced_groups") for step in metrics.values()]
        assert any(replaced) if "rollout" in changes else replaced == [None] * STEPS
        assert {one.number for one in history} == ({0, 1, 2} if "rollout" in changes else {0})
        environments = {group.environment for one in history for group in one.groups}
        assert environments == ({"fake", "quiz"} if changes["sampler"]["name"] == "mixture" else {"fake"})


def crash(world: World, crashes: list[int], torn: int, run: Callable[[Any], object] = asyncio.run) -> None:
    """Runs to the end, in lives that are cut after so many calls each, with a torn write at the end of each life."""
    for budget in crashes:
        world.budget = budget
        try:
            run(world.run().train())
        except Crash:
            last = sorted(world.folder.journal.glob("*"))[-1:]
            for path in (*last, world.folder.history_file):
                if path.exists():
                    with path.open("ab") as file:  # the write that the crash interrupted
                        file.write(msgpack.packb([1, b"x" * 64])[:torn])
    world.budget = None
    run(world.run().train())


def sampled_parts(world: World) -> list[str]:
    """Ids of all journaled samples, in order, with repetitions."""
    found: list[str] = []
    for path in sorted(world.folder.journal.glob("*")):
        for record, _ in read_records(path):
            if isinstance(record, SampleRecorded):
                found.append(record.sample.sample_id)
    return found


async def test_a_stopped_run_goes_on(tmp_path: Path, uninterrupted: Any) -> None:
    world = World(tmp_path)
    run = world.run()
    world.environment.fail = lambda episode: run.stop() if "-s2-" in episode else None
    await run.train()
    assert run.stopped and run.step == 3 and world.folder.checkpoint().step == 3  # type: ignore[union-attr]
    await world.run().train()
    assert world.result() == uninterrupted


async def test_a_lost_learner_is_set_up_again_from_the_last_checkpoint(tmp_path: Path, uninterrupted: Any) -> None:
    world = World(tmp_path)
    world.learner.lose_at = 3
    run = world.run()
    await run.train()
    assert world.result() == uninterrupted
    notices = [entry.event.text for entry in run.events.entries if isinstance(entry.event, NoticeEvent)]
    assert any("learner was lost" in text for text in notices)


async def test_a_restarted_policy_gets_its_weights_again(tmp_path: Path, uninterrupted: Any) -> None:
    world = World(tmp_path)

    def forget(episode: str) -> None:
        if "-s1-" in episode and len(world.policy.updates) == 2:
            world.policy.version = 0

    world.environment.fail = forget
    await world.run().train()
    assert world.result() == uninterrupted
    assert [update.policy_version for update in world.policy.updates].count(2) == 2


async def test_weights_of_somebody_else_end_the_run(tmp_path: Path) -> None:
    world = World(tmp_path)

    def intrude(episode: str) -> None:
        world.policy.version = 99

    world.environment.fail = intrude
    with pytest.raises(ForeignWeights, match="version 99, but this run published 1"):
        await world.run().train()


async def test_the_manager_keeps_state_and_goes_on_with_what_was_running(tmp_path: Path) -> None:
    world = World(tmp_path)
    services = world.run().services
    manager = RunManager(tmp_path, services)
    with pytest.raises(OSError, match="in use by another trainer"):
        RunManager(tmp_path, services)
    manager.go_on()
    await until(lambda: manager.record("run").state is RunState.COMPLETED)
    followed = [entry async for entry in _ended(manager.run("run"))]
    assert [type(entry.event) for entry in followed].count(StepEvent) == STEPS
    assert [entry.number for entry in followed] == list(range(1, len(followed) + 1))
    await manager.close()


async def test_an_outage_fails_the_run_with_the_endpoint(tmp_path: Path) -> None:
    world = World(tmp_path)

    async def update_weights(weights: PublishedWeights, policy: str = "") -> float | None:
        raise ServiceUnavailable("10.0.0.1:1", 120, "connection refused")

    world.policy.update_weights = update_weights  # type: ignore[method-assign]
    manager = RunManager(tmp_path, world.run().services)
    manager.go_on()
    await until(lambda: manager.record("run").state is RunState.FAILED)
    assert "10.0.0.1:1 was unreachable for 120 s" in manager.record("run").error
    await manager.close()


async def _ended(run: Run) -> Any:
    async for entry in run.events.follow(0):
        yield entry
        if entry is run.events.entries[-1]:
            return


def notices(run: Run) -> list[str]:
    return [entry.event.text for entry in run.events.entries if isinstance(entry.event, NoticeEvent)]


async def test_a_run_whose_prompts_never_fit_fails_at_once_and_goes_on_under_a_larger_context(
    tmp_path: Path, uninterrupted: Any
) -> None:
    """First its test tasks do not fit, then the training tasks of a step, then all do."""
    world = World(tmp_path)
    world.policy.context_length = 10
    with pytest.raises(DomainError, match=r"no attempt could begin: .* 40 tokens, .* context is 10\b"):
        await world.run().train()
    assert not journaled_steps(world.folder.journal)
    world.environment.fail = lambda episode: setattr(world.policy, "context_length", 10)  # once the evaluation plays
    world.policy.context_length = 4096
    with pytest.raises(DomainError, match=r"no attempt could begin: .* 40 tokens, .* context is 10\b"):
        await world.run().train()
    assert journaled_steps(world.folder.journal) == [0]
    world.environment.fail = lambda episode: None
    world.policy.context_length = 4096
    await world.run().train()
    assert world.result()[0] == uninterrupted[0], "the chains are those of a run that never failed"


async def test_what_is_left_out_is_told_once(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.learner.limits = ModelLimits(2**16, 60)  # reflections are longer
    await world.run().train()
    steps = [event.metrics for event in world.run().events.steps().values()]
    assert [step.get("dropped_too_long", 0) for step in steps] == [step["reflections"] for step in steps]
    assert sum(step["dropped"] > 0 for step in steps) > 1
    (told,) = notices(world.run())
    assert told.startswith("left out of training, counted as dropped_too_long: ")


async def test_a_setting_without_effect_is_told_once(tmp_path: Path) -> None:
    world = World(tmp_path, algorithm={"advantage": "rloo", "normalize_by_std": False})
    run = world.run()
    world.environment.fail = lambda episode: run.stop() if "-s0" in episode else None
    await run.train()
    await world.run().train()
    (told,) = notices(world.run())
    assert told.startswith("algorithm.normalize_by_std: it has no effect")


async def test_a_task_whose_prompt_never_fits_is_excluded_and_told_once(tmp_path: Path) -> None:
    world = World(tmp_path)
    long = "t" * 100
    world.environment.answers[long] = "go"
    world.policy.context_length = 120
    await world.run().train()
    steps = world.run().events.steps().values()
    assert sum(step.metrics.get("excluded_prompt_too_long", 0) for step in steps) > 0
    assert any(event.excluded for event in world.run().events.evaluations().values())
    (told,) = notices(world.run())
    assert "the first prompt has 138 tokens, and the policy's context is 120" in told


def test_a_torn_record_is_dropped_and_overwritten(tmp_path: Path) -> None:
    world = World(tmp_path)
    asyncio.run(world.run().train())
    path = journal_file(world.folder.journal, 0)
    whole = path.read_bytes()
    for cut in range(len(whole) - 30, len(whole)):
        path.write_bytes(whole[:cut])
        journal = StepJournal(world.folder.journal, 0)
        assert journal.started is not None and journal.completed is None
        journal.close()
        assert whole.startswith(path.read_bytes())


def test_the_journal_is_plain_msgpack(tmp_path: Path) -> None:
    world = World(tmp_path)
    asyncio.run(world.run().train())
    with journal_file(world.folder.journal, 0).open("rb") as file:
        records = [msgpack.unpackb(payload) for _, payload in msgpack.Unpacker(file)]
    kinds = [record["type"] for record in records]
    assert kinds[0] == "step_started" and kinds[-1] == "step_completed" and kinds.count("experience_completed") == 4


def as_before(record: dict[str, Any]) -> dict[str, Any] | None:
    """A record as it was written before samples had roles; None for one that was not written."""
    match record["type"]:
        case "trained":
            return None
        case "sample":
            sample = record["sample"]
            kind = "attempt" if sample["episode_id"] else "reflection"
            names = OLD_ATTEMPT if kind == "attempt" else OLD_REFLECTION
            return {"type": kind, kind: {f"{kind}_id": sample["sample_id"]} | {name: sample[name] for name in names}}
        case "experience_completed":
            ids = {
                name: one for one in record["sample_ids"] for name in ("first", "reflection", "second") if name in one
            }
            targets = [[s["segments"][0]["token_ids"] for s in target["sequences"]] for target in record["targets"]]
            return {name: record[name] for name in OLD_EXPERIENCE} | {
                "type": "experience",
                "first_id": ids["first"],
                "reflection_id": ids.get("reflection"),
                "second_id": ids.get("second"),
                "distilled_id": record["targets"][0]["target_id"] if targets else None,
                "distilled_prompts": targets[0] if targets else [],
            }
    return record


def as_read_before(sample: Sample) -> Sample:
    return replace(sample, system="", turns=sample.turns if sample.is_episode else ())


OLD_ATTEMPT = ("episode_id", "outcome", "reward", "feedback", "turns", "final_observation", "sequences", "temperature")
OLD_REFLECTION = ("text", "sequences", "temperature", "outcome", "error", "policy")
OLD_EXPERIENCE = ("experience_id", "run_id", "step", "environment", "task_id", "rollout", "memory_entry_ids")


async def test_a_journal_of_an_earlier_version_can_be_read_and_resumed(tmp_path: Path) -> None:
    """Its records know attempts and reflections, not samples; attempts without a turn have a reward."""
    world = World(tmp_path)
    await world.run().train()
    path = journal_file(world.folder.journal, 0)
    before = read_experiences(path)
    records = []
    for _, payload in msgpack.Unpacker(path.open("rb")):
        record = as_before(msgpack.unpackb(payload))
        if record is None:
            continue
        attempt = record.get("attempt")
        if attempt and attempt["attempt_id"].endswith("-r0-first"):
            attempt |= {"turns": [], "sequences": [], "outcome": "truncated", "reward": 0.0}
        changed = msgpack.packb(record)
        records.append(msgpack.packb([zlib.crc32(changed), changed]))
    path.write_bytes(b"".join(records))
    for now, then in zip(read_experiences(path), before, strict=True):
        samples = now.samples if not now.rollout else tuple(map(as_read_before, then.samples))
        assert now.samples == samples, "all but the prompts was written before, too"
        assert now.targets == tuple(replace(target, system="") for target in then.targets)
    (tmp_path / "run" / "checkpoint.json").unlink()
    again = world.run()
    world.learner.checkpoints.clear()
    await again.train()
    chains = read_experiences(path)
    assert all(chain["first"].turns for chain in chains), "what never spoke is asked again"


def test_evaluation_events_round_trip(tmp_path: Path) -> None:
    world = World(tmp_path)
    run = world.run()
    run.events.add(EvaluationEvent(0, 0.5, 0.25, 4, 1))
    with world.folder.events_file.open("ab") as file:
        file.write(b'{"number": 2, "ti')
    assert [entry.event for entry in world.run().events.entries] == [EvaluationEvent(0, 0.5, 0.25, 4, 1)]
