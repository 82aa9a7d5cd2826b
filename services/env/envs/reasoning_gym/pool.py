"""The processes that make reasoning-gym's questions and score answers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from mulligan.env.base import Faulted

SIZE = 1_000  # of a dataset as it is made: some draw from it as a whole, so that it is a part of what a task is


class TookTooLong(Exception):
    """A request took too long."""


class DatasetError(Exception):
    """A process answered with an error."""


class DatasetPool:
    """Up to `count` processes. A new one is started when all others are busy. Calls block, and may come from any
    thread."""

    def __init__(self, count: int, seconds: int, memory: int, settings: Mapping[str, Any]) -> None:
        self._limits = (seconds, memory)
        self._settings = settings
        self._free = threading.Semaphore(count)
        self._lock = threading.Lock()
        self._idle: list[_DatasetProcess] = []
        self._all: set[_DatasetProcess] = set()
        self._closed = False

    def ask(self, request: Mapping[str, Any]) -> Any:
        """Sends a request and returns the answer. Raises TookTooLong, DatasetError with the error of the process, and
        Faulted if the process ends."""
        with self._free:
            process = self._take()
            try:
                answer = process.ask(request)
            except BaseException as error:
                if not isinstance(error, DatasetError):
                    self._discard(process)
                    raise
                self._give_back(process)
                raise
            self._give_back(process)
            return answer

    def close(self) -> None:
        """Ends all processes. Requests that are running raise Faulted."""
        with self._lock:
            self._closed = True
            processes = tuple(self._all)
            self._idle = []
        for process in processes:
            self._discard(process)

    def _take(self) -> _DatasetProcess:
        with self._lock:
            if self._closed:
                raise Faulted("the environment is closed")
            if self._idle:
                return self._idle.pop()
            try:
                process = _DatasetProcess(*self._limits)
            except OSError as error:
                needed = "untrusted environments need subprocesses = true for it"
                raise Faulted(f"no process for reasoning-gym ({needed}): {error}") from None
            self._all.add(process)
        try:
            process.ask(self._settings)  # which it waits for first
        except BaseException:
            self._discard(process)
            raise
        return process

    def _give_back(self, process: _DatasetProcess) -> None:
        with self._lock:
            if not self._closed:
                self._idle.append(process)

    def _discard(self, process: _DatasetProcess) -> None:
        with self._lock:
            self._all.discard(process)
        process.end()


class _DatasetProcess:
    def __init__(self, seconds: int, memory: int) -> None:
        variables = {
            "PATH": os.defpath,
            "LANG": "C.UTF-8",
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "PYTHONHASHSEED": "0",  # some generators go through sets of texts
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "mulligan.env.envs.reasoning_gym.process", str(seconds), str(memory)]
        self._seconds = seconds
        self._process = subprocess.Popen(
            command,
            env=variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # a Ctrl-C is the server's, which then ends this
        )

    def ask(self, request: Mapping[str, Any]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except (OSError, ValueError) as error:  # ValueError: `end` has closed the pipes
            raise Faulted(f"the process of reasoning-gym is gone: {error}") from error
        if not line.endswith("\n"):
            status = self._process.wait()
            if status == -signal.SIGALRM:
                raise TookTooLong(f"it took longer than {self._seconds} s")
            raise Faulted(f"the process of reasoning-gym ended with status {status}")
        answer = json.loads(line)
        if "error" in answer:
            raise DatasetError(answer["error"])
        return answer["ok"]

    def end(self) -> None:
        """Kills the process. A thread that waits for its answer sees the end of the pipe."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(OSError):  # what was not written yet
                pipe.close()
