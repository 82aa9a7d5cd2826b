"""Service processes that are forked from one in which everything is imported already.

Importing takes the trainer seven CPU seconds, and a suite starts dozens. The fork server is Python's own
(https://docs.python.org/3.11/library/multiprocessing.html#contexts-and-start-methods); it ends with the process that
started it. What a module reads from the environment while it is imported is that of the fork server, and so is the
order of sets of text: a process that needs its own is started by `python -m`.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path

_PRELOADED = ["mulligan.testing.preloaded"]


class ForkedProcess:
    """The part of subprocess.Popen that tests use."""

    def __init__(self, module: str, arguments: Sequence[str], log: Path, environment: Mapping[str, str]):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        self.args = [sys.executable, "-m", module, *arguments]
        self._process = context.Process(
            target=_run_module, args=(module, list(arguments), str(log), str(log.parent), dict(environment))
        )
        self._reading = threading.Lock()  # the exit status can be read from the fork server once
        self._process.start()
        atexit.register(self.kill)  # or Python would wait for its end
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        """The exit status, minus the signal's number where one ended it; None while it runs."""
        with self._reading:
            return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Raises subprocess.TimeoutExpired."""
        if not wait([self._process.sentinel], timeout):
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        status = self.poll()
        assert status is not None
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run_module(module: str, arguments: list[str], log: str, folder: str, environment: dict[str, str]) -> None:
    """What `python -m MODULE ARGUMENTS >> LOG 2>&1` does, in a process that was just forked."""
    written = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    for stream in (1, 2):
        os.dup2(written, stream)
    os.close(written)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
