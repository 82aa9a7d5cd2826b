"""Disks that are full, and disks that lose with their power what was not synced, under services that run.

A process writes to its files as it always does. For a full disk, its files may not grow (RLIMIT_FSIZE), or its calls
`pwrite64`, by which SQLite writes, fail with ENOSPC (strace). For a loss of power it is killed, and then

- of the folders of a process that `copy_what_is_synced`, there is what it synced, and nothing else;
- of a SQLite database there is what `services/testing/power_loss.py` says of the recorded calls.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mulligan.testing import power_loss

_ATTACH_SECONDS = 5.0


@contextmanager
def files_may_not_grow(pid: int, size: int = 0) -> Iterator[None]:
    """During the block the process can write no file beyond so many bytes."""
    limits = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        with suppress(ProcessLookupError):  # it was killed meanwhile
            resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)


@contextmanager
def database_is_full(pid: int, note: Path) -> Iterator[None]:
    """During the block the process's calls pwrite64 fail as on a full disk. `note` is a file for what strace says."""
    options = [
        "-f",
        "-e",
        "trace=pwrite64",
        "-e",
        "inject=pwrite64:error=ENOSPC",
        "-e",
        "signal=none",
        "-o",
        "/dev/null",
    ]
    with note.open("ab") as log:
        tracer = subprocess.Popen(["strace", *options, "-p", str(pid)], stderr=log)
    _wait_until_traced(pid, tracer)
    try:
        yield
    finally:
        tracer.send_signal(signal.SIGINT)  # it lets the process go
        tracer.wait()


def _wait_until_traced(pid: int, tracer: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + _ATTACH_SECONDS
    while time.monotonic() < deadline and tracer.poll() is None:
        try:
            if f"TracerPid:\t{tracer.pid}\n" in Path(f"/proc/{pid}/status").read_text():
                return
        except OSError:
            return
        time.sleep(0.01)


def copy_what_is_synced(copies: Path, folder: Path) -> None:
    """From now on, what this process syncs of the folder is copied. What is there now counts as synced."""
    shutil.rmtree(copies, ignore_errors=True)
    copies.mkdir(parents=True)
    folder.mkdir(parents=True, exist_ok=True)
    copier = _Copier(copies, folder.resolve(), os.fsync)
    for path in (folder, *folder.rglob("*")):
        descriptor = os.open(path, os.O_RDONLY)
        copier.copy(descriptor)
        os.close(descriptor)
    os.fsync = copier.sync  # type: ignore[assignment]  # no object with a method `fileno` is synced here


class _Copier:
    def __init__(self, copies: Path, folder: Path, fsync: object):
        self._copies = copies
        self._folder = folder
        self._fsync = fsync
        self._held: dict[int, int] = {}  # open, so that no inode's number is used again

    def sync(self, descriptor: int) -> None:
        self._fsync(descriptor)  # type: ignore[operator]
        self.copy(descriptor)

    def copy(self, descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if not path.is_relative_to(self._folder):
            return
        status = os.fstat(descriptor)
        if status.st_ino not in self._held:
            self._held[status.st_ino] = os.dup(descriptor)
        if stat.S_ISDIR(status.st_mode):
            names = {entry.name: entry.inode() for entry in os.scandir(path)}
            self._write(f"{status.st_ino}.names", json.dumps(names).encode())
        else:
            self._write(f"{status.st_ino}.content", Path(f"/proc/self/fd/{descriptor}").read_bytes())

    def _write(self, name: str, content: bytes) -> None:
        new = self._copies / "new"
        new.write_bytes(content)
        new.replace(self._copies / name)


def lose_what_is_not_synced(copies: Path, folder: Path) -> int:
    """After the end of the process: leaves in the folder what it had synced. Returns how many files are gone, or are
    others."""
    before = _contents(folder)
    number = folder.stat().st_ino
    left = folder.with_name(f".{folder.name}-left")
    shutil.rmtree(left, ignore_errors=True)
    left.mkdir()
    _restore(copies, number, left)
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in left.iterdir():
        path.rename(folder / path.name)
    left.rmdir()
    after = _contents(folder)
    return sum(after.get(name) != content for name, content in before.items())


def _contents(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _restore(copies: Path, number: int, folder: Path) -> None:
    for name, of in json.loads((copies / f"{number}.names").read_text()).items():
        if (copies / f"{of}.names").exists():
            (folder / name).mkdir()
            _restore(copies, of, folder / name)
        else:  # its name was synced; its content perhaps not
            content = copies / f"{of}.content"
            (folder / name).write_bytes(content.read_bytes() if content.exists() else b"")


def lose_power_of_database(folder: Path, before: dict[str, bytes], trace: Path, chance: random.Random) -> int:
    """Leaves in the folder what a disk may have at the end of the trace. `before` are the files at its begin, by path.
    Returns how many files are gone, or are others."""
    disk = power_loss.Disk()
    for path, content in before.items():
        disk.do(power_loss.Created(path))
        disk.do(power_loss.Written(path, 0, content))
        disk.do(power_loss.Synced(path))
    disk.do(power_loss.Synced(str(folder)))
    for event in power_loss.events(trace, folder, before):
        disk.do(event)
    now = files_of(folder)
    left = disk.after_loss(chance)
    for path in now:
        Path(path).unlink()
    for path, content in left.items():
        Path(path).write_bytes(content)
    return sum(left.get(path) != content for path, content in now.items())


def files_of(folder: Path) -> dict[str, bytes]:
    """Contents by path."""
    return {str(path): path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
