"""A document that runs rewrite: one rewriting of a step, and what races, crashes and erasures leave of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.in_process import LocalMemory
from mulligan.common.errors import DomainError, Reason
from mulligan.common.reflections import (
    Labels,
    ReflectionKind,
    ReflectionQuery,
    ReflectionStatus,
    RetrievalStrategy,
    StoredReflection,
    UseOutcome,
)
from mulligan.memory.retrieval import retrieve
from mulligan.memory.store import Rewriting, Store
from mulligan.memory.stores import sqlite
from mulligan.trainer.document import RewrittenDocument
from mulligan.trainer.journal import StepCompleted, StepJournal
from tests.support.loop import Loop, in_turn
from tests.support.stores import ORIGIN, use
from tests.unit.trainer.test_memory_alone import Alone
from tests.unit.trainer.test_run import STEPS, Crash, crash

KEY = "lake rules"


class Interrupted(LocalMemory):
    """`before` happens once, before the next call of this name."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.store = store
        self.before: dict[str, Callable[[], Awaitable[object]]] = {}
        self.calls: list[str] = []

    async def _happen(self, name: str) -> None:
        self.calls.append(name)
        if name in self.before:
            await self.before.pop(name)()

    async def add(self, *args: Any, **more: Any) -> str:
        await self._happen("add")
        return await super().add(*args, **more)

    async def revise(self, *args: Any, **more: Any) -> int:
        await self._happen("revise")
        return await super().revise(*args, **more)


@pytest.fixture
async def memory(tmp_path: Path) -> AsyncIterator[Interrupted]:
    store = await sqlite.open(str(tmp_path / "memory.db"), sqlite.Settings())
    yield Interrupted(store)
    await store.close()


def document(memory: LocalMemory, run: str = "run-1") -> RewrittenDocument:
    return RewrittenDocument(memory, "global", KEY, run)


async def rewrite(memory: LocalMemory, text: str, step: int, run: str = "run-1") -> None:
    origin = replace(ORIGIN, run_id=run, experience_id=f"{run}-s{step}")
    await document(memory, run).rewrite(f"{run}-s{step}-reflection", text, origin, step)


async def read(memory: Interrupted, version: int | None = None) -> Sequence[StoredReflection]:
    """As runs read it, but all of the key."""
    strategy = RetrievalStrategy.BY_KEY
    query = ReflectionQuery("global", ORIGIN.environment, strategy, 9, version, key=KEY)
    return (await retrieve(query, memory.store)).reflections


async def history(memory: Interrupted) -> list[str]:
    """The texts of the document, one after the other."""
    texts: list[str] = []
    for version in range((await memory.store.snapshot("global")).version + 1):
        texts += [one.text for one in await read(memory, version) if one.text not in texts[-1:]]
    return texts


async def test_the_first_text_is_added_and_later_ones_are_revisions(memory: Interrupted) -> None:
    for step, text in enumerate(["one", "two", "two", "three"]):
        await rewrite(memory, text, step)
    (now,) = await read(memory)
    assert (now.text, now.revision, now.kind, now.key) == ("three", 3, ReflectionKind.DOCUMENT, KEY)
    assert now.tags == ("run:run-1@3",) and now.provenance.experience_id == "run-1-s0"
    assert await history(memory) == ["one", "two", "three"], "an equal text is no revision, and keeps its evidence"


async def test_each_environment_has_its_own(memory: Interrupted) -> None:
    await rewrite(memory, "lake", 0)
    await document(memory).rewrite("r", "maze", replace(ORIGIN, environment="maze"), 0)
    assert [one.text for one in await read(memory)] == ["lake"]


@pytest.mark.parametrize("found", [False, True])
async def test_two_runs_that_race_lose_nothing(memory: Interrupted, *, found: bool) -> None:
    """Both have read before either writes: a first text or a later one."""
    if found:
        await rewrite(memory, "begin", 0, "run-0")
    memory.before["revise" if found else "add"] = lambda: rewrite(memory, "faster", 1, "run-2")
    await rewrite(memory, "slower", 1)
    assert await history(memory) == ["begin"] * found + ["faster", "slower"]
    (now,) = await read(memory)
    assert now.tags == ("run:run-0@0",) * found + ("run:run-2@1", "run:run-1@1")


async def test_runs_at_the_same_time_write_one_document(memory: Interrupted) -> None:
    async def train(run: str) -> None:
        for step in range(8):
            await rewrite(memory, f"{run} {step}", step, run)

    await asyncio.gather(*(train(f"run-{n}") for n in range(4)))
    (now,) = await read(memory)
    texts = await history(memory)
    assert now.revision == len(texts) == 32 and len(set(texts)) == 32
    for run in range(4):
        assert [text for text in texts if text.startswith(f"run-{run} ")] == [f"run-{run} {n}" for n in range(8)]


