"""State files that a service writes: JSON that people can read, with checksums. Damage is kept small, and told.

A document is one JSON object in a file, which is replaced in one rename. A log is a file to which JSON objects are
appended, one a line. The last member of each object is `crc32`: the CRC-32 of zlib, as 8 hexadecimal digits, of the
bytes before the comma that stands before it. An object without `crc32` is read as it is: earlier releases wrote none,
and who changes a file by hand removes it. So damage is not noticed where it cuts out exactly the checksum, alone or
with the end of the text before it, and leaves an object of the kind. That cannot happen to a kind that has no defaults
and ends in an object or a list, as the entries of logs do.

In a log a damaged object costs that object alone. A write that was cut off leaves a torn end, which the next write
removes.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

from mulligan.common.disk import writing_to
from mulligan.common.errors import DomainError, Reason
from mulligan.common.files import append, replace, sync

T = TypeVar("T")
_CHECKSUM = re.compile(rb',\s*"crc32":\s*"([0-9a-f]{8})"\s*\}')
_LAST = re.compile(_CHECKSUM.pattern + rb"\Z")
_LAST_LENGTH = 64  # bytes at most, unless somebody indented it far
_BEGIN = re.compile(rb'\{\s*"')
_LARGEST = 128 * 2**20  # bytes of a document: twice the largest message
_EDITED = "If you changed it by hand, remove the member crc32 and the comma before it."


class _Unreadable(ValueError):
    """The message says why."""


def write_document(path: Path, value: Any, mode: int = 0o644) -> bytes:
    """Writes an object as a document, and returns its bytes. Raises DomainError DISK_FULL, or OSError when the folder
    is gone."""
    content = _with_checksum(msgspec.json.format(msgspec.json.encode(value), indent=2)) + b"\n"
    with writing_to(path.parent, len(content)):
        replace(path, content, mode)
    return content


def read_document(path: Path, kind: type[T], advice: str) -> T:
    """Raises FileNotFoundError or NotADirectoryError where there is none, and DomainError STATE_DAMAGED, metadata
    `file`, whose message has the advice: what is lost and what to do."""
    try:
        return _decoded(_content(path, _LARGEST).strip(), kind)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise state_damaged(path, f"{path} cannot be read: {error.strerror}. {advice}") from error
    except _Unreadable as error:
        raise state_damaged(path, f"{path} is damaged: {error}. {advice} {_EDITED}") from error


def state_damaged(path: Path, message: str) -> DomainError:
    return DomainError(Reason.STATE_DAMAGED, message, file=path)


def in_utc(time: datetime) -> datetime:
    """The time in UTC, which one without a zone is in. Raises ValueError where there is none."""
    try:
        return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    except OverflowError:
        raise ValueError(f"{time.isoformat()} is no time in UTC") from None


@dataclass(frozen=True, slots=True)
class DamagedLine:
    """What cannot be read of a line: its bytes `begin` to `end`, the latter not included, counted from the file's
    start. `torn`: it is the file's end, without a line break, as a write leaves it that was cut off."""

    path: Path
    number: int  # of the line, from 1
    begin: int
    end: int
    cause: str
    torn: bool = False

    def __str__(self) -> str:
        what = "was cut off while it was written" if self.torn else f"is damaged ({self.cause})"
        return f"line {self.number} of {self.path}, bytes {self.begin} to {self.end}, {what}"


