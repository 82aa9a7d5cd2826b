"""The metric writers with their own libraries: what they wrote is read back."""

from __future__ import annotations

import asyncio
import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from mulligan.trainer.events import EvaluationEvent, Event, EventLog, StepEvent
from mulligan.trainer.settings import TrackingSettings
from mulligan.trainer.tracking import Tracking

SETTINGS = {"steps": 3, "rollout": {"temperature": 0.5}}
STEPS = [StepEvent(step, {"reward_first": step / 4, "excluded": 1.0}) for step in range(4)]
FIRST = EvaluationEvent(0, success=0.25, mean_reward=0.5, attempts=8, excluded=2, metrics={"pass/8": 0.75})
OTHER = EvaluationEvent(0, success=0.125, mean_reward=0.5, attempts=8, excluded=2, environment="other")
# (name, step) of all that is written, each once.
WRITTEN: dict[tuple[str, int], float] = {
    **{("reward_first", step): step / 4 for step in range(4)},
    **{("excluded", step): 1.0 for step in range(4)},
    ("evaluation/success", 0): 0.25,
    ("evaluation/mean_reward", 0): 0.5,
    ("evaluation/attempts", 0): 8.0,
    ("evaluation/excluded", 0): 2.0,
    ("evaluation/pass/8", 0): 0.75,
    ("evaluation/other/success", 0): 0.125,
    ("evaluation/other/mean_reward", 0): 0.5,
    ("evaluation/other/attempts", 0): 8.0,
    ("evaluation/other/excluded", 0): 2.0,
}
Found = list[tuple[tuple[str, int], float]]


async def track(folder: Path, writer: str) -> None:
    """A run that is stopped after two steps and then resumed."""
    notices: list[str] = []
    tracking = TrackingSettings(writers=(writer,), project="games")
    parts: list[list[Event]] = [[FIRST, OTHER, *STEPS[:2]], [*STEPS[2:]]]
    for events in parts:
        log = EventLog(folder / "events.jsonl")
        async with Tracking("run-1", folder, tracking, SETTINGS, log, notices.append):
            for event in events:
                log.add(event)
                await asyncio.sleep(0)
    assert not notices


def tensorboard(folder: Path) -> Found:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return [((name, one.step), one.value) for name in files.Tags()["scalars"] for one in files.Scalars(name)]


async def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    await track(tmp_path, "tensorboard")
    assert sorted(tensorboard(tmp_path / "tracking" / "tensorboard")) == sorted(WRITTEN.items())


async def test_tensorboard_writes_no_step_twice_that_the_trainer_was_killed_after(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    await track(tmp_path, "tensorboard")
    (tmp_path / "tracking" / "tensorboard.json").unlink()  # as if the position had not been written
    await track(tmp_path, "tensorboard")
    assert sorted(tensorboard(tmp_path / "tracking" / "tensorboard")) == sorted(WRITTEN.items())


async def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="needs the extra wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    await track(tmp_path, "wandb")
    found: Found = []
    ids, configs = set(), []
    for path in sorted((tmp_path / "tracking" / "wandb").glob("wandb/offline-run-*/*.wandb")):
        for record in await wandb_closed(path):
            if record.HasField("run"):
                ids.add((record.run.project, record.run.run_id))
                configs.append({one.key: json.loads(one.value_json) for one in record.run.config.update})
            if record.HasField("history"):
                items = {one.key or one.nested_key[0]: json.loads(one.value_json) for one in record.history.item}
                step = items.pop("step")
                found += [((name, step), value) for name, value in items.items() if not name.startswith("_")]
    assert sorted(found) == sorted(WRITTEN.items())
    assert ids == {("games", "run-1")}
    assert configs[0]["steps"] == 3 and configs[0]["rollout"] == {"temperature": 0.5}


async def wandb_closed(path: Path) -> list[Any]:
    """The records of a file that is complete. wandb's own process may write its end after `finish` has returned."""
    async with asyncio.timeout(30):
        while not any(record.HasField("exit") for record in wandb_records(path)):  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.05)
    return wandb_records(path)


def wandb_records(path: Path) -> list[Any]:
    """The records of a file of wandb: LevelDB's log format, after a header of seven bytes."""
    Record: Any = getattr(importlib.import_module("wandb.proto.wandb_internal_pb2"), "Record")  # noqa: B009 - untyped

    data = path.read_bytes()
    found = []
    place, whole = 7, b""
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:  # no header begins in the last bytes of a block
            place += left
            continue
        size = int.from_bytes(data[place + 4 : place + 6], "little")
        kind = data[place + 6]
        whole += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            record = Record()
            record.ParseFromString(whole)
            found.append(record)
            whole = b""
    return found


async def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="needs the extra mlflow")
    from mlflow.tracking import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    await track(tmp_path, "mlflow")
    client: Any = MlflowClient(f"sqlite:///{tmp_path}/tracking/mlflow/mlflow.sqlite")
    (run,) = client.search_runs([client.get_experiment_by_name("games").experiment_id])
    names = {name for name, _ in WRITTEN}
    found = [
        ((name, one.step), one.value) for name in names for one in client.get_metric_history(run.info.run_id, name)
    ]
    assert sorted(found) == sorted(WRITTEN.items())
    assert run.info.run_name == "run-1" and run.info.status == "FINISHED"
    assert run.data.params == {"steps": "3", "rollout.temperature": "0.5"}


async def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # trackio reads it when it is imported
    pytest.importorskip("trackio", reason="needs the extra trackio")
    from trackio.sqlite_storage import SQLiteStorage

    await track(tmp_path, "trackio")
    found: Found = []
    for line in SQLiteStorage.get_logs("games", "run-1"):
        step = line.pop("step")
        line.pop("timestamp")
        found += [((name, step), value) for name, value in line.items()]
    assert sorted(found) == sorted(WRITTEN.items())
    config = SQLiteStorage.get_run_config("games", "run-1")
    assert config is not None and config["steps"] == 3
