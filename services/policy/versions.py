"""The versions of one policy on disk: a record of each that was ever seen, and the files of those that are kept.

`deployment.py` says how a version's state changes. The records are in a SQLite database: a change of several records is
one transaction, also under SIGKILL or a loss of power. A version's file is complete before its record is written, and
deleted after its record was changed. Files without a record are deleted when the store is opened.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from mulligan.common.disk import folder_removed, writing_to
from mulligan.common.errors import DomainError, Reason
from mulligan.common.file_lock import lock_file
from mulligan.common.files import file_sha256, make_folder, sync
from mulligan.common.inference import CanaryProbe, PolicyVersion, VersionState, WeightsKind
from mulligan.policy.backend import WeightsFile
from mulligan.policy.model_settings import ModelSettings

_ADAPTER_CONFIG = "adapter_config.json"
_ENGINE = "engine-"
_CREATE = """
CREATE TABLE versions (
    policy_version INTEGER PRIMARY KEY,
    origin INTEGER NOT NULL,
    source TEXT NOT NULL,
    setup TEXT NOT NULL,
    kind TEXT NOT NULL,
    state TEXT NOT NULL,
    sha256 TEXT NOT NULL,
    fingerprint TEXT NOT NULL,
    created_at TEXT NOT NULL,
    problem TEXT NOT NULL,
    canary_difference REAL,
    engine_checksum TEXT NOT NULL,
    model TEXT NOT NULL,
    canary TEXT NOT NULL
);
CREATE UNIQUE INDEX one_serves ON versions (state) WHERE state = 'serving';
CREATE INDEX of_a_model ON versions (origin);
"""
_COLUMNS = (
    "policy_version, origin, source, setup, kind, state, sha256, fingerprint, created_at, problem, canary_difference, "
    "engine_checksum, model, canary"
)
_ON_DISK = (VersionState.SERVING, VersionState.KEPT)


@dataclass(frozen=True, slots=True)
class VersionRecord:
    """What is known of a version.

    `origin` is the version of the weights that its model came with, so it is the same for all versions of one loaded
    model. `source` names that model (`source_of`). Checksums of engines can be compared where `setup` is equal.
    """

    version: PolicyVersion
    origin: int
    source: str
    setup: str
    canary: tuple[CanaryProbe, ...] = ()

    @property
    def number(self) -> int:
        return self.version.policy_version

    def now(self, **changes: Any) -> VersionRecord:
        """With these fields of the version changed."""
        return replace(self, version=replace(self.version, **changes))


def source_of(settings: ModelSettings) -> str:
    """The name of a model across restarts: what the settings call it, and its backend."""
    return f"{settings.backend}:{settings.model}"


class VersionStore:
    """The folder of one policy: its versions, and a folder for each of its engines.

    None stands for a temporary folder. Methods wait for the disk: call them in a thread. `stage` brings the file of a
    new version into the store; `serve` records that it serves and deletes what is not kept any more; `refuse` and
    `lose` record that it never will; `file` verifies the file of a kept version again before it is loaded.

    `_lock` keeps threads apart, not changes: calls read the database while one thread writes a transaction.

    Raises OSError when the folder cannot be used, or another process uses it. Writing raises DomainError DISK_FULL.
    """

    def __init__(self, folder: Path | None, keep: int):
        self._temporary = None if folder else tempfile.TemporaryDirectory(prefix="mulligan-versions-")
        self._folder = folder or Path(self._temporary.name)  # type: ignore[union-attr]
        self._files = self._folder / "files"
        self._database = self._folder / "versions.db"
        self._keep = keep
        make_folder(self._files)
        self._lock_file = _lock(self._folder)
        self._lock = threading.Lock()
        self._held: dict[int, int] = {}  # what the models serve that are loaded, by origin
        self._staged: set[int] = set()  # versions without a record, whose files are there already
        try:
            self._db = _open(self._database)
        except BaseException:
            self._lock_file.close()
            raise
        self._clean()
        for left_over in self._folder.glob(f"{_ENGINE}*"):
            shutil.rmtree(left_over, ignore_errors=True)

    def close(self) -> None:
        with self._lock:
            self._db.close()
            self._lock_file.close()
        if self._temporary is not None:
            self._temporary.cleanup()

    def engine_folder(self) -> Path:
        """A new folder for the files of one engine. Whatever is left of it is deleted when the store is opened."""
        return Path(tempfile.mkdtemp(prefix=_ENGINE, dir=self._folder))

    def next_version(self) -> int:
        """Greater than all that are known."""
        [(greatest,)] = self._query("SELECT max(policy_version) FROM versions")
        return 0 if greatest is None else int(greatest) + 1

    def first_version(self, source: str | None = None) -> int:
        """The number of the weights that a model comes with: the next one. With `source`, of a model that the service
        loads at its start, it is the one that they had before the restart, if this model served then."""
        serving = self.serving() if source is not None else None
        return serving.origin if serving is not None and serving.source == source else self.next_version()

    def serving(self) -> VersionRecord | None:
        found = self._records("WHERE state = ?", VersionState.SERVING)
        return found[0] if found else None

    def get(self, number: int) -> VersionRecord | None:
        found = self._records("WHERE policy_version = ?", number)
        return found[0] if found else None

    def of_model(self, origin: int) -> list[VersionRecord]:
        """All versions of one loaded model, newest first."""
        return self._records("WHERE origin = ? ORDER BY policy_version DESC", origin)

    def versions(self, below: int | None, limit: int) -> tuple[PolicyVersion, ...]:
        """Newest first, those less than `below`."""
        bound = 2**63 - 1 if below is None else below
        rows = self._records("WHERE policy_version < ? ORDER BY policy_version DESC LIMIT ?", bound, limit)
        return tuple(record.version for record in rows)

    def begin(self, record: VersionRecord, commit: Callable[[], None] = lambda: None) -> None:
        """A model is served from now on, with the weights that it came with. No version of the model before it is kept;
        the file that that one serves stays until `end`. If `commit` fails, which writes what belongs to it elsewhere,
        nothing is changed."""
        with self._transaction() as db:
            db.execute("UPDATE versions SET state = 'removed', canary = '[]' WHERE state IN ('serving', 'kept')")
            _put(db, record.now(state=VersionState.SERVING))
            commit()
        self._held[record.origin] = record.number

    def end(self, origin: int) -> None:
        """The model is closed. Its files are deleted, unless it serves again after a restart."""
        self._held.pop(origin, None)
        self._clean()

    def serve(self, record: VersionRecord, withdrawn: str = "") -> None:
        """This version serves from now on; the file of a new one was staged before. `withdrawn` is the reason of a
        rollback: greater versions are withdrawn. Deletes the files of versions that are not kept any more."""
        with self._transaction() as db:
            if withdrawn:
                change = "UPDATE versions SET state = 'withdrawn', problem = ?, canary = '[]' "
                where = "WHERE origin = ? AND policy_version > ? AND state IN ('serving', 'kept', 'removed')"
                db.execute(change + where, (withdrawn, record.origin, record.number))
            db.execute("UPDATE versions SET state = 'kept' WHERE state = 'serving'")
            _put(db, record.now(state=VersionState.SERVING))
            kept = db.execute(
                "SELECT policy_version FROM versions WHERE state IN ('serving', 'kept') AND kind != 'original' "
                "ORDER BY state = 'serving' DESC, policy_version DESC LIMIT -1 OFFSET ?",
                (self._keep,),
            ).fetchall()
            db.executemany("UPDATE versions SET state = 'removed', canary = '[]' WHERE policy_version = ?", kept)
        self._held[record.origin] = record.number
        self._staged.discard(record.number)
        self._clean()

    def refuse(self, record: VersionRecord) -> None:
        """The version failed its check."""
        with self._transaction() as db:
            _put(db, replace(record.now(state=VersionState.REFUSED), canary=()))
        self._staged.discard(record.number)
        self._clean()

    def lose(self, record: VersionRecord) -> None:
        """The file of the version is missing or damaged."""
        with self._transaction() as db:
            _put(db, replace(record.now(state=VersionState.REMOVED), canary=()))
        self._clean()

    def stage(self, weights: WeightsFile) -> WeightsFile:
        """Brings the files of a new version into the store and verifies them there.

        A file is linked if possible: that takes no space, and the sender may delete its own. The sender can still
        change the content of a link, so the checksum is verified again before each later use. Raises DomainError
        WEIGHTS_NOT_FOUND, CHECKSUM_MISMATCH or DISK_FULL.
        """
        source = weights.safetensors
        assert weights.path is not None and source is not None
        folder = self._files / str(weights.policy_version)
        self.discard(weights.policy_version)
        self._staged.add(weights.policy_version)
        lora = weights.kind is WeightsKind.LORA
        staged = replace(weights, path=folder if lora else folder / "model.safetensors")
        assert staged.safetensors is not None
        size = source.stat().st_size if source.is_file() else 0
        try:
            with writing_to(self._folder, size):
                folder.mkdir()
                _bring(source, staged.safetensors)
                if lora:  # no checksum covers it: a copy, which nobody changes
                    _bring(weights.path / _ADAPTER_CONFIG, folder / _ADAPTER_CONFIG, link=False)
                verify(staged)
                sync(folder)
                sync(self._files)
        except BaseException:
            self.discard(weights.policy_version)
            raise
        return staged

    def discard(self, number: int) -> None:
        """Deletes what was staged of a version."""
        self._staged.discard(number)
        shutil.rmtree(self._files / str(number), ignore_errors=True)

    def file(self, record: VersionRecord) -> WeightsFile:
        """The files of a kept version, verified. Raises DomainError WEIGHTS_NOT_FOUND or CHECKSUM_MISMATCH."""
        folder = self._files / str(record.number)
        paths = {WeightsKind.FULL: folder / "model.safetensors", WeightsKind.LORA: folder, WeightsKind.ORIGINAL: None}
        version = record.version
        weights = WeightsFile(paths[version.kind], version.kind, record.number, version.sha256, record.canary)
        verify(weights)
        return weights

    def open_full(self, sha256: str) -> IO[bytes]:
        """The file of full weights with this checksum that is kept; the caller closes it. It can be read to its end,
        whatever happens to the version. Its content is not verified. Raises DomainError VERSION_NOT_KEPT."""
        where = "WHERE sha256 = ? AND kind = ? AND state IN (?, ?) ORDER BY policy_version DESC"
        for record in self._records(where, sha256, WeightsKind.FULL, *_ON_DISK):
            try:
                return (self._files / str(record.number) / "model.safetensors").open("rb")
            except FileNotFoundError:  # removed meanwhile
                continue
        raise DomainError(Reason.VERSION_NOT_KEPT, f"no version of full weights with sha256 {sha256} is kept")

    def _clean(self) -> None:
        """Deletes the files of versions that are neither kept nor on their way."""
        # In this order: another thread may stage a version meanwhile, or record one that was staged.
        folders = list(self._files.iterdir())
        kept = {str(number) for number in (*self._staged, *self._held.values())}
        kept |= {str(record.number) for record in self._records("WHERE state IN (?, ?)", *_ON_DISK)}
        for folder in folders:
            if folder.name not in kept:
                shutil.rmtree(folder, ignore_errors=True)

    def _query(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        with self._lock:
            return self._db.execute(statement, values).fetchall()

    def _records(self, clause: str, *values: object) -> list[VersionRecord]:
        return [_record(row) for row in self._query(f"SELECT {_COLUMNS} FROM versions {clause}", *values)]

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        # The inner one commits, or rolls back on an exception.
        with writing_to(self._folder), self._lock, self._db:
            if not self._database.exists():
                raise folder_removed(self._folder)
            self._db.execute("BEGIN IMMEDIATE")
            yield self._db


def verify(weights: WeightsFile) -> None:
    """Raises DomainError WEIGHTS_NOT_FOUND or CHECKSUM_MISMATCH."""
    file = weights.safetensors
    if file is None:
        return
    try:
        found = file_sha256(file)
    except OSError as error:
        raise _not_found(file, error) from error
    if found != weights.sha256:
        raise DomainError(Reason.CHECKSUM_MISMATCH, f"{file.name} has sha256 {found}, not {weights.sha256}")


def _not_found(file: Path, error: OSError) -> DomainError:
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return DomainError(Reason.WEIGHTS_NOT_FOUND, f"uri: there is no file {file.name}")
    return DomainError(Reason.WEIGHTS_NOT_FOUND, f"uri: {file.name} cannot be read: {error.strerror}")


def _bring(source: Path, target: Path, *, link: bool = True) -> None:
    try:
        source.open("rb").close()
    except OSError as error:
        raise _not_found(source, error) from error
    try:
        if not link:
            raise OSError
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
    sync(target)


def _lock(folder: Path) -> IO[bytes]:
    try:
        return lock_file(folder / "lock")
    except BlockingIOError:
        raise OSError(f"state_folder: {folder} is in use by another process") from None


def _open(path: Path) -> sqlite3.Connection:
    try:
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        db.execute("PRAGMA synchronous = FULL")
        if db.execute("PRAGMA user_version").fetchone() == (0,):
            db.executescript(f"BEGIN; {_CREATE} PRAGMA user_version = 1; COMMIT;")
    except sqlite3.Error as error:
        raise OSError(f"state_folder: cannot use {path}: {error}") from error
    return db


def _put(db: sqlite3.Connection, record: VersionRecord) -> None:
    version = record.version
    row = (
        version.policy_version,
        record.origin,
        record.source,
        record.setup,
        version.kind,
        version.state,
        version.sha256,
        version.fingerprint,
        version.created_at.astimezone(UTC).isoformat(),
        version.problem,
        version.canary_difference,
        version.engine_checksum,
        version.model,
        json.dumps([[probe.token_ids, probe.log_probs] for probe in record.canary]),
    )
    changes = ", ".join(f"{name} = excluded.{name}" for name in _COLUMNS.split(", "))
    places = ", ".join("?" * len(row))
    db.execute(
        f"INSERT INTO versions ({_COLUMNS}) VALUES ({places}) ON CONFLICT (policy_version) DO UPDATE SET {changes}", row
    )


def _record(row: Sequence[Any]) -> VersionRecord:
    number, origin, source, setup, kind, state, sha256, fingerprint, created, problem, difference, *rest = row
    checksum, model, canary = rest
    version = PolicyVersion(
        policy_version=number,
        kind=WeightsKind(kind),
        state=VersionState(state),
        sha256=sha256,
        fingerprint=fingerprint,
        created_at=datetime.fromisoformat(created),
        problem=problem,
        canary_difference=difference,
        engine_checksum=checksum,
        model=model,
    )
    probes = tuple(CanaryProbe(tuple(ids), tuple(log_probs)) for ids, log_probs in json.loads(canary))
    return VersionRecord(version, origin, source, setup, probes)
