"""Reports a full disk as DISK_FULL, with the folder and the missing space, and a removed folder as FOLDER_REMOVED."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mulligan.common.errors import DomainError, Reason

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # EFBIG: file size limit of a process or a file system
# The message of errors without an errno: libraries in Rust (safetensors, tantivy), and SQLite.
_TEXTS = (*map(os.strerror, _FULL), "database or disk is full")


@contextmanager
def writing_to(folder: Path, size: int = 0) -> Iterator[None]:
    """Wraps code that writes below `folder`, about `size` bytes if known. Raises DomainError DISK_FULL, with metadata
    `folder`, `free_bytes` and `needed_bytes`, when the disk or a quota is used up, and FOLDER_REMOVED, with metadata
    `folder`, when the folder is gone. Other errors pass unchanged."""
    try:
        yield
    except Exception as error:
        if _is_full(error):
            raise disk_full(_folder_of(error, folder), size) from error
        if _is_removed(error, folder):
            raise folder_removed(folder) from error
        raise


def disk_full(folder: Path, size: int = 0) -> DomainError:
    free = free_bytes(folder)
    if size > free:
        details = f"{_text(size - free)} are missing ({_text(size)} to write, {_text(free)} free)"
    else:
        details = f"{_text(free)} are free, so there may be a quota" if size else f"{_text(free)} are free"
    message = f"the disk of {folder} is full: {details}"
    return DomainError(Reason.DISK_FULL, message, folder=folder, free_bytes=free, needed_bytes=size)


def folder_removed(folder: Path) -> DomainError:
    message = f"{folder}, or a file in it, was removed while this service ran. Start the service again"
    return DomainError(Reason.FOLDER_REMOVED, message, folder=folder)


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of `folder`, which need not exist yet, and may be another user's."""
    there = next((path for path in (folder, *folder.absolute().parents) if _can_be_seen(path)), Path("/"))
    return shutil.disk_usage(there).free


def _can_be_seen(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # it lies in a folder of another user, or its name is too long to be here
        return False


def _folder_of(error: Exception, folder: Path) -> Path:
    """The folder of the file that the error names: a library may have written to its own cache."""
    file = getattr(error, "filename2", None) or getattr(error, "filename", None)
    elsewhere = isinstance(file, str) and not Path(file).absolute().is_relative_to(folder.absolute())
    return Path(str(file)).parent if elsewhere else folder


def _is_full(error: Exception) -> bool:
    if isinstance(error, DomainError):
        return False
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    return any(text in str(error) for text in _TEXTS)


def _is_removed(error: Exception, folder: Path) -> bool:
    return isinstance(error, FileNotFoundError | sqlite3.OperationalError) and not folder.exists()


def _text(size: int) -> str:
    """Formats bytes with a unit: 512 B, 1.6 MB."""
    amount = float(size)
    units = ["B", "kB", "MB", "GB"]
    while amount >= 1000 and len(units) > 1:
        amount = amount / 1000
        units = units[1:]
    return f"{amount:.0f} {units[0]}" if units[0] == "B" else f"{amount:.1f} {units[0]}"
