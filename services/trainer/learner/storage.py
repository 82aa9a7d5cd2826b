"""Checkpoints and published weights on disk.

A checkpoint is a folder of safetensors files, with their hashes in their names, and manifest.json, which lists them and
has a checksum. The manifest is replaced by a rename, so after a crash a checkpoint is the old one or the new one, never
a mix. No file is ever unpickled.

The files do not depend on the number of processes: each tensor is gathered from all of them, and the first process
writes it. So a checkpoint of two processes can be loaded by one, and the other way round, to the bit.
torch.distributed.checkpoint would write from all processes at once, which is faster with fast disks, but it has a
pickled index, no checksums, and other files for each number of processes.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
from safetensors import SafetensorError

from mulligan.common.disk import writing_to
from mulligan.common.errors import DomainError, Reason, invalid_field
from mulligan.common.files import file_sha256, make_folder, move, open_to_group, sync, temporary_file
from mulligan.common.state_files import read_document, write_document
from mulligan.trainer.learner.tensor_files import StoredTensors, TensorStream, write

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_MANIFEST = "manifest.json"
_FORMAT = 1
_Number = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


@dataclass(frozen=True, slots=True)
class CheckpointState:
    """The scalars of a checkpoint, as stored in its manifest."""

    fingerprint: str
    next_sequence: _Number  # number of the learner's next call: the `sequence` of the contract
    optimizer_steps: _Number
    reference_step: int = -1  # when the moving reference last moved; -1: there is none
    moments: str = "float32"  # optimizer.moments


def is_name(name: str) -> bool:
    """Whether it can be the name of a learner, or of a checkpoint."""
    return bool(_NAME.fullmatch(name))


def check_name(field: str, name: str) -> str:
    """The name, if it is safe as one path component. Raises INVALID_FIELD for separators, hidden or relative names."""
    if not is_name(name):
        raise invalid_field(field, "1 to 128 letters, digits, '.', '_' and '-', the first not '.' or '-'")
    return name


def save_checkpoint(folder: Path, parts: Mapping[str, TensorStream], state: CheckpointState) -> str:
    """Writes the tensors of each part, and the scalars. Returns the SHA-256 of the manifest.

    An earlier checkpoint in the folder is replaced. Raises DomainError DISK_FULL; then nothing has changed.
    """
    size = sum(tensors.nbytes for tensors in parts.values())
    try:
        with writing_to(folder, size):
            make_folder(folder)
            files = {part: _save_part(folder, part, tensors) for part, tensors in parts.items()}
            content = {"format": _FORMAT, "state": asdict(state), "files": files}
            manifest = write_document(folder / _MANIFEST, content)
    finally:
        _sweep(folder)
    return hashlib.sha256(manifest).hexdigest()


def _save_part(folder: Path, part: str, tensors: TensorStream) -> dict[str, str]:
    with temporary_file(folder) as path:
        sha256 = write(tensors, path)
        name = f"{part}-{sha256[:16]}.safetensors"
        move(path, folder / name)
    return {"file": name, "sha256": sha256}


def _sweep(folder: Path) -> None:
    """Deletes files that the manifest does not name, or the folder if it has no manifest. Keeps all if the manifest
    cannot be read."""
    try:
        kept = {_MANIFEST, *(entry["file"] for entry in _manifest(folder)["files"].values())}
    except DomainError as error:
        if error.reason is Reason.CHECKPOINT_NOT_FOUND:
            shutil.rmtree(folder, ignore_errors=True)
        return
    except (LookupError, TypeError, AttributeError):
        return
    for path in folder.iterdir():
        if path.name not in kept:
            path.unlink(missing_ok=True)


def load_checkpoint(
    folder: Path, only: Collection[str] | None = None
) -> tuple[dict[str, StoredTensors], CheckpointState]:
    """Opens a checkpoint, or the parts `only` of it, and verifies their hashes. Raises DomainError
    CHECKPOINT_NOT_FOUND, or CHECKPOINT_MISMATCH when it is damaged."""
    manifest = _manifest(folder)
    parts: dict[str, StoredTensors] = {}
    try:
        for part, entry in manifest["files"].items():
            if only is not None and part not in only:
                continue
            path = folder / entry["file"]
            if path.parent != folder or file_sha256(path) != entry["sha256"]:
                raise damaged(folder.name, f"{entry['file']} is not what was saved")
            parts[part] = StoredTensors(path)
        state = CheckpointState(**manifest["state"])
        return parts, msgspec.convert(asdict(state), CheckpointState)  # checks the types
    except (OSError, SafetensorError, LookupError, TypeError, AttributeError, ValueError) as error:
        raise damaged(folder.name, str(error)) from error


def _manifest(folder: Path) -> Any:
    try:
        manifest = read_document(
            folder / _MANIFEST, dict[str, Any], "The checkpoint cannot be loaded: use another one."
        )
    except (FileNotFoundError, NotADirectoryError):
        raise DomainError(
            Reason.CHECKPOINT_NOT_FOUND, f"there is no checkpoint {folder.name!r}", name=folder.name
        ) from None
    except DomainError as error:
        raise damaged(folder.name, error.message) from error
    if manifest.get("format") != _FORMAT:
        raise damaged(folder.name, f"{_MANIFEST}: expected format {_FORMAT}")
    return manifest


def damaged(name: str, cause: str) -> DomainError:
    return DomainError(Reason.CHECKPOINT_MISMATCH, f"checkpoint {name!r}: {cause}"[:1000], name=name)


def keep_checkpoints(root: Path, count: int, named: Collection[str]) -> None:
    """Keeps the `count` checkpoints below `root` with the most optimizer steps and the `named` ones; deletes others. A
    folder that no checkpoint can be called, such as a copy, is neither counted nor deleted."""
    found = [path.parent for path in root.glob(f"*/{_MANIFEST}") if _NAME.fullmatch(path.parent.name)]
    for folder in sorted(found, key=_place, reverse=True)[count:]:
        if folder.name not in named:
            (folder / _MANIFEST).unlink()  # first, so that no incomplete checkpoint is left
            sync(folder)
            shutil.rmtree(folder, ignore_errors=True)


def _place(folder: Path) -> tuple[int, str]:
    """The sort key of a checkpoint: optimizer steps, then the name, which contains the run's step. File times are not
    used, because clocks may be wrong."""
    name = re.sub(r"\d+", lambda digits: digits[0].zfill(20), folder.name)
    try:
        return int(_manifest(folder)["state"]["optimizer_steps"]), name
    except (DomainError, LookupError, TypeError, ValueError, OverflowError):  # it is damaged
        return -1, name


def publish_file(tensors: TensorStream, path: Path, *, to_group: bool = False) -> str:
    """Writes a safetensors file in one rename. Its folder's group may read it where `to_group` is set.

    Returns its SHA-256. Raises DomainError DISK_FULL.
    """
    with writing_to(path.parent, tensors.nbytes):
        make_folder(path.parent)
        with temporary_file(path.parent) as temporary:
            sha256 = write(tensors, temporary)
            if to_group:
                open_to_group(temporary)
            move(temporary, path)
    return sha256


def publish_folder(write: Callable[[Path], None], path: Path, names: Sequence[str], *, to_group: bool = False) -> str:
    """Calls `write` on a temporary folder and renames the files `names` into `path`, in this order. As `publish_file`.

    Returns the SHA-256 of the last file, which readers check. Raises DomainError DISK_FULL.
    """
    with writing_to(path.parent):
        make_folder(path.parent)
        with tempfile.TemporaryDirectory(prefix=".writing-", dir=path.parent) as temporary:
            write(Path(temporary))
            files = [Path(temporary, name) for name in names]
            sha256 = file_sha256(files[-1])
            for file in files:
                sync(file)  # a disk that is full says so here, before there is a folder
            path.mkdir(exist_ok=True)
            for opened in (path, *files) if to_group else ():
                open_to_group(opened)
            for file in files:
                move(file, path / file.name)
            sync(path.parent)  # the name of the folder
    return sha256


def keep_published(folder: Path, stem: str, count: int, named: Collection[int]) -> None:
    """Keeps the `count` greatest versions `stem`-v…, and the `named` ones. Deletes others."""
    pattern = re.compile(re.escape(stem) + r"-v(\d+)(\.safetensors)?")
    found = {path: int(match[1]) for path in folder.iterdir() if (match := pattern.fullmatch(path.name))}
    kept = {*sorted(found.values(), reverse=True)[:count], *named}
    for path in (path for path, version in found.items() if version not in kept):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
