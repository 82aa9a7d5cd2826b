"""A run's folder: settings and state (`run.json`), the last checkpoint (`checkpoint.json`), the fingerprint of the
run's own environment (`environment.json`), those of further ones (`environments.json`), events, journal, history,
summary.

What the run goes on with has checksums (`mulligan.common.state_files`). The summary has none: nothing reads it here.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import msgspec
import structlog
from cachetools import LRUCache
from pydantic import ValidationError

from mulligan.common import numbers
from mulligan.common.disk import writing_to
from mulligan.common.errors import DomainError, Reason, fault, incident
from mulligan.common.files import make_folder, replace
from mulligan.common.inference import PublishedWeights, WeightsKind
from mulligan.common.state_files import in_utc, read_document, state_damaged, write_document
from mulligan.common.suggest import problems
from mulligan.trainer.fingerprint import Fingerprint
from mulligan.trainer.foreign import FAILURES
from mulligan.trainer.settings import RunSettings

log = structlog.get_logger()
_ADVICE_RUN = (
    "It holds the run's settings and state: put a copy of the file back, or move the run's folder away. Other runs are "
    "not affected."
)
_ADVICE_CHECKPOINT = (
    "It says where the run goes on: put a copy of the file back and resume the run; or remove the file, and the run "
    "begins at its first step, with what its journal has."
)
_ADVICE_ENVIRONMENT = (
    "The run compares the environment with it: put a copy of the file back and resume the run; or remove the file, and "
    "the run goes on in the environment as it is now."
)
# Numbers as the contract has them: a file with another one is damaged.
Count = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
Version = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
_LONGEST_URI = 4096  # as in the contract
_LONGEST_FINGERPRINT = 200
_DEPTH = 4  # folders below the one that is looked through, in which a run may lie
# Runs whose settings a plug-in failed to read: the type of what it raised, and what is told of it. The log has each
# once, though somebody asks for the run every second.
_FAULTS: LRUCache[Path, tuple[str, str]] = LRUCache(10_000)
_FAULTS_LOCK = threading.Lock()
_SKIPPED = {"journal", "weights", "checkpoints", "policy", "logs", "node_modules"}


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
    told: str = ""  # what those who only look on are told of the error; empty: the same

    def __post_init__(self) -> None:
        msgspec.structs.force_setattr(self, "created_at", in_utc(self.created_at))

    def now(self, state: RunState, error: str = "", told: str = "") -> RunRecord:
        return RunRecord(self.run_id, state, self.created_at, self.settings, error, told)


def _check_weights(weights: PublishedWeights) -> None:
    """Raises ValueError, which names the field, for weights that no policy could be given."""
    for field, is_right in {
        "policy_version": 1 <= weights.policy_version < 2**63,
        "kind": weights.kind is not WeightsKind.ORIGINAL,
        "uri": 1 <= len(weights.uri) <= _LONGEST_URI and "\0" not in weights.uri,
        "sha256": re.fullmatch("[0-9a-f]{64}", weights.sha256),
        "fingerprint": 1 <= len(weights.fingerprint) <= _LONGEST_FINGERPRINT,
    }.items():
        if not is_right:
            raise ValueError(f"weights.{field}: expected that of published weights")
    for probe in weights.canary:
        if not all(0 <= token < 2**31 for token in probe.token_ids):
            raise ValueError("weights.canary: expected token ids")
        numbers.log_probs("weights.canary: log-probabilities", probe.log_probs, len(probe.token_ids) - 1)


class UnfinishedEvaluation(msgspec.Struct, frozen=True):
    """An evaluation beside training: what repeating it takes. It measures the policy as it was after `step` steps,
    which has the weights `weights`, as the actor was given them."""

    step: Count
    weights: PublishedWeights
    memory_version: Version | None = None  # where first attempts read the memory

    def __post_init__(self) -> None:
        _check_weights(self.weights)


class Checkpoint(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where a resumed run goes on. `name` is the learner's checkpoint (weights, optimizer, random generators);
    `memory_version` is the memory's version after the step. Seeds and the order of tasks derive from `step`.
    `evaluation` ran beside training then; a resumed run begins it again."""

    name: str
    step: Count
    memory_version: Version
    evaluation: UnfinishedEvaluation | None = None

    def __post_init__(self) -> None:
        if not self.name.endswith(end := f"-{self.step:06}"):
            raise ValueError(f"name: expected one that ends in {end!r}, because `step` is {self.step}")
        if self.evaluation is not None and self.evaluation.step > self.step:
            raise ValueError(f"evaluation.step: expected at most `step`, which is {self.step}")