async def test_who_is_slower_every_time_is_refused_and_has_written_nothing(memory: Interrupted) -> None:
    await rewrite(memory, "begin", 0)
    number = iter(range(1, 1000))

    async def faster() -> None:
        memory.before.clear()
        await rewrite(memory, f"other {next(number)}", next(number), "run-2")
        memory.before["revise"] = faster

    memory.before["revise"] = faster
    with pytest.raises(DomainError, match="64 times") as caught:
        await rewrite(memory, "slow", 1)
    assert caught.value.reason is Reason.REVISION_CONFLICT and "slow" not in await history(memory)


@pytest.mark.parametrize("others", [0, 1, 3])
async def test_a_step_that_crashed_after_its_write_writes_nothing_again(memory: Interrupted, others: int) -> None:
    await rewrite(memory, "mine", 4)
    for step in range(others):
        await rewrite(memory, f"theirs {step}", step, "run-2")
    before = (await memory.store.snapshot("global")).version
    await rewrite(memory, "mine", 4)
    await rewrite(memory, "an earlier one", 3)
    assert (await memory.store.snapshot("global")).version == before
    await rewrite(memory, "next", 5)
    assert [one.text for one in await read(memory)] == ["next"]


async def gone(memory: Interrupted, how: str) -> None:
    (now,) = await read(memory)
    if how == "retired":
        await memory.store.revise(Rewriting(now.reflection_id, how, now.revision, status=ReflectionStatus.RETIRED))
    else:
        await (memory.store.erase if how == "erased" else memory.store.delete)(now.reflection_id)


@pytest.mark.parametrize("how", ["deleted", "erased", "retired"])
async def test_what_is_gone_is_added_anew_and_stays_gone(memory: Interrupted, how: str) -> None:
    await rewrite(memory, "a secret text", 0)
    await gone(memory, how)
    assert await read(memory) == ()
    await rewrite(memory, "one", 1)
    await rewrite(memory, "two", 2)
    (now,) = await read(memory)
    assert (now.text, now.revision) == ("two", 2)
    await gone(memory, how)
    await rewrite(memory, "three", 3, "run-2")
    (again,) = await read(memory)
    assert again.text == "three" and again.reflection_id != now.reflection_id
    texts = [one.text for one in (await memory.store.list("global", 0, 9, True)).reflections]
    assert texts == {"erased": ["", "", "three"]}.get(how, ["a secret text", "two", "three"])


async def test_what_goes_between_read_and_write_is_added_anew(memory: Interrupted) -> None:
    await rewrite(memory, "one", 0)
    memory.before["revise"] = lambda: gone(memory, "erased")
    await rewrite(memory, "two", 1)
    assert [one.text for one in await read(memory)] == ["two"] and memory.calls[-2:] == ["add", "add"]


async def test_two_runs_that_find_it_gone_add_one(memory: Interrupted) -> None:
    await rewrite(memory, "one", 0)
    await gone(memory, "deleted")
    await asyncio.gather(*(rewrite(memory, f"by {n}", 1, f"run-{n}") for n in range(2, 6)))
    (now,) = await read(memory)
    assert now.revision == 4 and {tag[-7:] for tag in now.tags} == {f"run-{n}@1" for n in range(2, 6)}


async def test_a_document_that_harms_gets_another_chance_with_its_next_text(memory: Interrupted) -> None:
    await rewrite(memory, "holes are safe", 0)
    (bad,) = await read(memory)
    reported = (await memory.store.snapshot("global")).version
    await harm_in_global(memory, bad.reflection_id)
    assert await read(memory) == () and (await memory.store.snapshot("global")).version > reported
    await rewrite(memory, "holes drown", 1)
    (now,) = await read(memory)
    assert now.reflection_id == bad.reflection_id and now.uplift is None
    assert (now.text, now.revision, now.status) == ("holes drown", 2, ReflectionStatus.CANDIDATE)


async def harm_in_global(memory: Interrupted, identity: str) -> None:
    """Reports uses from which it follows that the entry harms."""
    drawn = [use(str(n), [identity], identity if n % 2 else "", scope="global") for n in range(80)]
    await memory.store.record_uses(drawn)
    await memory.store.report([UseOutcome(one.use_id, float(bool(one.left_out_id))) for one in drawn])


async def test_tags_of_others_stay_and_the_oldest_of_runs_give_way(memory: Interrupted) -> None:
    labels = Labels(ReflectionKind.DOCUMENT, KEY, ("checked", *(f"run:old-{n}@7" for n in range(31))))
    await memory.add("by hand", "global", "from the manual", ORIGIN, labels)
    await rewrite(memory, "one", 0)
    await rewrite(memory, "two", 1)
    (now,) = await read(memory)
    assert now.tags == ("checked", *(f"run:old-{n}@7" for n in range(1, 31)), "run:run-1@1")
    labels = Labels(ReflectionKind.DOCUMENT, KEY, tuple(map(str, range(32))))
    await memory.add("by hand, too", "global", "another manual", ORIGIN, labels)
    await rewrite(memory, "three", 2)
    now, _ = await read(memory)
    assert (now.text, now.tags) == ("three", labels.tags), "its own tags leave no room"


