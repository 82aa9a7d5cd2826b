"""A command on a real pseudo-terminal: what it sends, keys to it, and how it leaves the terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.paths import IMPORT_ROOTS

SECONDS = 60.0


class Terminal:
    """`sent` is all that the command sent so far."""

    def __init__(self, process: subprocess.Popen[bytes], parent: int, child: int) -> None:
        self._process = process
        self._parent, self._child = parent, child
        self.before = termios.tcgetattr(child)
        self.sent = ""

    @property
    def settings(self) -> list[Any]:
        return termios.tcgetattr(self._child)

    def press(self, keys: str) -> None:
        os.write(self._parent, keys.encode())

    def wait_for(self, text: str) -> None:
        """Until the command has sent the text."""
        self._read(lambda: text in self.sent, text)

    def status(self) -> int:
        """Once the command has ended."""
        self._read(lambda: self._process.poll() is not None, "the end")
        self._more(0.0)
        return self._process.wait()

    def _read(self, there: Callable[[], bool], what: str) -> None:
        began = time.monotonic()
        while not there():
            assert time.monotonic() - began < SECONDS, f"no {what!r} in {self.sent[-3000:]!r}"
            self._more(0.05)

    def _more(self, seconds: float) -> None:
        while select.select([self._parent], [], [], seconds)[0]:
            self.sent += os.read(self._parent, 65536).decode(errors="replace")


@contextmanager
def on_terminal(*arguments: str, environment: Mapping[str, str], columns: int = 80) -> Iterator[Terminal]:
    """`mulligan` with these arguments."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
    kept = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-m", "mulligan.cli", *arguments],
        env={**kept, "PYTHONPATH": IMPORT_ROOTS, "TERM": "xterm-256color", **environment},
        stdin=child,
        stdout=child,
        stderr=child,
        start_new_session=True,
    )
    try:
        yield Terminal(process, parent, child)
    finally:
        process.kill()
        process.wait()
        os.close(parent)
        os.close(child)


def without(package: str, folder: Path) -> dict[str, str]:
    """Variables for a process that does not find the package."""
    folder.mkdir(exist_ok=True)
    (folder / f"{package}.py").write_text(f'raise ModuleNotFoundError("No module named {package!r}", name={package!r})')
    return {"PYTHONPATH": f"{folder}{os.pathsep}{IMPORT_ROOTS}"}
