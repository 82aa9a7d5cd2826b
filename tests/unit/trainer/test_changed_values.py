"""Files of a run whose values were changed: what decodes, and is of another type, size or time. Whatever it is, the
other runs stay listed, and a new one trains."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mulligan.common.errors import DomainError, Reason
from mulligan.trainer.client import _listed
from mulligan.trainer.events import EventLog
from mulligan.trainer.folder import RunFolder, RunRecord, RunState
from mulligan.trainer.journal import journaled_steps
from mulligan.trainer.manager import RunManager
from mulligan.trainer.servicer import RunServicer
from mulligan.trainer.v1 import run_service_pb2 as pb
from mulligan.trainer.wire import settings_to_proto
from tests.support.effort import examples
from tests.support.waiting import until
from tests.unit.trainer.test_damage import crashed
from tests.unit.trainer.test_run import World

FILES = ["run.json", "checkpoint.json", "environment.json", "events.jsonl", "history.jsonl"]
OTHER_RUNS = {"other", "third"}


def nested(depth: int) -> Any:
    """Tables in tables."""
    value: Any = 1
    for _ in range(depth):
        value = {"settings": value}
    return value


VALUES: list[Any] = [
    *(None, True, -1, 0, 1.5, 2**31, 2**53, 2**63, 2**64, -(2**63) - 1, 10**400, 1e308, -1e308),
    *("", "\0", "x" * 2_000_000, "run", "other", "../other", "running"),
    *("9999-12-31T23:59:59.999999Z", "0001-01-01T00:00:00+14:00", "2026-01-01T00:00:00", "2900-01-01T00:00:00Z"),
    *([], {}, [1], ["a"], {"name": []}, {"name": 5}, {"a": {"b": None}}, nested(50), nested(150), nested(900)),
]


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where each value of a document stands."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*at, key)
        yield from places(inner, (*at, key))


def changed(document: Any, place: tuple[Any, ...], value: Any) -> Any:
    *tables, last = place
    found = document
    for key in tables:
        found = found[key]
    found[last] = value
    return document


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A run that goes on in its fourth step."""
    return crashed(tmp_path_factory.mktemp("cut"))


class Trainer:
    """A run called "run" that goes on when the trainer starts, and one called "other"."""

    def __init__(self, folder: Path, cut: World):
        self.world = World(folder)
        self.path = self.world.folder.path
        self.world.learner, self.world.memory = copy.deepcopy((cut.learner, cut.memory))
        self.services = self.world.run().services
        shutil.rmtree(self.path)
        shutil.copytree(cut.folder.path, self.path)
        self.settings = self.world.folder.settings()
        other = RunFolder(folder / "other")
        other.create("other", self.settings)
        other.write_record(other.record().now(RunState.STOPPED))
        self.folder = folder

    def change(self, file: str, line: int, change: Callable[[Any], Any]) -> None:
        path = self.path / file
        lines = path.read_text().splitlines() if file.endswith("l") else [path.read_text()]
        document = json.loads(lines[line % len(lines)])
        document.pop("crc32")
        lines[line % len(lines)] = json.dumps(change(document))
        path.write_text("\n".join(lines) + "\n")

    async def check(self) -> dict[str, pb.Run]:
        """The runs by id, after another one has trained."""
        manager = RunManager(self.folder, self.services)
        servicer = RunServicer(manager)
        try:
            manager.go_on()
            if manager.active is not None:
                manager.active.stop()
            await until(lambda: manager.active is None)
            manager.start("third", self.settings)
            await until(lambda: manager.record("third").state is RunState.COMPLETED)
            assert manager.run_ids()[0] == "third", "the newest"
            answer = await servicer.ListRuns(pb.ListRunsRequest(), None)
            listed = {run.run_id: run for run in pb.ListRunsResponse.FromString(answer.SerializeToString()).runs}
            assert listed.keys() >= OTHER_RUNS
            for run in map(_listed, listed.values()):
                assert run.run_id not in OTHER_RUNS or (run.settings == self.settings and not run.error)
            await self._look_at_the_changed_one(servicer, manager)
            return listed
        finally:
            await manager.close()

    @staticmethod
    async def _look_at_the_changed_one(servicer: RunServicer, manager: RunManager) -> None:
        """Each call answers, or says what is wrong."""
        try:
            await servicer.GetRun(pb.GetRunRequest(run_id="run"), None)
            async for _ in servicer.WatchRun(pb.WatchRunRequest(run_id="run"), None):
                pass
            await servicer.ListExperiences(pb.ListExperiencesRequest(run_id="run"), None)
        except DomainError as error:
            if error.reason not in (Reason.STATE_DAMAGED, Reason.INVALID_SETTING):
                raise


