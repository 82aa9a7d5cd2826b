"""What a disk may have after its power failed: a recording of what processes wrote, up to a random moment.

`strace` (https://strace.io) records the calls of the system that change files. The disk is modelled as POSIX leaves it:

- What was written to a file before it was synced (fsync, fdatasync) is there.
- Each later write may be there, be missing, or be there in part: sectors of 512 bytes, any of them. One write may be
  missing where a later one is there. The same holds for changes of a file's size.
- Until its folder is synced, a new file may be missing, and a removed one be there again.

So this finds a missing or misplaced sync, also where the page cache hides it from a test that kills processes. It does
not find what a disk does that loses what it said it had synced, and no faults of the kernel and its file systems.
Writes to memory that is mapped from a file are not recorded; SQLite maps only its index of the log and makes it anew.
"""

from __future__ import annotations

import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

SECTOR = 512  # bytes; a disk writes one whole or not at all
_CALLS = "openat,write,pwrite64,writev,pwritev,fsync,fdatasync,ftruncate,truncate,fallocate,unlink,unlinkat,rename"
_LONGEST = 2**24  # bytes of one write
_CALL = re.compile(r"(\w+)\((.*)\) += (-?\d+)(?:<(.*)>)?.*")
_BEGUN = " <unfinished ...>"
_RESUMED = re.compile(r"<\.\.\. \w+ resumed>(.*)")


class CannotRecord(Exception):
    """The message says why."""


@dataclass(frozen=True, slots=True)
class Created:
    path: str


@dataclass(frozen=True, slots=True)
class Removed:
    path: str


@dataclass(frozen=True, slots=True)
class Written:
    path: str
    offset: int | None  # None: at the end
    data: bytes


@dataclass(frozen=True, slots=True)
class Resized:
    path: str
    size: int


@dataclass(frozen=True, slots=True)
class Synced:
    path: str  # of a file or a folder


Event = Created | Removed | Written | Resized | Synced


def record(command: Sequence[str | Path], trace: Path) -> None:
    """Runs the command, and writes what it and its children do to the file `trace`. Raises CannotRecord, and
    RuntimeError if the command fails."""
    done = _run([*recorder(trace), *command])
    if done.returncode:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}: {done.stderr[-4000:]}")


def recorder(trace: Path) -> list[str]:
    """The beginning of a command that records what the rest of it, and its children, do. Raises CannotRecord."""
    program = shutil.which("strace")
    if program is None:
        raise CannotRecord("strace is not installed")
    options = ["-f", "--seccomp-bpf", "-y", "-xx", "-s", f"{_LONGEST}", "-e", f"trace={_CALLS}", "-e", "signal=none"]
    command = [program, *options, "-o", str(trace)]
    probe = _run([*command, sys.executable, "-c", ""])
    if probe.returncode:
        raise CannotRecord(f"strace does not work here: {probe.stderr.strip()}")
    return command


def _run(command: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=False, capture_output=True, text=True)


def events(trace: Path, folder: Path, there: Collection[str] = ()) -> Iterator[Event]:
    """What was done to the files that lie in this folder, in the order in which the calls ended; the files `there`
    were so before. Raises ValueError for a call that this module does not know to replay."""
    known = {*there}
    for name, arguments, result, opened in _finished(trace):
        if result < 0:
            continue
        path = opened if name == "openat" else _path(arguments)
        if Path(path) == folder and name in ("fsync", "fdatasync"):
            yield Synced(path)
        elif Path(path).parent == folder:
            yield from _events(name, arguments, result, path, known)


def _events(name: str, arguments: str, result: int, path: str, known: set[str]) -> Iterator[Event]:
    if name == "openat":
        if "O_CREAT" in arguments and path not in known:
            known.add(path)
            yield Created(path)
        if "O_TRUNC" in arguments:
            yield Resized(path, 0)
    elif name in ("fsync", "fdatasync"):
        yield Synced(path)
    elif name == "pwrite64":
        yield Written(path, int(arguments.rpartition(", ")[2]), _text(arguments)[:result])
    elif name == "write":
        yield Written(path, None, _text(arguments)[:result])
    elif name == "ftruncate":
        yield Resized(path, int(arguments.rpartition(", ")[2]))
    elif name in ("unlink", "unlinkat"):
        known.discard(path)
        yield Removed(path)
    else:
        raise ValueError(f"{name} of {path}: no model for it")


