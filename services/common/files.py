"""Writes files that are complete or absent, also after a crash of the machine."""

from __future__ import annotations

import hashlib
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


Stamp = tuple[int, int, int]


def stamp(path: Path) -> Stamp | None:
    """What is another after a file was changed or replaced; None if it cannot be seen."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def sync(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def append(descriptor: int, data: bytes) -> None:
    """Writes all or nothing: after a failed write the file is cut to its old size. Raises OSError."""
    end = os.fstat(descriptor).st_size
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
    except BaseException:
        os.ftruncate(descriptor, end)
        raise


def replace(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Writes a file in one rename. On a failure the old file stays. Raises OSError."""
    with temporary_file(path.parent, mode) as temporary:
        descriptor = os.open(temporary, os.O_WRONLY)
        try:
            append(descriptor, content)
        finally:
            os.close(descriptor)
        move(temporary, path)


def make_folder(path: Path) -> None:
    """Makes a folder and the missing ones above it, and waits until their names are on the disk. Raises OSError."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(missing):
        sync(folder.parent)


def user_folder(variable: str, default: str) -> Path:
    """Mulligan's folder among those of the user: `user_folder("XDG_CACHE_HOME", ".cache")`. Raises RuntimeError for a
    user without a home folder. https://specifications.freedesktop.org/basedir-spec/latest/"""
    chosen = os.environ.get(variable, "")
    return (Path(chosen) if os.path.isabs(chosen) else Path.home() / default) / "mulligan"


def keep_files_private() -> None:
    """What this process and its children make from now on can be read by its user alone, unless its mode is changed."""
    os.umask(0o077)


def open_to_group(path: Path) -> None:
    """Lets its group read a file, or enter and read a folder, in which new files get the same group. Raises OSError."""
    mode = path.stat().st_mode
    path.chmod(stat.S_IMODE(mode) | (0o2050 if stat.S_ISDIR(mode) else 0o040))


@contextmanager
def temporary_file(folder: Path, mode: int = 0o644) -> Iterator[Path]:
    """A new, empty file in `folder`. It is removed at the end of the block unless it was moved. Raises OSError."""
    path = folder / f".writing-{secrets.token_hex(8)}"
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def move(source: Path, target: Path) -> None:
    """Renames a file within one file system and waits until content and name are on the disk. Raises OSError."""
    sync(source)
    source.replace(target)
    sync(target.parent)


def move_folder(source: Path, target: Path) -> None:
    """As `move`, a folder with all that is in it. `target` is absent, or an empty folder. Raises OSError."""
    for path in source.rglob("*"):
        sync(path)
    move(source, target)
