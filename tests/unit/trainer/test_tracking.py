"""Writers that fail, hang or are not there: the run does not notice."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Iterator, Mapping
from datetime import datetime
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest

from mulligan.common.errors import DomainError, Reason
from mulligan.common.extras import MissingExtra
from mulligan.trainer import tracking
from mulligan.trainer.admission import RunAdmission
from mulligan.trainer.events import EventLog, StepEvent
from mulligan.trainer.metric_writers import METRIC_WRITERS, TrackedRun, check_writers, require
from mulligan.trainer.settings import RunSettings, TrackingSettings
from mulligan.trainer.tracking import Tracking, without_secrets
from mulligan.trainer.v1.run_config_pb2 import RunConfig, TrackingConfig
from mulligan.trainer.wire import settings_from_proto, settings_to_proto
from tests.support.waiting import until

NAME = "made_metric_writer"


class MadeWriter(ModuleType):
    """A writer that is a module. `broken` is what it raises; `hangs` keeps it waiting."""

    def __init__(self) -> None:
        super().__init__(NAME)
        self.__spec__ = ModuleSpec(NAME, None)
        self.steps: list[int] = []
        self.runs: list[TrackedRun] = []
        self.broken: BaseException | None = None
        self.free = threading.Event()
        self.free.set()
        self.closed = 0

    def check(self) -> None:
        pass

    def open(self, run: TrackedRun) -> MadeWriter:
        self.runs.append(run)
        return self

    def write(self, step: int, metrics: Mapping[str, float], time: datetime) -> None:
        self.free.wait(20)
        if self.broken is not None:
            raise self.broken
        self.steps.append(step)

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> Iterator[MadeWriter]:
    made = MadeWriter()
    monkeypatch.setitem(sys.modules, NAME, made)
    yield made
    made.free.set()


@pytest.fixture
def notices() -> list[str]:
    return []


def opened(folder: Path, log: EventLog, notices: list[str]) -> Tracking:
    return Tracking("run-1", folder, TrackingSettings(writers=(NAME,)), {"steps": 2}, log, notices.append)


async def test_a_resumed_run_writes_each_step_once(tmp_path: Path, writer: MadeWriter, notices: list[str]) -> None:
    for step in range(3):
        log = EventLog(tmp_path / "events.jsonl")
        async with opened(tmp_path, log, notices):
            log.add(StepEvent(step, {"seconds": 1.0}))
    assert writer.steps == [0, 1, 2] and writer.closed == 3 and not notices
    assert {(run.run_id, run.project, run.folder) for run in writer.runs} == {
        ("run-1", "mulligan", tmp_path / "tracking" / NAME)
    }


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (OSError("no network"), "OSError: no network"),
        (SystemExit("no network"), "SystemExit: no network"),
        (asyncio.CancelledError("timed out"), "CancelledError: timed out"),
    ],
)
async def test_a_failing_writer_is_told_of_once_and_gets_the_steps_later(
    tmp_path: Path, writer: MadeWriter, notices: list[str], broken: BaseException, said: str
) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    writer.broken = broken
    async with opened(tmp_path, log, notices):
        for step in range(3):
            log.add(StepEvent(step, {}))
            await asyncio.sleep(0.05)
        assert writer.steps == []
        writer.broken = None
        log.add(StepEvent(3, {}))
    assert writer.steps == [0, 1, 2, 3]
    (text,) = notices
    assert text == f"metrics do not reach {NAME}: {said}. The run goes on, and tries again"


async def test_a_hanging_writer_keeps_nothing_waiting(
    tmp_path: Path, writer: MadeWriter, notices: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "CLOSE_SECONDS", 0.2)
    writer.free.clear()
    log = EventLog(tmp_path / "events.jsonl")
    loop = asyncio.get_running_loop()
    async with opened(tmp_path, log, notices):
        began = loop.time()
        for step in range(100):
            log.add(StepEvent(step, {}))
            await asyncio.sleep(0)
    assert loop.time() - began < 10  # a write hangs for 20 seconds
    assert writer.steps == []
    writer.free.set()
    monkeypatch.undo()
    sys.modules[NAME] = writer
    try:
        async with opened(tmp_path, EventLog(tmp_path / "events.jsonl"), notices):
            pass
    finally:
        del sys.modules[NAME]
    assert writer.steps == list(range(100))


async def test_of_runs_that_ended_nothing_is_kept(tmp_path: Path, writer: MadeWriter, notices: list[str]) -> None:
    """Their names are the callers', and a trainer has runs without end."""

    def is_kept() -> bool:
        with tracking._FOLDERS_LOCK:  # writers add to it in threads
            return any(folder.is_relative_to(tmp_path) for folder in tracking._FOLDERS)

    for number in range(5):
        async with opened(tmp_path / f"run-{number}", EventLog(tmp_path / f"{number}.jsonl"), notices):
            await until(is_kept)
    assert not is_kept()