@pytest.mark.parametrize("readers", ["reflector", "first"])
async def test_of_a_step_the_best_rewrites_and_the_next_step_reads_it(readers: str) -> None:
    """The second attempts of the first step earn 0, 1, 1, 0."""
    table = {"memory_document": KEY, "memory_readers": readers, "memory_writes": "all", "memory_holdout": 0.0}
    made = Loop(in_turn("aaaa", ["b", "go", "go", "b"] * 2), algorithm=table)
    await made.step()
    (entry,) = made.memory.entries
    assert (entry.text, entry.kind, entry.key, entry.tags) == ("rule 2", ReflectionKind.DOCUMENT, KEY, ("run:run@0",))
    assert entry.provenance.experience_id == "run-s0-t0-r2" and entry.provenance.reward_after == 1.0
    told = "rule 2\nanswer with a word"
    answers = {"reflect": iter(f"rule {n}" for n in range(4, 9)), "solve": iter("aaaa"), told: iter("aaaa")}
    later = iter(["b", "b", "b", "b"])
    made.policy.answer = lambda system, last, sampling: next(answers.get(system, later))
    experiences = await made.step(1)
    asked = [query for query, _ in made.memory.queries if query.strategy is RetrievalStrategy.BY_KEY]
    assert [(query.key, query.kinds) for query in asked] == [(KEY, (ReflectionKind.DOCUMENT,))] * 2
    assert [one.memory_entry_ids for one in experiences] == [(entry.reflection_id,)] * 4
    if readers == "first":
        assert {one["first"].system for one in experiences} == {told}
    else:
        assert {one["reflection"].turns[0].observation[-13:] for one in experiences} == {"memory=rule 2"}
    ((_, now),) = made.memory.revisions
    assert (now.text, now.revision, now.tags) == ("rule 7", 2, ("run:run@1",)), "of equal ones the latest"


async def test_a_document_of_each_environment_and_episodes_as_ever() -> None:
    table = {"memory_document": KEY, "memory_episodes": True}
    made = Loop(in_turn(["a", "go"], ["go"]), rollout={"rollouts_per_task": 2}, algorithm=table)
    await made.step()
    kinds = [(one.kind, one.key, one.text) for one in made.memory.entries]
    assert [kind for kind, _, _ in kinds] == ["document", "episode", "episode"] and kinds[0][1:] == (KEY, "rule 0")
    other = Loop(in_turn(["a"], ["b"]), rollout={"rollouts_per_task": 1}, algorithm=table)
    await other.step()
    assert [one.kind for one in other.memory.entries] == ["episode"], "it did not help: only successes rewrite"


def alone(folder: Path) -> Alone:
    """Its document is rewritten at several steps, by the latest success of each."""
    algorithm = {"memory_document": KEY, "memory_readers": "first", "memory_writes": "all"}
    return Alone(folder, algorithm=algorithm)


def left(world: Alone) -> Any:
    revisions = [(one.text, one.revision, one.tags) for _, one in world.memory.revisions]
    return world.result(), revisions, world.memory.reported


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    world = alone(tmp_path_factory.mktemp("whole"))
    asyncio.run(world.run().train())
    return left(world)


def test_a_run_rewrites_its_document(uninterrupted: Any) -> None:
    (_, _, _, written, _, _), revisions, reported = uninterrupted
    assert len(written) == 1 and len(revisions) >= 2 and reported


@pytest.mark.parametrize("crashes", [[0], [3, 9], [17, 40], [31, 5, 1], [58]])
def test_a_crash_anywhere_changes_nothing(tmp_path: Path, uninterrupted: Any, crashes: list[int]) -> None:
    world = alone(tmp_path)
    crash(world, crashes, 20)
    assert left(world) == uninterrupted


@pytest.mark.parametrize("place", range(STEPS))
def test_a_crash_between_the_write_and_the_journal_changes_nothing(
    tmp_path: Path, uninterrupted: Any, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    finish = StepJournal.finish

    def dies(journal: StepJournal, record: StepCompleted) -> None:
        if record.step == place:
            raise Crash
        finish(journal, record)

    world = alone(tmp_path)
    monkeypatch.setattr(StepJournal, "finish", dies)
    with pytest.raises(Crash):
        asyncio.run(world.run().train())
    monkeypatch.undo()
    asyncio.run(world.run().train())
    assert left(world) == uninterrupted


def test_a_step_that_is_complete_brings_nothing_back(tmp_path: Path) -> None:
    """The run dies in step 1, before a checkpoint, and the document is deleted before it goes on."""
    world = alone(tmp_path)

    def dies(episode: str) -> None:
        if "-s1-" in episode:
            raise Crash

    world.environment.fail = dies
    with pytest.raises(Crash):
        asyncio.run(world.run().train())
    (entry,) = world.memory.entries
    assert entry.provenance.experience_id.startswith("run-s0-") and world.folder.checkpoint().step == 0  # type: ignore[union-attr]
    world.memory.delete(entry.reflection_id)
    world.environment.fail = lambda episode: None
    asyncio.run(world.run().train())
    _, again = world.memory.entries
    assert not again.provenance.experience_id.startswith("run-s0-")