def _finished(trace: Path) -> Iterator[tuple[str, str, int, str]]:
    """Name, arguments, result and, of a call that opens a file, its path."""
    begun: dict[str, str] = {}
    with trace.open() as lines:
        for line in lines:
            process, _, said = line.rstrip("\n").partition(" ")
            said = said.lstrip()
            if said.endswith(_BEGUN):
                begun[process] = said.removesuffix(_BEGUN)
                continue
            if resumed := _RESUMED.match(said):
                said = begun.pop(process, "") + resumed[1]
            if call := _CALL.fullmatch(said):
                yield call[1], call[2], int(call[3]), _decoded(call[4] or "").decode()


def _path(arguments: str) -> str:
    """Of a call's first file: behind its number, or as a text."""
    number, opened, rest = arguments.partition("<")
    if opened and number.isdigit():
        return _decoded(rest.partition(">")[0]).decode()
    return _text(arguments).decode(errors="replace") if '"' in arguments else ""


def _text(arguments: str) -> bytes:
    return _decoded(arguments[arguments.index('"') + 1 : arguments.rindex('"')])


def _decoded(hexadecimal: str) -> bytes:
    return bytes.fromhex(hexadecimal.replace("\\x", ""))


@dataclass
class _File:
    synced: bytearray = field(default_factory=bytearray)
    later: list[Written | Resized] = field(default_factory=list)

    def sync(self) -> None:
        for change in self.later:
            _apply(self.synced, change)
        self.later.clear()


class Disk:
    """The files of one folder, while events happen to them."""

    def __init__(self) -> None:
        self._files: dict[str, _File] = {}
        self._new: set[str] = set()  # since the folder was synced
        self._removed: dict[str, _File] = {}

    def do(self, event: Event) -> None:
        match event:
            case Created(path):
                self._files[path] = _File()
                self._new.add(path)
            case Removed(path):
                removed = self._files.pop(path)
                if path not in self._new:
                    self._removed[path] = removed
                self._new.discard(path)
            case Synced(path) if path in self._files:
                self._files[path].sync()
            case Synced(_):
                self._new.clear()
                self._removed.clear()
            case Written(path, _, _) | Resized(path, _):
                self._files[path].later.append(event)

    def after_loss(self, chance: random.Random) -> dict[str, bytes]:
        """What its files may have when the power fails now, by path. At times all or nothing is there of what was not
        synced."""
        share = chance.choice((0.0, 0.5, 0.9, 1.0))

        def kept() -> bool:
            return chance.random() < share

        found = {path: file for path, file in self._files.items() if path not in self._new or kept()}
        found |= {path: file for path, file in self._removed.items() if path not in self._files and not kept()}
        return {path: _left(file, kept, chance) for path, file in found.items()}


def _left(file: _File, kept: Callable[[], bool], chance: random.Random) -> bytes:
    content = bytearray(file.synced)
    for change in file.later:
        if kept():
            _apply(content, change)
        elif isinstance(change, Written) and change.offset is not None and chance.random() < 0.5:
            for part in _sectors(change):
                if kept():
                    _apply(content, part)
    return bytes(content)


def _sectors(written: Written) -> Iterator[Written]:
    """The write in parts, each within one sector of the file."""
    assert written.offset is not None
    at = 0
    while at < len(written.data):
        size = SECTOR - (written.offset + at) % SECTOR
        yield Written(written.path, written.offset + at, written.data[at : at + size])
        at += size


def _apply(content: bytearray, change: Written | Resized) -> None:
    if isinstance(change, Resized):
        del content[change.size :]
        content.extend(bytes(change.size - len(content)))
        return
    offset = len(content) if change.offset is None else change.offset
    content.extend(bytes(max(0, offset - len(content))))
    content[offset : offset + len(change.data)] = change.data


@dataclass(frozen=True, slots=True)
class PowerLoss:
    """What is left, and what had been written to the notes before."""

    files: dict[str, bytes]  # by name
    notes: list[bytes]  # lines


def losses(happened: Sequence[Event], notes: Path, count: int, chance: random.Random) -> Iterator[PowerLoss]:
    """So many moments, in their order, at each of which the power fails. `notes` is a file that is never lost."""
    disk = Disk()
    lines: list[bytes] = []
    before = 0
    for moment in sorted(chance.sample(range(1, len(happened) + 1), min(count, len(happened)))):
        for event in happened[before:moment]:
            if event.path != f"{notes}":
                disk.do(event)
            elif isinstance(event, Written):
                lines.append(event.data)
        before = moment
        yield PowerLoss({Path(path).name: content for path, content in disk.after_loss(chance).items()}, list(lines))