class RunFolder:
    """Reads and writes the files of one run. Reads raise DomainError STATE_DAMAGED. Writes raise DomainError DISK_FULL,
    or OSError without the folder."""

    def __init__(self, path: Path):
        self.path = path
        self.journal = path / "journal"
        self.events_file = path / "events.jsonl"
        self.history_file = path / "history.jsonl"

    @property
    def exists(self) -> bool:
        return os.path.lexists(self.path / "run.json")

    def create(self, run_id: str, settings: RunSettings, created_at: datetime | None = None) -> None:
        """Writes run.json. A folder without it is no run. Raises DomainError DISK_FULL."""
        created_at = created_at or datetime.now(UTC)
        with writing_to(self.path.parent):
            make_folder(self.path)
        self.write_record(RunRecord(run_id, RunState.RUNNING, created_at, settings.model_dump(mode="json")))

    def record(self) -> RunRecord:
        path = self.path / "run.json"
        try:
            return read_document(path, RunRecord, _ADVICE_RUN)
        except FileNotFoundError:
            if not path.is_symlink():
                raise
            raise state_damaged(path, f"{path} is a link to a file that is not there. {_ADVICE_RUN}") from None

    def settings(self) -> RunSettings:
        """Raises DomainError INVALID_SETTING, where a plug-in that they name is no longer there, or they are none."""
        record = self.record()
        try:
            settings = RunSettings.model_validate(record.settings)
        except ValidationError as error:
            field, said = next(iter(problems(error, RunSettings).items()))
        except FAILURES as error:  # of a plug-in, which reads its own
            field, said = "settings", self._told_of(error, record.run_id)
        else:
            with _FAULTS_LOCK:
                _FAULTS.pop(self.path, None)
            return settings
        message = f"the settings of run {record.run_id} cannot be read here: {field}: {said}"
        raise DomainError(Reason.INVALID_SETTING, message, field=field, run_id=record.run_id)

    def _told_of(self, error: BaseException, run_id: str) -> str:
        """What is told of settings that a plug-in failed to read: while it raises the same type, the same incident."""
        kind = type(error).__name__
        with _FAULTS_LOCK:
            if self.path not in _FAULTS or _FAULTS[self.path][0] != kind:
                log.error("settings cannot be read", run_id=run_id, incident=incident(error), exc_info=error)
                _FAULTS[self.path] = kind, fault(error)
            return _FAULTS[self.path][1]

    def write_record(self, record: RunRecord) -> None:
        write_document(self.path / "run.json", record)

    def checkpoint(self) -> Checkpoint | None:
        path = self.path / "checkpoint.json"
        return read_document(path, Checkpoint, _ADVICE_CHECKPOINT) if path.exists() else None

    def write_checkpoint(self, checkpoint: Checkpoint) -> None:
        write_document(self.path / "checkpoint.json", checkpoint)

    def environment(self) -> Fingerprint | None:
        """Of the run's own. None in runs of versions that did not store it."""
        path = self.path / "environment.json"
        return read_document(path, Fingerprint, _ADVICE_ENVIRONMENT) if path.exists() else None

    def further_environments(self) -> dict[str, Fingerprint]:
        """By name."""
        path = self.path / "environments.json"
        return read_document(path, dict[str, Fingerprint], _ADVICE_ENVIRONMENT) if path.exists() else {}

    def write_environment(self, fingerprint: Fingerprint) -> None:
        write_document(self.path / "environment.json", fingerprint)

    def write_further_environments(self, fingerprints: dict[str, Fingerprint]) -> None:
        write_document(self.path / "environments.json", fingerprints)

    def write_summary(self, summary: dict[str, Any]) -> None:
        path = self.path / "summary.json"
        content = msgspec.json.format(msgspec.json.encode(summary), indent=2) + b"\n"
        with writing_to(path.parent, len(content)):
            replace(path, content)


def run_folders(folder: Path, depth: int = _DEPTH) -> Iterator[Path]:
    """The folders of runs: `folder`, if it is one, else those below it."""
    try:
        with os.scandir(folder) as entries:
            inside = sorted(entries, key=lambda entry: entry.name)
    except OSError:
        return
    if any(entry.name == "run.json" for entry in inside):
        yield folder
    elif depth:
        for entry in inside:
            if entry.name not in _SKIPPED and not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False):
                yield from run_folders(Path(entry.path), depth - 1)
