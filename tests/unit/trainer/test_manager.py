"""The runs of a trainer: what they may be called."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mulligan.common.errors import DomainError, Reason
from mulligan.trainer.folder import RunFolder, RunRecord, RunState
from mulligan.trainer.manager import RunManager
from mulligan.trainer.recall import scope_of
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
