"""A loss of power: whatever was not synced is gone, and the run ends as if it had never been interrupted."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mulligan.common import state_files
from mulligan.common.files import make_folder
from mulligan.trainer.events import NoticeEvent
from tests.support.effort import examples
from tests.support.unsynced import UnsyncedDisk
from tests.unit.trainer.test_run import STEPS, Crash, World


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    world = World(tmp_path_factory.mktemp("whole"))
    asyncio.run(world.run().train())
    return world.result()


def lose_power_and_go_on(folder: Path, losses: list[int]) -> tuple[World, list[str]]:
    """A run whose machine loses power after so many calls each, and its notices."""
    with pytest.MonkeyPatch.context() as patch:
        disk = UnsyncedDisk(patch)
        world = World(folder)
        for budget in losses:
            world.budget = budget
            try:
                asyncio.run(world.run().train())
            except Crash:
                disk.lose_power(world.folder.path)
        world.budget = None
        run = world.run()
        asyncio.run(run.train())
        disk.close()
    assert sorted(run.events.steps()) == list(range(STEPS)) and run.summary()["test_success_before"] is not None
    return world, [entry.event.text for entry in run.events.entries if isinstance(entry.event, NoticeEvent)]


@example(losses=[70])
@settings(max_examples=examples(6), suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(losses=st.lists(st.integers(0, 90), min_size=1, max_size=3))
def test_after_a_loss_of_power_a_run_ends_as_if_there_had_been_none(
    tmp_path_factory: pytest.TempPathFactory, uninterrupted: Any, losses: list[int]
) -> None:
    world, notices = lose_power_and_go_on(tmp_path_factory.mktemp("lost"), losses)
    assert world.result() == uninterrupted
    assert not any("lost" in text or "damaged" in text for text in notices)


def test_events_that_are_not_synced_before_the_checkpoint_would_be_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_files.LineLog, "sync", lambda self: None)
    with pytest.raises(AssertionError):
        lose_power_and_go_on(tmp_path, [70])


def test_the_names_of_new_folders_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = UnsyncedDisk(monkeypatch)
    make_folder(tmp_path / "a" / "b")
    state_files.write_document(tmp_path / "a" / "b" / "state.json", {"x": 1})
    disk.lose_power(tmp_path)
    assert state_files.read_document(tmp_path / "a" / "b" / "state.json", dict[str, int], "") == {"x": 1}
    make_folder(tmp_path / "a" / "b")
    disk.close()
