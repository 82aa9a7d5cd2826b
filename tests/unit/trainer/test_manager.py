"""The runs of a trainer: what they may be called."""

from __future__ import annotations

import asyncio
import gc
import shutil
import weakref
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from mulligan.common.errors import DomainError, Reason
from mulligan.common.tasks import cancel
from mulligan.trainer.events import NoticeEvent, StateEvent
from mulligan.trainer.folder import RunFolder, RunRecord, RunState
from mulligan.trainer.interfaces import LearnerPort
from mulligan.trainer.manager import RunManager
from mulligan.trainer.recall import scope_of
from mulligan.trainer.settings import RunSettings
from tests.support.waiting import until
from tests.unit.trainer.test_run import World


async def test_no_run_gets_the_memory_that_runs_share_as_its_own(tmp_path: Path) -> None:
    world = World(tmp_path)
    settings = world.folder.settings()
    sharing = settings.model_copy(
        update={"algorithm": settings.algorithm.model_copy(update={"memory_scope": "global"})}
    )
    manager = RunManager(tmp_path, world.run().services)
    try:
        with pytest.raises(DomainError, match="'global' is the scope of the memory that runs share") as caught:
            manager.start(scope_of(sharing, "any"), settings)
        assert caught.value.reason is Reason.INVALID_FIELD and caught.value.metadata["field"] == "run_id"
        assert manager.run_ids() == ["run"] and not (tmp_path / "global").exists()
    finally:
        await manager.close()


async def test_a_run_of_that_name_of_an_earlier_release_goes_on(tmp_path: Path) -> None:
    world = World(tmp_path)
    record = world.folder.record()
    shutil.move(world.folder.path, tmp_path / "global")
    world.folder = RunFolder(tmp_path / "global")
    world.folder.write_record(RunRecord("global", RunState.STOPPED, record.created_at, record.settings))
    manager = RunManager(tmp_path, world.run().services)
    try:
        assert manager.start("global", world.folder.settings()).run_id == "global", "idempotent, as before"
        await manager.resume("global")
        await until(lambda: manager.record("global").state is RunState.COMPLETED)
    finally:
        await manager.close()


async def test_of_many_runs_the_recent_ones_are_kept_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Callers may look at any number of runs. One that somebody follows is the same object for all."""
    monkeypatch.setattr("mulligan.trainer.manager._RECENT_EVENTS", 50)
    world = World(tmp_path)
    settings = world.folder.settings()
    for place in range(30):
        folder = RunFolder(tmp_path / f"run-{place}")
        folder.create(f"run-{place}", settings, datetime.now(UTC))
        folder.write_record(folder.record().now(RunState.STOPPED))
    manager = RunManager(tmp_path, world.run().services)
    try:
        followed = manager.run("run-0")
        for _ in range(9):
            followed.events.add(NoticeEvent("told"))
        opened = [weakref.ref(manager.run(f"run-{place}")) for place in range(30) for _ in range(2)]
        gc.collect()
        assert len({id(run) for ref in opened if (run := ref()) is not None}) == 30, "each has one entry"
        for place in range(30):
            for _ in range(9):
                manager.run(f"run-{place}").events.add(NoticeEvent("told"))
            manager.run(f"run-{place}")
        gc.collect()
        alive = {run.run_id for ref in opened if (run := ref()) is not None}
        assert len(alive) <= 6 and {"run-0", "run-29"} <= alive
        assert manager.run("run-0") is followed
        assert len(manager.run("run-7").events.entries) == 9, "read again from its folder"
    finally:
        await manager.close()


async def test_what_comes_while_a_run_is_published_is_refused_until_its_caller_leaves(tmp_path: Path) -> None:
    world = World(tmp_path)
    await world.run().train()
    world.folder.write_record(world.folder.record().now(RunState.STOPPED))
    begun = asyncio.Event()

    async def open_learner(run_id: str, settings: RunSettings) -> LearnerPort:
        begun.set()
        await asyncio.Event().wait()
        raise AssertionError

    settings = world.folder.settings()
    services = world.run().services
    manager = RunManager(tmp_path, replace(services, open_learner=open_learner))
    try:
        publishing = asyncio.create_task(manager.publish("run"))
        await begun.wait()
        for call in (manager.publish("run"), manager.resume("run")):
            with pytest.raises(DomainError) as caught:
                await call
            assert caught.value.reason is Reason.LEARNER_OWNED
        with pytest.raises(DomainError) as caught:
            manager.start("new", settings)
        assert caught.value.reason is Reason.LEARNER_OWNED
        await cancel(publishing)
        manager._services = services
        started = [_started(manager, f"new-{place}", settings) for place in range(5)]
        assert started == [True, False, False, False, False]
        await until(lambda: manager.record("new-0").state is RunState.COMPLETED)
    finally:
        await manager.close()


async def test_a_run_in_which_something_is_cancelled_by_nobody_fails(tmp_path: Path) -> None:
    """And one that the trainer cancels, because it ends, goes on at its next start."""
    world = World(tmp_path)
    settings, services = world.folder.settings(), world.run().services
    begun = asyncio.Event()

    async def gone(run_id: str, settings: RunSettings) -> LearnerPort:
        raise asyncio.CancelledError

    async def slow(run_id: str, settings: RunSettings) -> LearnerPort:
        begun.set()
        await asyncio.Event().wait()
        raise AssertionError

    manager = RunManager(tmp_path, replace(services, open_learner=gone))
    try:
        run = manager.start("gone", settings)
        await until(lambda: manager.record("gone").state is RunState.FAILED)
        said = "something that the run waited for was cancelled, and nobody asked for it"
        assert manager.record("gone").error == said
        assert run.events.entries[-1].event == StateEvent(RunState.FAILED, said), "those who watch are told"
        manager._services = replace(services, open_learner=slow)
        manager.start("slow", settings)
        await begun.wait()
    finally:
        await manager.close()
    assert manager.record("slow").state is RunState.RUNNING


def _started(manager: RunManager, run_id: str, settings: RunSettings) -> bool:
    try:
        manager.start(run_id, settings)
    except DomainError as error:
        return error.reason is not Reason.LEARNER_OWNED
    return True
