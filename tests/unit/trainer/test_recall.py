"""What a run reads of the memory, whom it shows what, and what it reports."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mulligan.common.errors import DomainError, Reason
from mulligan.common.experience import Experience
from mulligan.common.reflections import (
    MixPart,
    Provenance,
    ReflectionKind,
    ReflectionQuery,
    RetrievalStrategy,
    Retrieved,
    Trial,
    Uplift,
)
from mulligan.common.types import EnvironmentInfo
from mulligan.trainer.journal import StepJournal, StepStarted, journal_file, read_experiences
from mulligan.trainer.preflight import check_memory
from mulligan.trainer.recall import scope_of
from mulligan.trainer.settings import RunSettings
from tests.support.fakes import FakeEnvironment, FakeMemory, timeout
from tests.support.loop import Loop, in_turn

ORIGIN = Provenance("other", "e", "fake", "t0", 1, 0.0, 1.0, True)
ONE = {"rollouts_per_task": 1}
MEASURES = {"memory_strategy": "best_uplift", "memory_entries": 2}


async def loop(first: list[str], second: list[str], *, texts: tuple[str, ...] = ("old", "new"), **more: Any) -> Loop:
    """Of a memory that has the texts. The first rollout leaves out the newest entry, which is the first retrieved."""
    rollout = {"rollouts_per_task": len(first)} | more.pop("rollout", {})
    environment = more.pop("environment", None)
    settings = {"algorithm": MEASURES | more.pop("algorithm", {}), **more}
    made = Loop(in_turn(first, second), environment=environment, rollout=rollout, **settings)
    for text in texts:
        await made.memory.add(text, "run", text, ORIGIN)
    made.memory.left_out = lambda key: 0 if key.endswith("-r0") else None
    return made


def reflections(experience: Experience) -> str:
    return experience["reflection"].turns[0].observation


async def test_a_reflector_is_shown_all_but_the_entry_that_its_use_leaves_out(tmp_path: Path) -> None:
    made = await loop(["a", "a", "go"], ["go", "b"])
    journal = StepJournal(tmp_path, 0)
    journal.start(StepStarted(0, ["t0"], 2, 0))
    experiences = await made.step(recorder=journal)
    left, whole, _ = experiences
    assert reflections(left).endswith("memory=old") and reflections(whole).endswith("memory=new\n\nold")
    assert [one.memory_entry_ids for one in experiences] == [("old",), ("new", "old"), ()]
    assert [one.memory_left_out_id for one in experiences] == ["new", "", ""]
    assert [one.memory_use_id for one in experiences] == ["use of run-s0-t0-r0", "use of run-s0-t0-r1", ""]
    assert made.memory.reported == {"use of run-s0-t0-r0": 1.0, "use of run-s0-t0-r1": 0.0}, "solved: nobody read"
    counts = {name: made.metrics[name] for name in made.metrics if name.startswith("memory_")}
    assert counts == {"memory_uses": 3, "memory_left_out": 1, "memory_reported": 2}
    assert [replace(one, trained=()) for one in read_experiences(journal_file(tmp_path, 0))] == experiences


async def test_a_group_asks_once_and_another_group_draws_anew() -> None:
    environment = FakeEnvironment({"t0": "go", "t1": "go"})
    made = await loop(["a", "a"] * 2, ["go"] * 4, environment=environment, rollout={"rollouts_per_task": 2})
    await made.step(3, ("t0", "t1"))
    trials = [trial for _, trial in made.memory.queries]
    seed = trials[0].seed if trials[0] else 0
    assert trials == [Trial((f"run-s3-{slot}-r0", f"run-s3-{slot}-r1"), 0.25, seed) for slot in ("t0", "t1")]


@pytest.mark.parametrize("changes", [{"memory_strategy": "top_gain"}, {"memory_holdout": 0.0}])
async def test_without_a_trial_equal_questions_are_asked_once(changes: dict[str, Any]) -> None:
    environment = FakeEnvironment({"t0": "go", "t1": "go"})
    made = await loop(["a"] * 2, ["go"] * 2, environment=environment, rollout=ONE, algorithm=changes)
    experiences = await made.step(0, ("t0", "t1"))
    assert [trial for _, trial in made.memory.queries] == [None]
    assert [one.memory_entry_ids for one in experiences] == [("new", "old")] * 2
    assert {one.memory_use_id for one in experiences} == {""} and made.memory.reported == {}
    assert not {name for name in made.metrics if name.startswith("memory_")}


async def test_first_attempts_read_in_their_system_prompt() -> None:
    made = await loop(["a"], ["go", "a"], texts=("be good",), algorithm={"memory_readers": "first"})
    made.memory.left_out = lambda key: 0 if "-s1-" in key else None
    (read,) = await made.step()
    told = "be good\nanswer with a word"
    assert [one.system for one in read.samples] == [told] and read["first"].reward == 1.0
    assert read.memory_entry_ids == ("be good",)
    made.policy.answer = lambda system, last, sampling: {"solve": "a", "reflect": "rule"}.get(system, "go")
    (bare,) = await made.step(1)
    assert bare["first"].system == "solve", "its only entry is left out"
    assert reflections(bare).endswith("memory=nothing yet"), "reflectors do not read"
    assert bare["second"].reward == 1.0 and bare.memory_entry_ids == ()
    assert made.memory.reported == {"use of run-s0-t0-r0": 1.0, "use of run-s1-t0-r0": 0.0}, "the first attempts'"
    assert made.memory.entries[-1].text == "rule"


async def test_both_may_read() -> None:
    made = await loop([], ["a", "go"], texts=("be good",), algorithm={"memory_readers": "both"}, rollout=ONE)
    made.memory.left_out = lambda key: None
    (one,) = await made.step()
    assert one["first"].system == "be good\nanswer with a word" and reflections(one).endswith("memory=be good")
    assert made.memory.reported == {"use of run-s0-t0-r0": 0.0}, "the first attempt's"


async def test_what_is_distilled_stands_under_the_deployed_prompt_whatever_the_first_attempt_read() -> None:
    made = await loop([], ["a", "go"], texts=("hint",), algorithm={"memory_readers": "first"}, rollout=ONE)
    made.memory.left_out = lambda key: None
    (one,) = await made.step()
    prompt = bytes(one.targets[0].sequences[0].segments[0].token_ids).decode()
    assert prompt == "[system:solve][user:board t0][assistant:"


async def test_rewards_are_reported_in_shares_of_the_greatest() -> None:
    environment = FakeEnvironment({"t0": "go"}, turns=2, in_parts=True)
    made = await loop(["a", "a"], ["go", "a"], environment=environment, rollout=ONE)
    describe = environment.describe

    async def of_four(environment: str) -> EnvironmentInfo:
        return replace(await describe(environment), max_reward=2.0)

    environment.describe = of_four  # type: ignore[method-assign]
    await made.step()
    assert made.memory.reported == {"use of run-s0-t0-r0": 0.25}


async def test_what_the_infrastructure_lost_is_not_reported() -> None:
    environment = FakeEnvironment({"t0": "go"})

    def fail(episode_id: str) -> None:
        if "-r0-second" in episode_id:
            raise timeout()

    environment.fail = fail
    made = await loop(["a", "a"], ["go"] * 4, environment=environment)
    await made.step()
    assert list(made.memory.reported) == ["use of run-s0-t0-r1"]


async def test_a_repeated_report_counts_nothing() -> None:
    made = await loop(["a", "a"], ["go", "b"])
    experiences = await made.step()
    before = (dict(made.memory.reported), made.memory.version)
    await made.runner.memorise(experiences)
    assert (made.memory.reported, made.memory.version) == before


async def test_groups_that_were_replaced_are_reported_but_not_remembered() -> None:
    made = await loop(["a"], ["go"])
    experiences = await made.step()
    known = len(made.memory.entries)
    made.memory.reported.clear()
    await made.runner.memorise([], experiences)
    assert len(made.memory.reported) == 1 and len(made.memory.entries) == known


async def test_what_is_asked() -> None:
    """The family of a task, the budget, the parts of a mix, and the first observation where texts are compared."""
    environment = FakeEnvironment({"maze/small/1": "go", "plain": "go"}, shows={"plain": "a plain board"})
    parts = [{"strategy": "similar_words", "limit": 3}, {"strategy": "explore", "limit": 2}]
    table = {
        "memory_strategy": "mix",
        "memory_mix": parts,
        "memory_entries": 1,
        "memory_tokens": 50,
        "memory_family": True,
    }
    made = await loop(["go"] * 2, [], environment=environment, algorithm=table, rollout=ONE)
    await made.step(0, ("maze/small/1", "plain"))
    asked = ReflectionQuery(
        "run",
        "fake",
        RetrievalStrategy.MIX,
        limit=5,
        version=2,
        text="board maze/small/1",
        task_prefix="maze/small/",
        max_tokens=50,
        mix=(MixPart(RetrievalStrategy.SIMILAR_WORDS, 3), MixPart(RetrievalStrategy.EXPLORE, 2)),
    )
    assert [query for query, _ in made.memory.queries] == [asked, replace(asked, text="a plain board", task_prefix="")]
    observing = {"run-s0-t0-o-x", "run-s0-t1-o-x"}
    assert observing <= set(environment.started) and observing <= set(environment.ended)


async def test_a_task_that_shows_nothing_is_played_without_memory() -> None:
    environment = FakeEnvironment({"t0": "go"}, shows={"t0": ""})
    made = await loop(["a"], ["go"], environment=environment, algorithm={"memory_strategy": "similar_words"})
    (one,) = await made.step()
    assert made.memory.queries == [] and reflections(one).endswith("memory=nothing yet")


class Changing(FakeMemory):
    """An entry of the versions before 2 was erased, and the keys were drawn for other entries."""

    said = ""  # which version can be read

    async def query(self, query: ReflectionQuery, trial: Trial | None = None) -> Retrieved:
        if query.version is not None and query.version < 2:
            error = DomainError(Reason.SNAPSHOT_REDACTED, "erased")
            error.metadata = {"version": self.said} if self.said else {}
            raise error
        if trial is not None:
            raise DomainError(Reason.REQUEST_CONFLICT, "drawn for other entries")
        return await super().query(replace(query, version=2))  # the newest


@pytest.mark.parametrize(("version", "said"), [(1, "2"), (1, ""), (1, "x"), (2, "")])
async def test_what_changed_since_the_step_began_is_read_without_a_trial(version: int, said: str) -> None:
    made = await loop(["a"], ["go"])
    changing = Changing(made.memory.entries, version=made.memory.version)
    changing.said = said
    made.memory = changing
    changing.version = version  # as the step's snapshot has it
    (one,) = await made.step()
    assert one.memory_entry_ids == ("new", "old") and one.memory_use_id == "" and changing.reported == {}


@pytest.mark.parametrize(
    ("given", "scope"),
    [(None, "run-1"), ("run", "run-1"), ("environment", "environment/fake"), ("global", "global"), ("mine", "mine")],
)
def test_words_for_scopes(given: str | None, scope: str) -> None:
    run = RunSettings.model_validate({"environment": "fake", "algorithm": {"memory_scope": given}})
    assert scope_of(run, "run-1") == scope


async def test_lessons_that_failed_and_episodes_are_written_too_if_wanted() -> None:
    table = {"memory_writes": "all", "memory_episodes": True, "memory_strategy": "latest_success"}
    made = await loop(["a", "a", "go"], ["go", "b"], texts=(), algorithm=table)
    await made.step()
    written = [
        (one.reflection_id, one.kind, one.text, one.provenance.success, one.provenance.reward_after)
        for one in made.memory.entries
    ]
    rule, episode = ReflectionKind.RULE, ReflectionKind.EPISODE
    assert written == [
        ("run-s0-t0-r0-reflection", rule, "rule 0", True, 1.0),
        ("run-s0-t0-r0-first", episode, "board t0>A;after a\nwrong", False, 0.0),
        ("run-s0-t0-r1-reflection", rule, "rule 1", False, 0.0),
        ("run-s0-t0-r1-first", episode, "board t0>A;after a\nwrong", False, 0.0),
        ("run-s0-t0-r2-first", episode, "board t0>GO;after go\nright", True, 1.0),
    ]
    (query, _) = made.memory.queries[0]
    assert query.kinds == (rule, ReflectionKind.DOCUMENT), "the paper's strategies show no episodes"


@pytest.mark.parametrize("episodes", [False, True])
async def test_no_reflection_is_written_where_the_memory_is_only_read(*, episodes: bool) -> None:
    made = await loop(["a", "go"], ["go"], texts=(), algorithm={"memory_writes": "none", "memory_episodes": episodes})
    await made.step()
    kinds = [one.kind for one in made.memory.entries]
    assert kinds == ([ReflectionKind.EPISODE] * 2 if episodes else [])


@pytest.mark.parametrize(("strategy", "count"), [("best_uplift", 1), ("latest_success", 3)])
async def test_equal_texts_are_one_entry_where_evidence_counts(strategy: str, count: int) -> None:
    table = {"memory_strategy": strategy, "memory_episodes": True}
    made = await loop(["a"] * 3, ["go"] * 3, texts=(), algorithm=table)
    made.policy.answer = lambda system, last, sampling: {"solve": "a", "reflect": "rule"}.get(system, "go")
    await made.step()
    for kind in (ReflectionKind.RULE, ReflectionKind.EPISODE):
        assert len([one for one in made.memory.entries if one.kind is kind]) == count


async def test_the_uplift_of_what_is_shown_is_told() -> None:
    made = await loop(["a", "go"], ["go"])
    known = Uplift(3, 1, 0.5, 0.25, 0.25, -1.0, 1.0)
    made.memory.entries[0] = replace(made.memory.entries[0], uplift=known)
    made.memory.entries[1] = replace(made.memory.entries[1], uplift=replace(known, uplift=None))
    await made.step()
    assert made.metrics["memory_uplift"] == 0.25


class WithoutEmbedder(FakeMemory):
    async def query(self, query: ReflectionQuery, trial: Trial | None = None) -> Retrieved:
        asked = {query.strategy, *(part.strategy for part in query.mix)}
        if RetrievalStrategy.SIMILAR_MEANING in asked:
            raise DomainError(Reason.NO_EMBEDDER, "no embedder")
        return await super().query(query, trial)


@pytest.mark.parametrize(
    ("table", "field"),
    [
        ({"memory_strategy": "similar_meaning"}, "algorithm.memory_strategy"),
        (
            {
                "memory_strategy": "mix",
                "memory_mix": [{"strategy": "explore"}, {"strategy": "similar_meaning"}],
            },
            "algorithm.memory_mix[1].strategy",
        ),
        ({"memory_strategy": "similar_words"}, ""),
        ({"memory_strategy": "similar_meaning", "memory_entries": 0}, ""),
    ],
)
async def test_a_strategy_that_the_service_cannot_answer_is_refused_at_once(table: dict[str, Any], field: str) -> None:
    run = RunSettings.model_validate({"environment": "fake", "algorithm": table})
    memory = WithoutEmbedder()
    if not field:
        await check_memory(memory, run, "scope")
        return
    with pytest.raises(DomainError) as caught:
        await check_memory(memory, run, "scope")
    assert caught.value.reason is Reason.INVALID_SETTING and caught.value.metadata["field"] == field
