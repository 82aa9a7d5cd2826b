"""A disk that loses, with its power, whatever was not synced: contents of files, and names in folders."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest


class UnsyncedDisk:
    """Follows what this process syncs. `lose_power` leaves of a folder what was synced, and nothing else."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self._fsync = os.fsync
        self._contents: dict[int, bytes] = {}  # by the number of the file's inode
        self._names: dict[int, dict[str, int]] = {}
        self._held: list[int] = []  # open, so that no number is used again
        monkeypatch.setattr(os, "fsync", self._synced)

    def _synced(self, descriptor: int) -> None:
        self._held.append(os.dup(descriptor))
        status = os.fstat(descriptor)
        path = Path(f"/proc/self/fd/{descriptor}")
        if stat.S_ISDIR(status.st_mode):
            self._names[status.st_ino] = {entry.name: entry.inode() for entry in os.scandir(path)}
        else:
            self._contents[status.st_ino] = path.read_bytes()

    def lose_power(self, folder: Path) -> None:
        """The folder itself stays."""
        left = self._left(folder)
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name, content in left.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        self.close()
        for path in (folder, *folder.rglob("*")):  # what was left is on the disk
            descriptor = os.open(path, os.O_RDONLY)
            self._synced(descriptor)
            os.close(descriptor)

    def _left(self, folder: Path) -> dict[str, bytes]:
        names = self._names.get(folder.stat().st_ino, {})
        found = {}
        for path in folder.rglob("*") if names else ():
            parent = self._names.get(path.parent.stat().st_ino, {})
            number = path.stat().st_ino
            if path.is_file() and path.name in parent:
                found[str(path.relative_to(folder))] = self._contents.get(parent[path.name], b"")
            elif path.is_file():
                assert number not in self._contents or path.name.startswith("."), f"the name of {path} is not synced"
        return found

    def close(self) -> None:
        for descriptor in self._held:
            os.close(descriptor)
        self._held.clear()
        self._contents.clear()
        self._names.clear()