def with_value(place: int, value: Any) -> Callable[[Any], Any]:
    """The document with another value at one of its places."""

    def change(document: Any) -> Any:
        found = list(places(document))
        return changed(document, found[place % len(found)], value)

    return change


@pytest.mark.timeout(900)
@pytest.mark.parametrize("file", FILES)
@settings(
    max_examples=examples(40), deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
@given(line=st.integers(0, 40), place=st.integers(0, 120), value=st.sampled_from(VALUES))
def test_a_changed_value_costs_its_run_at_most(
    tmp_path_factory: pytest.TempPathFactory, cut: World, file: str, line: int, place: int, value: Any
) -> None:
    trainer = Trainer(tmp_path_factory.mktemp("runs"), cut)
    trainer.change(file, line, with_value(place, value))
    assert "run" in asyncio.run(trainer.check())
    shutil.rmtree(trainer.folder)


CHANGES: list[tuple[str, tuple[Any, ...], Any, str]] = [
    ("run.json", ("created_at",), "2026-01-01T00:00:00", ""),
    ("run.json", ("created_at",), "9999-12-31T23:59:59.999999Z", ""),
    ("run.json", ("created_at",), "0001-01-01T00:00:00+14:00", "is no time in UTC"),
    ("run.json", ("run_id",), "other", "a copied folder is no run of its own"),
    ("run.json", ("settings", "environment"), 5, "environment: Input should be a valid string"),
    ("run.json", ("settings", "steps"), 10**400, "steps: the contract does not hold this value"),
    ("run.json", ("settings", "rollout", "tasks_per_step"), 2**31, "rollout.tasks_per_step: Input should be less"),
    ("run.json", ("settings", "rollout", "max_tokens"), 2**31, "rollout.max_tokens: the contract does not"),
    ("run.json", ("settings", "algorithm"), {"name": []}, "algorithm.name: expected one of"),
    ("run.json", ("settings", "algorithm", "advantage_settings"), nested(300), "advantage_settings"),
    ("run.json", ("settings", "model"), 7, "model: "),
    ("run.json", ("settings", "tracking", "project"), "x" * 5_000_000, "tracking.project: "),
    ("checkpoint.json", ("step",), 10**9, "name: expected one that ends in '-1000000000'"),
    ("checkpoint.json", ("step",), -1, "Expected `int` >= 0"),
    ("checkpoint.json", ("memory_version",), 2**64, "Expected `int`"),
]


@pytest.mark.parametrize(
    ("file", "place", "value", "said"),
    CHANGES,
    ids=[f"{file}-{'.'.join(at)}-{number}" for number, (file, at, _, _) in enumerate(CHANGES)],
)
async def test_what_is_wrong_with_a_run_is_told(
    tmp_path: Path, cut: World, file: str, place: tuple[Any, ...], value: Any, said: str
) -> None:
    trainer = Trainer(tmp_path, cut)
    trainer.change(file, 0, lambda document: changed(document, place, value))
    listed = (await trainer.check())["run"]
    assert said in listed.error and bool(said) == bool(listed.error)
    assert len(listed.error) < 10_000


@pytest.mark.parametrize("name", ["run (copy)", "_old", ".b", "q" * 80, "run\n", "läufe"])
async def test_a_folder_that_no_run_can_be_called_is_none(tmp_path: Path, cut: World, name: str) -> None:
    trainer = Trainer(tmp_path, cut)
    shutil.copytree(trainer.path, tmp_path / name)
    with structlog.testing.capture_logs() as logs:
        assert (await trainer.check()).keys() == {"run", *OTHER_RUNS}
    told = [entry for entry in logs if "no run can have its name" in entry["event"]]
    assert [entry["folder"] for entry in told] == [str(tmp_path / name)], "once"


async def test_a_copy_of_a_run_under_another_name_does_not_go_on_in_its_place(tmp_path: Path, cut: World) -> None:
    trainer = Trainer(tmp_path, cut)
    shutil.copytree(trainer.path, tmp_path / "zz")
    listed = await trainer.check()
    assert "a copied folder is no run of its own" in listed["zz"].error and listed["zz"].state == pb.RUN_STATE_FAILED
    assert listed["run"].state == pb.RUN_STATE_STOPPED and not listed["run"].error


async def test_a_large_run_hides_no_other(tmp_path: Path, cut: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mulligan.trainer.servicer._PAGE_BYTES", 200_000)
    trainer = Trainer(tmp_path, cut)
    trainer.change("run.json", 0, lambda document: changed(document, ("error",), "x" * 2**22))
    for number in range(5):
        folder = RunFolder(tmp_path / f"large-{number}")
        folder.create(folder.path.name, trainer.settings)
        record = folder.record()
        folder.write_record(RunRecord(record.run_id, RunState.FAILED, record.created_at, record.settings, "é" * 2**20))
    manager = RunManager(tmp_path, trainer.services)
    servicer = RunServicer(manager)
    seen: list[str] = []
    request = pb.ListRunsRequest()
    try:
        while True:
            answer = await servicer.ListRuns(request, None)
            assert answer.ByteSize() < 400_000
            seen += [run.run_id for run in answer.runs]
            if not answer.next_page_token:
                break
            request.page_token = answer.next_page_token
        assert len(seen) == len(set(seen)) == 7 and seen == manager.run_ids()
    finally:
        await manager.close()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("file", ["run.json", "checkpoint.json", "events.jsonl"])
async def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path: Path, cut: World, file: str) -> None:
    trainer = Trainer(tmp_path, cut)
    (trainer.path / file).unlink()
    os.mkfifo(trainer.path / file)
    assert f"{trainer.path / file} cannot be read" in (await trainer.check())["run"].error


async def test_a_document_without_end_is_not_read(tmp_path: Path, cut: World) -> None:
    trainer = Trainer(tmp_path, cut)
    with (trainer.path / "run.json").open("r+b") as file:
        file.truncate(2**40)
    assert "and at most 134,217,728 are read" in (await trainer.check())["run"].error


def test_a_client_that_cannot_read_the_settings_of_a_run_lists_it(cut: World) -> None:
    config = settings_to_proto(cut.folder.settings())
    config.evaluation.samples = -3
    [run] = map(_listed, [pb.Run(run_id="odd", config=config, state=pb.RUN_STATE_COMPLETED)])
    assert (run.run_id, run.settings.environment) == ("odd", "(unknown)")
    assert "its settings cannot be read here: evaluation.samples" in run.error


def test_files_that_are_no_steps_are_no_journal(cut: World, tmp_path: Path) -> None:
    journal = Path(shutil.copytree(cut.folder.journal, tmp_path / "journal"))
    before = journaled_steps(journal)
    for name in ("000001 (copy)", "x", "-00001", "٠٠٠٠٠١", "1", "99999999999999999999"):
        shutil.copy(journal / "000001.msgpack", journal / f"{name}.msgpack")
    assert journaled_steps(journal) == before == [0, 1, 2, 3]


def test_a_number_of_an_event_far_from_the_others_is_no_list_of_those_between(cut: World, tmp_path: Path) -> None:
    path = Path(shutil.copy(cut.folder.events_file, tmp_path))
    lines = path.read_text().splitlines()
    last = json.loads(lines[-1])
    number = last.pop("number")
    del last["crc32"]
    path.write_text("\n".join([*lines[:-1], json.dumps({"number": 2**52, **last})]) + "\n")
    assert EventLog(path).damage == [f"events that {path} lacks: {number} to {2**52 - 1}"]
