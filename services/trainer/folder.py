"""A run's folder: settings and state (`run.json`), the last checkpoint (`checkpoint.json`), the fingerprint of the
run's own environment (`environment.json`), those of further ones (`environments.json`), events, journal, history,
summary.

JSON files are replaced atomically: written to a temporary file, synced, renamed.
"""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec
from pydantic import ValidationError

from mulligan.common.disk import writing_to
from mulligan.common.errors import DomainError, Reason
from mulligan.common.files import replace
from mulligan.common.suggest import problems
from mulligan.trainer.fingerprint import Fingerprint
from mulligan.trainer.settings import RunSettings


class RunState(StrEnum):
    RUNNING = "running"
    COMPLETED = "completed"
    STOPPED = "stopped"
    FAILED = "failed"


class RunRecord(msgspec.Struct, frozen=True):
    run_id: str
    state: RunState
    created_at: datetime
    settings: dict[str, Any]  # of RunSettings, defaults filled in
    error: str = ""

    def now(self, state: RunState, error: str = "") -> RunRecord:
        return RunRecord(self.run_id, state, self.created_at, self.settings, error)


class Checkpoint(msgspec.Struct, frozen=True):
    """Where a resumed run goes on. `name` is the learner's checkpoint (weights, optimizer, random generators);
    `memory_version` is the memory's version after the step. Seeds and the order of tasks derive from `step`."""

    name: str
    step: int
    memory_version: int


class RunFolder:
    """Reads and writes the files of one run. Writes raise DomainError DISK_FULL, or OSError without the folder."""

    def __init__(self, path: Path):
        self.path = path
        self.journal = path / "journal"
        self.events_file = path / "events.jsonl"
        self.history_file = path / "history.jsonl"

    @property
    def exists(self) -> bool:
        return (self.path / "run.json").exists()

    def create(self, run_id: str, settings: RunSettings, created_at: datetime | None = None) -> None:
        """Writes run.json. A folder without it is no run. Raises DomainError DISK_FULL."""
        created_at = created_at or datetime.now(UTC)
        with writing_to(self.path.parent):
            self.path.mkdir(parents=True, exist_ok=True)
        self.write_record(RunRecord(run_id, RunState.RUNNING, created_at, settings.model_dump(mode="json")))

    def record(self) -> RunRecord:
        return msgspec.json.decode((self.path / "run.json").read_bytes(), type=RunRecord)

    def settings(self) -> RunSettings:
        """Raises DomainError INVALID_SETTING, where a plug-in that they name is no longer there."""
        record = self.record()
        try:
            return RunSettings.model_validate(record.settings)
        except ValidationError as error:
            field, said = next(iter(problems(error, RunSettings).items()))
            message = f"the settings of run {record.run_id} cannot be read here: {field}: {said}"
            raise DomainError(Reason.INVALID_SETTING, message, field=field, run_id=record.run_id) from None

    def write_record(self, record: RunRecord) -> None:
        write_json(self.path / "run.json", record)

    def checkpoint(self) -> Checkpoint | None:
        path = self.path / "checkpoint.json"
        return msgspec.json.decode(path.read_bytes(), type=Checkpoint) if path.exists() else None

    def write_checkpoint(self, checkpoint: Checkpoint) -> None:
        write_json(self.path / "checkpoint.json", checkpoint)

    def environment(self) -> Fingerprint | None:
        """Of the run's own. None in runs of versions that did not store it."""
        path = self.path / "environment.json"
        return msgspec.json.decode(path.read_bytes(), type=Fingerprint) if path.exists() else None

    def further_environments(self) -> dict[str, Fingerprint]:
        """By name."""
        path = self.path / "environments.json"
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Fingerprint]) if path.exists() else {}

    def write_environment(self, fingerprint: Fingerprint) -> None:
        write_json(self.path / "environment.json", fingerprint)

    def write_further_environments(self, fingerprints: dict[str, Fingerprint]) -> None:
        write_json(self.path / "environments.json", fingerprints)

    def write_summary(self, summary: dict[str, Any]) -> None:
        write_json(self.path / "summary.json", summary)


def write_json(path: Path, value: Any) -> None:
    """Raises DomainError DISK_FULL, or OSError when the folder is gone."""
    content = msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"
    with writing_to(path.parent, len(content)):
        replace(path, content)
