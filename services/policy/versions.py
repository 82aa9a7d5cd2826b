"""The versions of one policy on disk: a record of each that was ever seen, and the files of those that are kept.

`deployment.py` says how a version's state changes. The records are in a SQLite database: a change of several records is
one transaction, also under SIGKILL or a loss of power. A version's file is complete before its record is written, and
deleted after its record was changed. Files without a record are deleted when the store is opened.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO

from mulligan.common.disk import writing_to
from mulligan.common.errors import DomainError, Reason
from mulligan.common.file_lock import lock_file
from mulligan.common.files import file_sha256, make_folder, sync
from mulligan.common.inference import PolicyVersion, VersionState, WeightsKind
from mulligan.policy.backend import WeightsFile
from mulligan.policy.model_settings import ModelSettings
from mulligan.policy.version_table import VersionRecord, VersionTable

_ADAPTER_CONFIG = "adapter_config.json"
_ENGINE = "engine-"


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
        self._keep = keep
        make_folder(self._files)
        self._lock_file = _lock(self._folder)
        self._held: dict[int, int] = {}  # what the models serve that are loaded, by origin
        self._staged: set[int] = set()  # versions without a record, whose files are there already
        try:
            self._table = VersionTable(self._folder / "versions.db")
        except BaseException:
            self._lock_file.close()
            raise
        try:
            self._clean()
        except BaseException:
            self._table.close()
            self._lock_file.close()
            raise
        for left_over in self._folder.glob(f"{_ENGINE}*"):
            shutil.rmtree(left_over, ignore_errors=True)

    def close(self) -> None:
        self._table.close()
        self._lock_file.close()
        if self._temporary is not None:
            self._temporary.cleanup()

    def engine_folder(self) -> Path:
        """A new folder for the files of one engine. Whatever is left of it is deleted when the store is opened."""
        return Path(tempfile.mkdtemp(prefix=_ENGINE, dir=self._folder))

    def next_version(self) -> int:
        """Greater than all that are known."""
        return self._table.greatest() + 1

    def first_version(self, source: str | None = None) -> int:
        """The number of the weights that a model comes with: the next one. With `source`, of a model that the service
        loads at its start, it is the one that they had before the restart, if this model served then."""
        serving = self.serving() if source is not None else None
        return serving.origin if serving is not None and serving.source == source else self.next_version()

    def serving(self) -> VersionRecord | None:
        found = self._table.records("WHERE state = ?", VersionState.SERVING)
        return found[0] if found else None

    def get(self, number: int) -> VersionRecord | None:
        """Raises DomainError STATE_DAMAGED."""
        return self._table.get(number)

    def of_model(self, origin: int) -> list[VersionRecord]:
        """All versions of one loaded model, newest first."""
        return self._table.records("WHERE origin = ? ORDER BY policy_version DESC", origin)

    def versions(self, below: int | None, limit: int) -> tuple[PolicyVersion, ...]:
        """Newest first, those less than `below`."""
        bound = 2**63 - 1 if below is None else below
        rows = self._table.records("WHERE policy_version < ? ORDER BY policy_version DESC LIMIT ?", bound, limit)
        return tuple(record.version for record in rows)

    def begin(self, record: VersionRecord, commit: Callable[[], None] = lambda: None) -> None:
        """A model is served from now on, with the weights that it came with. No version of the model before it is kept;
        the file that that one serves stays until `end`. If `commit` fails, which writes what belongs to it elsewhere,
        nothing is changed."""
        with self._table.transaction() as db:
            db.change("WHERE state IN ('serving', 'kept')", state="removed", canary="[]")
            db.put(record.now(state=VersionState.SERVING))
            commit()
        self._held[record.origin] = record.number

    def end(self, origin: int) -> None:
        """The model is closed. Its files are deleted, unless it serves again after a restart."""
        self._held.pop(origin, None)
        self._clean()

    def serve(self, record: VersionRecord, withdrawn: str = "") -> None:
        """This version serves from now on; the file of a new one was staged before. `withdrawn` is the reason of a
        rollback: greater versions are withdrawn. Deletes the files of versions that are not kept any more."""
        with self._table.transaction() as db:
            if withdrawn:
                where = "WHERE origin = ? AND policy_version > ? AND state IN ('serving', 'kept', 'removed')"
                later = (record.origin, record.number)
                db.change(where, *later, state="withdrawn", problem=withdrawn, canary="[]")
            db.change("WHERE state = 'serving'", state="kept")
            db.put(record.now(state=VersionState.SERVING))
            too_many = (
                "WHERE state IN ('serving', 'kept') AND kind != 'original' "
                "ORDER BY state = 'serving' DESC, policy_version DESC LIMIT -1 OFFSET ?"
            )
            db.change(too_many, self._keep, state="removed", canary="[]")
        self._held[record.origin] = record.number
        self._staged.discard(record.number)
        self._clean()

    def refuse(self, record: VersionRecord) -> None:
        """The version failed its check."""
        with self._table.transaction() as db:
            db.put(replace(record.now(state=VersionState.REFUSED), canary=()))
        self._staged.discard(record.number)
        self._clean()

    def lose(self, record: VersionRecord) -> None:
        """The file of the version is missing or damaged."""
        with self._table.transaction() as db:
            db.put(replace(record.now(state=VersionState.REMOVED), canary=()))
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
        where = "WHERE sha256 = ? AND kind = ? AND state IN ('serving', 'kept') ORDER BY policy_version DESC"
        for record in self._table.records(where, sha256, WeightsKind.FULL):
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
        kept |= {str(number) for number in self._table.with_files()}
        for folder in folders:
            if folder.name not in kept:
                shutil.rmtree(folder, ignore_errors=True)


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
