"""The history in short is what the journal tells, whatever is missing of it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from mulligan.trainer.history import read_history, read_rounds
from mulligan.trainer.journal import journal_file
from tests.unit.trainer.test_run import CHOOSY, STEPS, World

RECORDED = Path(__file__).parent / "recorded"


@pytest.fixture(scope="module", params=CHOOSY)
def played(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World(tmp_path_factory.mktemp("played"), **request.param)
    asyncio.run(world.run().train())
    return world


def test_it_has_the_first_rewards_of_every_group(played: World) -> None:
    chains, *_ = played.result()
    history = read_history(played.folder, "fake", STEPS)
    groups = [group for one in history.rounds for group in one.groups]
    assert [(group.environment, group.task_id, reward) for group in groups for reward in group.rewards] == [
        (environment, task_id, reward) for _, environment, task_id, _, reward, *_ in chains
    ]
    for group in groups:
        assert group in history.of(group.task)
    assert sum(len(history.of(task)) for task in {group.task for group in groups}) == len(groups)


def test_what_is_missing_is_read_from_the_journal_and_written(played: World) -> None:
    file = played.folder.history_file
    whole = file.read_bytes()
    rounds = read_history(played.folder, "fake", STEPS).rounds
    lines = whole.splitlines(keepends=True)
    assert len(lines) == STEPS
    damaged = lines[1][:20] + b"\n"
    for content in (b"", b"".join(lines[2:]), whole[:-7], lines[0] + damaged + lines[2], whole + b'{"step": 9, "ro'):
        file.write_bytes(content)
        assert read_history(played.folder, "fake", STEPS).rounds == rounds
        written = file.read_bytes()
        assert read_history(played.folder, "fake", STEPS).rounds == rounds and file.read_bytes() == written
    file.unlink()
    assert read_history(played.folder, "fake", STEPS).rounds == rounds and file.read_bytes() == whole


def test_it_ends_before_the_present_step(played: World) -> None:
    assert {one.step for one in read_history(played.folder, "fake", 3).rounds} == {0, 1, 2}
    assert not read_history(played.folder, "fake", 0).rounds


def test_a_journal_from_before_samples_had_roles_has_a_history() -> None:
    (one,) = read_rounds(RECORDED / "journal-v1.msgpack", "lake")
    assert (one.step, one.number, one.horizon) == (1, 0, None)
    assert [group.task_id for group in one.groups] == ["t0", "t1", "t2"]
    assert all(group.environment == "lake" and len(group.rewards) == 2 for group in one.groups)


def test_steps_whose_journal_is_gone_are_passed_over(played: World, tmp_path: Path) -> None:
    world = World(tmp_path)
    asyncio.run(world.run().train())
    journal_file(world.folder.journal, 1).unlink()
    world.folder.history_file.unlink()
    assert [one.step for one in read_history(world.folder, "fake", 4).rounds] == [0, 2, 3]
