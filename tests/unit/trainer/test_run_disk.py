"""A run whose disk is full waits and goes on; one whose folder is gone says so; whoever watches is told."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mulligan.common.errors import DomainError, Reason
from mulligan.common.inference import PublishedWeights
from mulligan.trainer import run as run_module
from mulligan.trainer.events import Entry, EventLog, NoticeEvent, StateEvent
from mulligan.trainer.folder import RunFolder, RunState
from mulligan.trainer.manager import RunManager
from mulligan.trainer.run import Run
from tests.support.effort import examples
from tests.support.small_disk import SmallDisk
from tests.support.waiting import until
from tests.unit.trainer.test_run import STEPS, World, sampled_parts

PLENTY = 10**9


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "_FIRST_DELAY_SECONDS", 0.001)
    monkeypatch.setattr(run_module, "_MAX_DELAY_SECONDS", 0.01)
    monkeypatch.setattr(run_module, "_LOOK_SECONDS", 0.001)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    world = World(tmp_path_factory.mktemp("whole"))
    asyncio.run(world.run().train())
    return world.result()


def completed(manager: RunManager, run_id: str) -> bool:
    return manager.record(run_id).state is RunState.COMPLETED


def notices(run: Run) -> list[str]:
    return [entry.event.text for entry in run.events.entries if isinstance(entry.event, NoticeEvent)]


def whole_frames(path: Path) -> int:
    """Bytes of the journal that are whole records."""
    unpacker = msgpack.Unpacker(max_buffer_size=2**31 - 1)
    unpacker.feed(path.read_bytes())
    count = 0
    for frame in unpacker:
        assert isinstance(frame, list) and len(frame) == 2
        count = unpacker.tell()
    return count


@settings(max_examples=examples(25), suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(rooms=st.lists(st.integers(0, 30_000), min_size=1, max_size=4))
def test_wherever_the_disk_is_full_a_run_waits_and_ends_as_if_it_had_not_been(
    tmp_path_factory: pytest.TempPathFactory, uninterrupted: Any, rooms: list[int]
) -> None:
    world = World(tmp_path_factory.mktemp("full"))

    async def train(run: Run, disk: SmallDisk) -> None:
        training = asyncio.create_task(run.train())
        for room in [*rooms[1:], PLENTY]:
            await until(lambda: bool(run.paused) or training.done())
            for path in world.folder.journal.glob("*"):
                assert whole_frames(path) == path.stat().st_size, "what found no room left nothing half-written"
            assert not list(world.folder.path.glob(".writing-*"))
            disk.room = room
        await asyncio.wait_for(training, 20)

    with pytest.MonkeyPatch.context() as patch:
        disk = SmallDisk(patch, rooms[0])
        run = world.run()
        asyncio.run(train(run, disk))
    assert world.result() == uninterrupted
    sampled = sampled_parts(world)
    assert len(sampled) == len(set(sampled))
    entries = EventLog(world.folder.events_file).entries
    assert entries == run.events.entries and [entry.number for entry in entries] == list(range(1, len(entries) + 1))
    if disk.refused:
        assert any(str(world.folder.path) in text and "is full" in text for text in notices(run))


async def follow(manager: RunManager, run_id: str) -> list[Entry]:
    """As WatchRun does."""
    run = manager.run(run_id)
    ended = lambda: manager.record(run_id).state is not RunState.RUNNING  # noqa: E731
    return [entry async for entry in run.events.follow(0, ended)]


@pytest.fixture
async def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
async def manager(world: World, tmp_path: Path) -> AsyncIterator[RunManager]:
    manager = RunManager(tmp_path, world.run().services)
    yield manager
    await manager.close()


async def test_a_pause_is_seen_told_and_stopped(
    world: World, manager: RunManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = SmallDisk(monkeypatch, 3000)
    manager.go_on()
    watching = asyncio.create_task(follow(manager, "run"))
    run = manager.run("run")
    await until(lambda: bool(run.paused))
    assert manager.record("run").state is RunState.RUNNING
    assert f"the disk of {world.folder.path}" in run.paused and "are missing (" in run.paused
    assert not watching.done(), "it goes on by itself"
    manager.stop("run")
    entries = await asyncio.wait_for(watching, 20)
    assert entries[-1].event == StateEvent(RunState.STOPPED)
    assert manager.record("run").state is RunState.STOPPED and manager.run_ids() == ["run"]
    disk.room = PLENTY
    assert manager.record("run").state is RunState.STOPPED
    assert RunFolder(world.folder.path).record().state is RunState.STOPPED, "written down when there is room"
    assert (await manager.resume("run")).run_id == "run"
    await until(partial(completed, manager, "run"))


async def test_a_failure_that_cannot_be_written_is_told(
    world: World, manager: RunManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = SmallDisk(monkeypatch, PLENTY)

    async def update_weights(weights: PublishedWeights, policy: str = "") -> float | None:
        disk.room = 0
        raise RuntimeError("the engine is on fire")

    world.policy.update_weights = update_weights  # type: ignore[method-assign]
    manager.go_on()
    entries = await asyncio.wait_for(follow(manager, "run"), 20)
    record = manager.record("run")
    assert entries[-1].event == StateEvent(RunState.FAILED, "RuntimeError: the engine is on fire", record.told)
    assert (record.state, record.error) == (RunState.FAILED, "RuntimeError: the engine is on fire")
    assert RunFolder(world.folder.path).record().state is RunState.RUNNING
    with pytest.raises(DomainError) as caught:
        await manager.resume("run")
    assert caught.value.reason is Reason.DISK_FULL and str(world.folder.path) in caught.value.message
    disk.room = PLENTY
    assert manager.record("run") == record == RunFolder(world.folder.path).record()
    assert EventLog(world.folder.events_file).entries == entries


async def test_nothing_of_a_run_that_finds_no_room_is_left(
    world: World, manager: RunManager, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    disk = SmallDisk(monkeypatch, 100)
    settings = world.folder.settings()
    with pytest.raises(DomainError) as caught:
        manager.start("other", settings)
    assert caught.value.reason is Reason.DISK_FULL and str(tmp_path / "other") in caught.value.message
    assert int(caught.value.metadata["needed_bytes"]) > 100 and manager.run_ids() == ["run"]
    assert not list((tmp_path / "other").iterdir())
    disk.room = PLENTY
    manager.start("other", settings)
    await until(partial(completed, manager, "other"))


async def test_another_services_full_disk_pauses_a_run(
    world: World, manager: RunManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder is not here, so there is nothing to look at: the run tries again."""
    failures = iter(range(3))
    add = world.memory.add

    async def full(*arguments: Any, **more: Any) -> str:
        if next(failures, None) is not None:
            raise DomainError(
                Reason.DISK_FULL, "the disk of /elsewhere is full", folder="/elsewhere", free_bytes=0, needed_bytes=0
            )
        return await add(*arguments, **more)

    monkeypatch.setattr(world.memory, "add", full)
    manager.go_on()
    entries = await asyncio.wait_for(follow(manager, "run"), 20)
    assert entries[-1].event == StateEvent(RunState.COMPLETED)
    told = [entry.event.text for entry in entries if isinstance(entry.event, NoticeEvent)]
    assert sum("paused: the disk of /elsewhere is full" in text for text in told) == 3


