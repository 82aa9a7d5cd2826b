"""Damaged files of a run: what each kind of damage costs, that it is told, and that other runs go on."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mulligan.common.errors import DomainError, Reason
from mulligan.trainer import journal as journal_module
from mulligan.trainer.events import EventLog, NoticeEvent, StateEvent
from mulligan.trainer.folder import RunFolder, RunState
from mulligan.trainer.journal import (
    GroupsReplaced,
    SampleRecorded,
    SamplingBegan,
    StepJournal,
    StepStarted,
    journal_file,
    read_experiences,
    read_metrics,
    read_records,
)
from mulligan.trainer.manager import RunManager
from mulligan.trainer.run import Run
from mulligan.trainer.servicer import RunServicer
from mulligan.trainer.v1 import run_service_pb2 as pb
from tests.support.damage import Damage, damages
from tests.support.effort import examples
from tests.support.waiting import until
from tests.unit.trainer.test_run import STEPS, Crash, World

IN_A_FOLDER = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


def notices(run: Run) -> list[str]:
    return [entry.event.text for entry in run.events.entries if isinstance(entry.event, NoticeEvent)]


def records(path: Path) -> tuple[list[Any], list[journal_module.Damage]]:
    told: list[journal_module.Damage] = []
    return [record for record, _ in read_records(path, told.append)], told


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A run that is complete."""
    world = World(tmp_path_factory.mktemp("whole"))
    asyncio.run(world.run().train())
    return world


@pytest.fixture
def copy(whole: World, tmp_path: Path) -> RunFolder:
    return RunFolder(Path(shutil.copytree(whole.folder.path, tmp_path / "run")))


# -- the journal


@settings(max_examples=examples(300), suppress_health_check=IN_A_FOLDER)
@given(data=st.data())
def test_damage_of_a_journal_costs_the_records_that_it_touches(
    whole: World, tmp_path: Path, data: st.DataObject
) -> None:
    original = journal_file(whole.folder.journal, 1)
    content = original.read_bytes()
    written = list(read_records(original))
    damage = data.draw(damages(len(content)))
    path = tmp_path / original.name
    path.write_bytes(damage.of(content))
    found, told = records(path)
    assert found == [record for record, _ in written if record in found], "as they were written, in order"
    begin = 0
    for record, end in written:
        if not damage.touches(begin, end):
            assert record in found
        begin = end
    for one in told:
        assert one.begin < one.end and str(one) == f"bytes {one.begin} to {one.end} of {path} are damaged"
    lost_before_others = len(found) < len(written) and bool(found) and found[-1] == written[-1][0]
    cut_at_records = {damage.begin, damage.end} <= {0, *(end for _, end in written)} and not damage.change
    assert bool(told) or not lost_before_others or cut_at_records
    read_experiences(path)
    read_metrics(path)


