"""Files that are whole or absent: checkpoints and published weights.

A checkpoint is a folder of safetensors files, whose names carry their hashes, and manifest.json, which lists them. The
manifest is replaced by one rename, so a name that is saved again refers to the old files or to the new, never to a mix,
wherever a crash falls. Nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from services.common.errors import DomainError, Reason, invalid_field
from services.common.files import file_sha256, sync

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_MANIFEST = "manifest.json"
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class CheckpointState:
    """The scalars of a checkpoint."""

    fingerprint: str
    next_sequence: int
    optimizer_steps: int


def check_name(field: str, name: str) -> str:
    """A name becomes one path component: no separators, nothing hidden, nothing relative. Raises INVALID_FIELD."""
    if not _NAME.fullmatch(name):
        raise invalid_field(field, "1 to 128 letters, digits, '.', '_' and '-', the first not '.' or '-'")
    return name


def save_checkpoint(folder: Path, parts: Mapping[str, Mapping[str, Tensor]], state: CheckpointState) -> str:
    """Writes the tensors of each part and the scalars; returns the SHA-256 of the manifest, which lists the files'.

    Saving the same again changes nothing; saving something else under the name replaces it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, dict[str, str]] = {}
    for part, tensors in parts.items():
        with temporary_file(folder) as path:
            sha256 = write_tensors(tensors, path)
            name = f"{part}-{sha256[:16]}.safetensors"
            path.replace(folder / name)
            files[part] = {"file": name, "sha256": sha256}
    manifest = json.dumps(
        {"format": _FORMAT, "state": asdict(state), "files": files}, indent=1, sort_keys=True
    ).encode()
    with temporary_file(folder) as path:
        path.write_bytes(manifest)
        sync(path)
        path.replace(folder / _MANIFEST)
    sync(folder)
    kept = {_MANIFEST, *(entry["file"] for entry in files.values())}
    for path in folder.iterdir():
        if path.name not in kept:
            path.unlink(missing_ok=True)
    return hashlib.sha256(manifest).hexdigest()


def load_checkpoint(folder: Path) -> tuple[dict[str, dict[str, Tensor]], CheckpointState]:
    """Reads and verifies. Raises DomainError CHECKPOINT_NOT_FOUND, or CHECKPOINT_MISMATCH when it is damaged."""
    manifest = _manifest(folder)
    parts: dict[str, dict[str, Tensor]] = {}
    try:
        for part, entry in manifest["files"].items():
            path = folder / entry["file"]
            if path.parent != folder or file_sha256(path) != entry["sha256"]:
                raise damaged(folder.name, f"{entry['file']} is not what was saved")
            parts[part] = load_file(path)
        return parts, CheckpointState(**manifest["state"])
    except (OSError, SafetensorError, LookupError, TypeError, AttributeError) as error:
        raise damaged(folder.name, str(error)) from error


def _manifest(folder: Path) -> Any:
    try:
        manifest = json.loads((folder / _MANIFEST).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise DomainError(
            Reason.CHECKPOINT_NOT_FOUND, f"there is no checkpoint {folder.name!r}", name=folder.name
        ) from None
    except (OSError, ValueError) as error:
        raise damaged(folder.name, f"{_MANIFEST}: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise damaged(folder.name, f"{_MANIFEST}: expected format {_FORMAT}")
    return manifest


def damaged(name: str, cause: str) -> DomainError:
    return DomainError(Reason.CHECKPOINT_MISMATCH, f"checkpoint {name!r}: {cause}"[:1000], name=name)


def keep_checkpoints(root: Path, count: int) -> None:
    """Deletes all but the `count` checkpoints below `root` that were saved last."""
    saved = sorted(root.glob(f"*/{_MANIFEST}"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for manifest in saved[count:]:
        manifest.unlink()  # first: from here on it is no checkpoint
        shutil.rmtree(manifest.parent, ignore_errors=True)


def publish_file(tensors: Mapping[str, Tensor], path: Path) -> str:
    """Writes a safetensors file in one rename. Returns its SHA-256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_file(path.parent) as temporary:
        sha256 = write_tensors(tensors, temporary)
        temporary.replace(path)
    sync(path.parent)
    return sha256


def publish_folder(write: Callable[[Path], None], path: Path, names: Sequence[str]) -> str:
    """Takes the files `names` from what `write` makes and renames them into `path`, one by one in this order. Returns
    the SHA-256 of the last, the one that readers check."""
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=path.parent) as temporary:
        write(Path(temporary))
        for name in names:
            file = Path(temporary, name)
            sync(file)
            sha256 = file_sha256(file)
            file.replace(path / name)
    sync(path)
    return sha256


def keep_published(folder: Path, stem: str, count: int) -> None:
    """Deletes all but the `count` versions `stem`-v… that were published last."""
    pattern = re.compile(re.escape(stem) + r"-v\d+(\.safetensors)?")
    found = [path for path in folder.iterdir() if pattern.fullmatch(path.name)]
    for path in sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True)[count:]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> str:
    """Writes a safetensors file to the disk itself, past its cache. Returns its SHA-256."""
    save_file(dict(tensors), path)
    sync(path)
    return file_sha256(path)


@contextlib.contextmanager
def temporary_file(folder: Path) -> Iterator[Path]:
    """A new file on the same file system; what is not renamed is removed."""
    descriptor, name = tempfile.mkstemp(prefix=".writing-", dir=folder)
    os.close(descriptor)
    path = Path(name)
    path.chmod(0o644)  # the policy service may run as another user
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