class LineLog(Generic[T]):
    """A log of objects of one kind. One object of this class writes to a file at a time; anybody may read it."""

    def __init__(self, path: Path, kind: type[T]):
        self.path = path
        self._kind = kind

    def read(self) -> tuple[list[T], list[DamagedLine]]:
        """All that can be read, in order; nothing where there is no file. Raises DomainError STATE_DAMAGED where the
        disk does not give the file's content."""
        values: list[T] = []
        damaged: list[DamagedLine] = []
        for found in self._pieces(self._content()):
            if isinstance(found, DamagedLine):
                damaged.append(found)
            else:
                values.append(found.value)
        return values, damaged

    def read_from(self, begin: int) -> tuple[list[T], int]:
        """What can be read of the whole lines from byte `begin` on, where a line begins, and where they end. Raises
        DomainError STATE_DAMAGED as `read` does."""
        content = self._content(begin)
        whole = content[: content.rfind(b"\n") + 1]
        found = [piece.value for piece in self._pieces(whole) if isinstance(piece, _Piece)]
        return found, begin + len(whole)

    def append(self, values: Sequence[T]) -> None:
        """Writes all or nothing, after it removed a torn end. Raises DomainError DISK_FULL, or OSError without the
        folder."""
        if not values:
            return
        lines = b"".join(_with_checksum(msgspec.json.encode(value)) + b"\n" for value in values)
        with writing_to(self.path.parent, len(lines)):
            # Not kept open: a trainer may have thousands of runs.
            descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                append(descriptor, self._mend_end(descriptor) + lines)
            finally:
                os.close(descriptor)

    def sync(self) -> None:
        """Waits until what was appended is on the disk. Raises DomainError DISK_FULL, or OSError without the file."""
        with writing_to(self.path.parent):
            sync(self.path)
            sync(self.path.parent)  # the file's name, if it is new

    def _mend_end(self, descriptor: int) -> bytes:
        """Cuts a torn end off. Returns what has to come before the next line: a line break that was torn off."""
        size = os.fstat(descriptor).st_size
        if size == 0 or os.pread(descriptor, 1, size - 1) == b"\n":
            return b""
        content = self._content()
        begin = content.rfind(b"\n") + 1
        ends = [found.end for found in self._pieces(content) if isinstance(found, _Piece) and found.end > begin]
        os.ftruncate(descriptor, ends[-1] if ends else begin)
        return b"\n" if ends else b""

    def _content(self, begin: int = 0) -> bytes:
        try:
            return _content(self.path, begin=begin)
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise state_damaged(self.path, f"{self.path} cannot be read: {error.strerror}") from error

    def _pieces(self, content: bytes) -> Iterator[_Piece[T] | DamagedLine]:
        """The objects in whole lines, and damage between them."""
        *whole, rest = content.split(b"\n")
        begin = 0
        for number, line in enumerate([*whole, rest], 1):
            yield from self._of_line(line, begin, number, torn=number > len(whole))
            begin += len(line) + 1

    def _of_line(self, line: bytes, offset: int, number: int, *, torn: bool) -> Iterator[_Piece[T] | DamagedLine]:
        """More than one object where the line break between them was damaged."""
        try:
            if line:
                yield _Piece(_decoded(line, self._kind), offset + len(line))
            return
        except _Unreadable as error:
            cause = str(error)
        begin = lost = 0
        for checksum in _CHECKSUM.finditer(line):
            for start in _BEGIN.finditer(line, begin, checksum.start()):
                try:
                    value = _decoded(line[start.start() : checksum.end()], self._kind)
                except _Unreadable:
                    continue
                if start.start() > lost:
                    yield DamagedLine(self.path, number, offset + lost, offset + start.start(), cause)
                yield _Piece(value, offset + checksum.end())
                lost = checksum.end()
                break
            begin = checksum.end()
        if lost < len(line):
            yield DamagedLine(self.path, number, offset + lost, offset + len(line), cause, torn)


@dataclass(frozen=True, slots=True)
class _Piece(Generic[T]):
    value: T
    end: int  # in the file


def _content(path: Path, largest: int | None = None, begin: int = 0) -> bytes:
    """What a file has from byte `begin` on. What is no file, such as a pipe, is not waited for. Raises OSError, and
    _Unreadable where it has more than `largest` bytes."""
    with open(path, "rb", opener=_without_waiting) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "it is no file", str(path))
        if largest is not None and found.st_size > largest:
            raise _Unreadable(f"it has {found.st_size:,} bytes, and at most {largest:,} are read")
        file.seek(begin)
        return file.read()


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def _with_checksum(text: bytes) -> bytes:
    """The text of a JSON object that has members, with `crc32`."""
    body = text.removesuffix(b"}").rstrip()
    sum_ = b"%08x" % zlib.crc32(body)
    return b'%s,\n  "crc32": "%s"\n}' % (body, sum_) if b"\n" in body else b'%s,"crc32":"%s"}' % (body, sum_)


def _decoded(text: bytes, kind: type[T]) -> T:
    """The value of an object's text, with or without a checksum. Raises _Unreadable."""
    if checksum := _LAST.search(text, len(text) - _LAST_LENGTH):
        body = text[: checksum.start()]
        found = b"%08x" % zlib.crc32(body)
        if found != checksum[1]:
            raise _Unreadable(f"its crc32 is {checksum[1].decode()}, that of its content {found.decode()}")
        return _of_json(body + b"}", kind)
    value = _of_json(text, kind)
    names = _of_json(text, dict[str, msgspec.Raw]).keys()
    unknown = names & {"crc32"}
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):  # of an earlier release, which wrote these alone
        unknown = names - {field.encode_name for field in msgspec.structs.fields(kind)}
    if unknown:
        raise _Unreadable(f"it has no crc32 that can be read, and a member {min(unknown)[:40]!r}")
    return value


def _of_json(text: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(text, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _Unreadable(str(error)) from error