def _lose(path: Path, lost: Callable[[Any], bool]) -> None:
    """Damages the first record of which this is true."""
    content = path.read_bytes()
    begin = 0
    for record, end in read_records(path):
        if lost(record):
            path.write_bytes(Damage(begin + (end - begin) // 2, end - 1, 7).of(content))
            return
        begin = end
    raise AssertionError("there is no such record")


def test_an_experience_of_which_a_sample_is_lost_is_left_out(copy: RunFolder) -> None:
    path = journal_file(copy.journal, 1)
    before = read_experiences(path)
    _lose(path, lambda record: isinstance(record, SampleRecorded))
    after = read_experiences(path)
    assert len(after) == len(before) - 1 and all(chain in before for chain in after)


def crashed(folder: Path, **changes: Any) -> World:
    """A run that was cut within its fourth step; its checkpoint is after two."""
    world = World(folder, **changes)

    def crash(episode: str) -> None:
        if "-s3-t1" in episode:
            raise Crash

    world.environment.fail = crash
    with pytest.raises(Crash):
        asyncio.run(world.run().train())
    world.environment.fail = lambda episode: None
    return world


@pytest.mark.parametrize("step", [2, 3])
@settings(max_examples=examples(8), suppress_health_check=IN_A_FOLDER)
@given(data=st.data())
def test_a_run_goes_on_whatever_is_damaged_of_a_step_that_it_resumes(
    tmp_path_factory: pytest.TempPathFactory, whole: World, step: int, data: st.DataObject
) -> None:
    world = crashed(tmp_path_factory.mktemp("cut"))
    path = journal_file(world.folder.journal, step)
    content = path.read_bytes()
    damage = data.draw(damages(len(content)))
    _, start = next(iter(read_records(path)))
    path.write_bytes(damage.of(content))
    run = world.run()
    asyncio.run(run.train())
    assert run.step == STEPS and sorted(run.events.steps()) == list(range(STEPS))
    aside = [one for one in world.folder.journal.iterdir() if "set-aside" in one.name]
    assert all(f"step {step} is sampled again" in " ".join(notices(run)) for _ in aside)
    if not aside and damage.begin >= start:  # else it may begin with a newer version of the memory
        assert world.result() == whole.result(), "what was lost is sampled again, as it was"


@pytest.mark.parametrize(
    ("lost", "changes", "why"),
    [
        (StepStarted, {}, "which tasks it plays is lost"),
        (
            GroupsReplaced,
            {"algorithm": {"name": "rlvr"}, "rollout": {"replace_rounds": 2}, "sampler": {"name": "weakest"}},
            "which tasks it plays",
        ),
        (SamplingBegan, {"rollout": {"max_staleness": 1}, "deterministic": False}, "which weights its samples have"),
    ],
)
def test_a_step_is_sampled_again_where_its_samples_cannot_be_understood(
    tmp_path: Path, lost: type, changes: dict[str, Any], why: str
) -> None:
    world = crashed(tmp_path, **changes)
    path = journal_file(world.folder.journal, 2)
    _lose(path, lambda record: isinstance(record, lost))
    damaged = path.read_bytes()
    run = world.run()
    asyncio.run(run.train())
    [told] = [text for text in notices(run) if str(path) in text]
    assert "are damaged: step 2 is sampled again, because " + why in told
    assert (path.parent / f"{path.name}.set-aside-0").read_bytes() == damaged
    assert run.step == STEPS and not records(path)[1]


def test_a_lost_sample_alone_is_sampled_again(tmp_path: Path, whole: World) -> None:
    world = crashed(tmp_path)
    path = journal_file(world.folder.journal, 2)
    _lose(path, lambda record: isinstance(record, SampleRecorded))
    journal = StepJournal(world.folder.journal, 2)
    assert journal.experiences == 3, "the one that lost a sample is not complete"
    journal.close()
    run = world.run()
    asyncio.run(run.train())
    assert world.result() == whole.result()
    [told] = [text for text in notices(run) if "are damaged" in text]
    assert told.endswith("what step 2 lost there is sampled again") and str(path) in told


# -- events


def lose_events(folder: RunFolder, *numbers: int) -> None:
    lines = folder.events_file.read_bytes().splitlines(keepends=True)
    for number in numbers:
        lines[number - 1] = lines[number - 1][:25] + b"\n"
    folder.events_file.write_bytes(b"".join(lines))


def test_lost_events_are_named_and_those_of_steps_come_from_the_journal(tmp_path: Path, whole: World) -> None:
    world = crashed(tmp_path)
    log = EventLog(world.folder.events_file)
    numbers = {
        type(entry.event).__name__ + str(getattr(entry.event, "step", "")): entry.number for entry in log.entries
    }
    lose_events(world.folder, numbers["StepEvent1"], numbers["EvaluationEvent0"])
    run = world.run()
    asyncio.run(run.train())
    assert sorted(run.events.steps()) == list(range(STEPS)), "the journal has the metrics"
    told = notices(run)
    for number in (numbers["StepEvent1"], numbers["EvaluationEvent0"]):
        assert any(f"line {number} of {world.folder.events_file}" in text and "is damaged" in text for text in told)
    assert "lost from events.jsonl: evaluations before steps 0. summary.json is without them" in told
    summary = json.loads((world.folder.path / "summary.json").read_text())
    expected = whole.run().summary()
    assert summary["test_success_before"] is None and summary["rollouts"] == expected["rollouts"]
    assert [one["step"] for one in summary["evaluations"]] == [2, 4, 5]
    again = EventLog(world.folder.events_file)
    assert again.entries == run.events.entries
    assert len({entry.number for entry in again.entries}) == len(again.entries)


def test_a_run_ends_without_the_metrics_that_nothing_has(tmp_path: Path) -> None:
    world = crashed(tmp_path)
    world.folder.events_file.unlink()
    journal_file(world.folder.journal, 0).unlink()
    run = world.run()
    asyncio.run(run.train())
    assert run.step == STEPS and sorted(run.events.steps()) == [1, 2, 3, 4]
    assert any("metrics of steps 0; evaluations before steps 0" in text for text in notices(run))
    assert run.summary()["test_success_before"] is None


async def test_a_watcher_gets_what_comes_after_a_number_although_events_are_lost(copy: RunFolder) -> None:
    before = EventLog(copy.events_file).entries
    lose_events(copy, 2, 3, len(before))
    log = EventLog(copy.events_file)
    assert any(f"events that {copy.events_file} lacks: 2, 3" in text for text in log.damage)
    log.add(NoticeEvent("new"))
    ended = lambda: True  # noqa: E731
    assert [entry.number async for entry in log.follow(3, ended)] == [*range(4, len(before)), len(before) + 1]
    assert [entry.number async for entry in log.follow(len(before), ended)] == [len(before) + 1]


# -- documents, and other runs

FILES = ["run.json", "checkpoint.json", "environment.json", "events.jsonl", "history.jsonl", "journal/000002.msgpack"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("how", ["garbage", "empty", "a folder"])
async def test_a_damaged_file_of_a_run_leaves_the_others_alone(tmp_path: Path, file: str, how: str) -> None:
    world = World(tmp_path)
    settings = world.folder.settings()
    folder = RunFolder(tmp_path / "bad")
    folder.create("bad", settings)
    world.folder.write_record(world.folder.record().now(RunState.STOPPED))
    path = folder.path / file
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if how == "a folder":
        path.mkdir()
    else:
        path.write_bytes(b"\xff{]" if how == "garbage" else b"")
    manager = RunManager(tmp_path, world.run().services)
    try:
        manager.go_on()
        await until(lambda: file == "run.json" or manager.record("bad").state is not RunState.RUNNING)
        await manager.resume("run")
        await until(lambda: manager.record("run").state is RunState.COMPLETED)
        assert set(manager.run_ids()) == {"run", "bad"}
        listed = {run.run_id: run for run in (await RunServicer(manager).ListRuns(pb.ListRunsRequest(), None)).runs}
        assert listed["run"].state == pb.RUN_STATE_COMPLETED and not listed["run"].error
        if file == "run.json":
            assert listed["bad"].state == pb.RUN_STATE_FAILED and listed["bad"].config.environment == "(unknown)"
            assert f"{path} " in listed["bad"].error and "put a copy of the file back" in listed["bad"].error
            for call in (manager.run, manager.record, manager.stop, lambda run_id: manager.start(run_id, settings)):
                with pytest.raises(DomainError, match="STATE_DAMAGED"):
                    call("bad")
        elif listed["bad"].state == pb.RUN_STATE_FAILED:
            assert str(path) in listed["bad"].error
        else:
            assert listed["bad"].state == pb.RUN_STATE_COMPLETED
        manager.start("third", settings)
        await until(lambda: manager.record("third").state is RunState.COMPLETED)
        assert manager.run_ids()[0] == "third"
    finally:
        await manager.close()


async def test_a_run_goes_on_when_its_damaged_checkpoint_file_is_put_back_or_removed(tmp_path: Path) -> None:
    world = await asyncio.to_thread(crashed, tmp_path)
    path = world.folder.path / "checkpoint.json"
    good = path.read_bytes()
    services = world.run().services
    path.write_bytes(good.replace(b'"step": 2', b'"step": 3'))
    manager = RunManager(tmp_path, services)
    try:
        manager.go_on()
        record = manager.record("run")
        assert record.state is RunState.FAILED and record.error.startswith(
            f"STATE_DAMAGED: {path} is damaged: its crc32"
        )
        with pytest.raises(DomainError) as caught:
            await manager.resume("run")
        assert caught.value.reason is Reason.STATE_DAMAGED and caught.value.metadata == {"file": str(path)}
        path.write_bytes(good)
        run = await manager.resume("run")
        assert run.step == 2
        await until(lambda: manager.record("run").state is RunState.COMPLETED)
        assert run.events.entries[-1].event == StateEvent(RunState.COMPLETED)
    finally:
        await manager.close()
