"""A disk with little room, at the boundary where files are written: no root and no file system of its own needed."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections import namedtuple

import pytest

_Usage = namedtuple("_Usage", "total used free")


class SmallDisk:
    """Takes `room` more bytes into regular files, then refuses, perhaps in the middle of a write, as real ones do."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int):
        self.room = room
        self.refused = 0
        self._write = os.write
        monkeypatch.setattr(os, "write", self._limited)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: _Usage(10**9, 10**9 - self.room, self.room))

    def _limited(self, descriptor: int, data: bytes | memoryview) -> int:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return self._write(descriptor, data)
        if self.room == 0 and data:
            self.refused += 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = self._write(descriptor, data[: self.room])
        self.room -= written
        return written