@pytest.mark.parametrize("where", ["run", "."])
async def test_a_run_whose_folder_is_removed_fails_and_says_so(
    world: World, manager: RunManager, tmp_path: Path, where: str
) -> None:
    settings = world.folder.settings()

    def remove(episode: str) -> None:
        if "-s2-" in episode:
            shutil.rmtree(tmp_path / where, ignore_errors=True)

    world.environment.fail = remove
    manager.go_on()
    entries = await asyncio.wait_for(follow(manager, "run"), 20)
    expected = f"the folder of the run, or a file in it, was removed: {world.folder.path}"
    assert entries[-1].event == StateEvent(RunState.FAILED, expected)
    record = manager.record("run")
    assert (record.state, record.error, manager.run_ids()) == (RunState.FAILED, expected, ["run"])
    assert not world.folder.path.exists(), "it is not made again"
    with pytest.raises(DomainError, match="UNKNOWN_RUN"):
        await manager.resume("run")
    world.environment.fail = lambda episode: None
    run = manager.start("run", settings)
    assert run.step == 0 and not run.events.steps()
    await until(partial(completed, manager, "run"))
    assert sorted(run.events.steps()) == list(range(STEPS))


async def test_a_folder_that_is_being_removed_is_told_like_one_that_is_gone(
    world: World, manager: RunManager, tmp_path: Path
) -> None:
    """`rm -rf` takes the files one by one: the journal may be gone while run.json is still there."""
    world.environment.fail = lambda episode: shutil.rmtree(tmp_path / "run" / "journal", ignore_errors=True)
    manager.go_on()
    entries = await asyncio.wait_for(follow(manager, "run"), 20)
    expected = f"the folder of the run, or a file in it, was removed: {world.folder.path}"
    assert entries[-1].event == StateEvent(RunState.FAILED, expected)


async def test_runs_are_listed_in_the_order_of_their_starts_whatever_the_clock_says(
    world: World, manager: RunManager
) -> None:
    settings = world.folder.settings()
    record = world.folder.record()
    ahead = record.created_at.replace(year=record.created_at.year + 3)
    world.folder.write_record(type(record)(record.run_id, RunState.COMPLETED, ahead, record.settings))
    for run_id in ("second", "third"):
        manager.start(run_id, settings)
        await until(partial(completed, manager, run_id))
    assert manager.run_ids() == ["third", "second", "run"]


@settings(max_examples=examples(15), suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(rooms=st.lists(st.integers(0, 60_000), min_size=1, max_size=3))
def test_steps_that_overlap_wait_for_the_disk_together(
    tmp_path_factory: pytest.TempPathFactory, rooms: list[int]
) -> None:
    changes: dict[str, Any] = {"deterministic": False, "rollout": {"max_staleness": 2, "concurrency": 3}}
    whole = World(tmp_path_factory.mktemp("whole"), **changes)
    asyncio.run(whole.run().train())
    world = World(tmp_path_factory.mktemp("full"), **changes)

    async def train(run: Run, disk: SmallDisk) -> None:
        training = asyncio.create_task(run.train())
        for room in [*rooms[1:], PLENTY]:
            await until(lambda: bool(run.paused) or training.done())
            disk.room = room
        await asyncio.wait_for(training, 20)

    with pytest.MonkeyPatch.context() as patch:
        disk = SmallDisk(patch, rooms[0])
        asyncio.run(train(world.run(), disk))
    assert world.result() == whole.result()
    sampled = sampled_parts(world)
    assert len(sampled) == len(set(sampled))
