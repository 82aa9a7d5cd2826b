"""What a launched engine writes, in a file that cannot grow without end."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path

LOG_BYTES = 2**24  # of the file, before it becomes NAME.1 and another one begins
_READ = 2**16


class EngineLog:
    """`start` gives the end of a pipe for an engine to write to. A thread reads it, so that the engine never waits for
    the service's event loop, and writes it to the file. With `NAME.1` there are at most twice LOG_BYTES. What the disk
    does not take is left out. Only the service's user can read the files: engines write keys to them."""

    def __init__(self, path: Path):
        self._path = path
        self._reader: threading.Thread | None = None

    def start(self) -> int:
        """Begins a new file; that of the engine before is NAME.1. The caller closes the descriptor that it gets, once
        the engine has it. Raises OSError."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        file = self._begin()
        try:
            reading, writing = os.pipe()
        except BaseException:
            os.close(file)
            raise
        self._reader = threading.Thread(target=self._copy, args=(reading, file), name="engine-log", daemon=True)
        self._reader.start()
        return writing

    def finish(self, seconds: float) -> None:
        """Waits until the file has all that the engine wrote. Others that the engine started may still write."""
        if self._reader is not None:
            self._reader.join(seconds)

    def end(self, size: int) -> bytes:
        """The last bytes; none if they cannot be read."""
        try:
            with self._path.open("rb") as file:
                file.seek(max(0, self._path.stat().st_size - size))
                return file.read(size)
        except OSError:
            return b""

    def _begin(self) -> int:
        with suppress(FileNotFoundError):
            self._path.replace(self._path.with_name(f"{self._path.name}.1"))
        return os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)

    def _copy(self, reading: int, file: int) -> None:
        written = 0
        try:
            while data := os.read(reading, _READ):
                try:
                    if written + len(data) > LOG_BYTES:
                        following = self._begin()
                        os.close(file)
                        file, written = following, 0
                    written += os.write(file, data)
                except OSError:  # the disk is full, or the folder is gone: the engine goes on
                    continue
        finally:
            os.close(reading)
            os.close(file)