async def test_a_writer_that_is_gone_is_a_notice_of_a_resumed_run(tmp_path: Path, notices: list[str]) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    async with opened(tmp_path, log, notices):
        log.add(StepEvent(0, {}))
        await asyncio.sleep(0.2)
    assert len(notices) == 1 and f"there is no metric writer '{NAME}'" in notices[0]


async def test_an_unknown_writer_is_refused_with_the_nearest_name() -> None:
    settings = RunSettings(environment="e", tracking=TrackingSettings(writers=("tensorbord",)))
    with pytest.raises(DomainError) as refused:
        await RunAdmission().check(None, "run-1", settings)
    assert refused.value.reason is Reason.INVALID_SETTING
    assert refused.value.metadata["field"] == "tracking.writers[0]"
    assert "did you mean 'tensorboard'?" in refused.value.message
    assert "mlflow, tensorboard, trackio, wandb" in refused.value.message


@pytest.mark.parametrize(
    ("name", "address", "key"),
    [("mlflow", "MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_TOKEN"), ("wandb", "WANDB_BASE_URL", "WANDB_API_KEY")],
)
def test_a_writer_sends_its_key_over_tls_alone(
    name: str, address: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(METRIC_WRITERS.find(name), "check", lambda: None)  # installed or not
    for variable in (*METRIC_WRITERS.find(name).KEYS, address):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(address, "http://192.0.2.2:5000")
    check_writers([name])
    monkeypatch.setenv(key, "SECRET")
    with pytest.raises(DomainError, match=rf"tracking\.writers\[0\]: {address}: the key for http://192\.0\.2\.2:5000"):
        check_writers([name])
    check_writers([name], insecure=True)
    for allowed in ("https://example.org", "http://127.0.0.1:5000"):
        monkeypatch.setenv(address, allowed)
        check_writers([name])
    monkeypatch.setenv(address, "https://me:SECRET@example.org")
    with pytest.raises(DomainError, match="expected an address without a user or a password") as refused:
        check_writers([name], insecure=True)
    assert "SECRET" not in refused.value.message


@pytest.mark.parametrize("name", METRIC_WRITERS.built_in)
def test_a_writer_that_is_not_installed_is_refused_with_its_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mulligan.trainer.metric_writers.find_spec", lambda module: None)
    with pytest.raises(DomainError, match=rf"tracking\.writers\[0\]: '{name}' needs the extra '{name}'"):
        check_writers([name])


def test_what_is_installed_is_not_missing() -> None:
    require("any", "json")
    with pytest.raises(MissingExtra, match="No module named 'not_there'"):
        require("any", "json", "not_there")


@pytest.mark.parametrize("project", ["", "a/b", "../up", "https://example.com", "a\n", "x" * 65])
def test_a_project_is_a_name(project: str) -> None:
    with pytest.raises(DomainError, match=r"tracking\.project: "):
        settings_from_proto(RunConfig(environment="e", tracking=TrackingConfig(project=project)))


def test_a_writer_stands_there_once() -> None:
    with pytest.raises(DomainError, match=r"tracking\.writers\[1\]: 'wandb' is there twice"):
        settings_from_proto(RunConfig(environment="e", tracking=TrackingConfig(writers=["wandb", "wandb"])))


def test_settings_travel() -> None:
    settings = RunSettings(environment="e", tracking=TrackingSettings(writers=("wandb", "mlflow"), project="games"))
    assert settings_from_proto(settings_to_proto(settings)) == settings


def test_credentials_are_in_no_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "abcdef123456")
    said = without_secrets(OSError("abcdef123456 is no key of http://user:pass@example.com/x"))
    assert said == "OSError: *** is no key of http://***@example.com/x"
