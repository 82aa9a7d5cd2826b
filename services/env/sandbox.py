"""Untrusted environments: their code runs in processes with limits, not in the server. The option `untrusted` of every
environment's table, with `memory_mb`, `max_tasks`, `subprocesses` and `network`.

One process loads the environment (`sandbox_host.py`) and forks a process per episode, which shares the loaded memory
until it writes to it: a start takes milliseconds. Whatever the process of an episode does (raise, hang, use up its
memory, crash, send garbage) ends that episode alone. If the process that forks them ends, its episodes end with it, and
the next start loads the environment again.

This limits the damage of faulty code. It is no jail for hostile code, which can read and write the files of the
server's user: run that in a container. docs/security.md says what is promised.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import msgspec
import structlog

from mulligan.common.errors import DomainError, Reason
from mulligan.env.base import (
    Environment,
    EnvironmentInfo,
    Faulted,
    Split,
    StepResult,
    TaskInfo,
    UnknownTask,
    read_settings,
)
from mulligan.env.load import Unavailable
from mulligan.env.sandbox_namespaces import Isolation
from mulligan.env.sandbox_pipe import EpisodeStarted, Garbled, SandboxReply, SandboxRequest, receive, send
from mulligan.env.workers import TimedOut

log = structlog.get_logger()
_MEMORY_STATUS = 77  # as in `sandbox_host.py`, which cannot be imported except on Linux
_RETRY_AFTER = timedelta(seconds=1.0)
_PR_SET_DUMPABLE = 4
_CONTROL_SECONDS = 10.0  # time limit of the host process, which only forks and ends others
# The kernel ends a host process with the *thread* that started it, so this thread lives as long as the server.
_SPAWNER = ThreadPoolExecutor(1, "sandbox")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ProcessLimits:
    """Limits of the processes of one environment.

    `memory_mb` is what loading may use, and what each process may use in addition. An episode may add `max_tasks`
    processes and threads to those that the user has when it starts; the kernel does not limit root's. With
    `subprocesses`, the code may start processes, each with these limits; its episodes can then be forked. With
    `network`, it may open connections. `load_seconds` is the time limit of loading.
    """

    memory_mb: int = 1024
    max_tasks: int = 4096  # episodes that start later count, too
    subprocesses: bool = False
    network: bool = False
    load_seconds: float = 600.0

    def __post_init__(self) -> None:
        if self.memory_mb < 1:
            raise ValueError(f"memory_mb must be at least 1, not {self.memory_mb}")
        if self.max_tasks < 1:
            raise ValueError(f"max_tasks must be at least 1, not {self.max_tasks}")
        if self.load_seconds <= 0:
            raise ValueError(f"load_seconds must be more than 0, not {self.load_seconds:g}")


LIMITS = tuple(field.name for field in ProcessLimits.__dataclass_fields__.values())


def read_limits(values: Mapping[str, object]) -> ProcessLimits:
    """Raises ValueError that names the setting."""
    if not sys.platform.startswith("linux"):
        raise ValueError("untrusted: environments run in processes with limits on Linux alone")
    try:
        importlib.import_module("pyseccomp")
    except (ImportError, OSError, RuntimeError) as error:
        raise ValueError(f"untrusted: needs the system's libseccomp (package libseccomp2): {error}") from error
    return read_settings(ProcessLimits, values)


class _HostLost(Exception):
    """The host process is gone. The message says why."""


class _HostProcess:
    """The server's side of a process that has loaded the environment. Thread-safe."""

    def __init__(self, name: str, table: Mapping[str, Any], limits: ProcessLimits) -> None:
        """Raises ValueError that names a setting, and _HostLost."""
        self._lock = threading.Lock()
        self._lost = ""
        self._control, theirs = socket.socketpair()
        with theirs:
            memory = limits.memory_mb * 2**20
            switches = (int(limits.subprocesses), int(limits.network))
            arguments = (theirs.fileno(), os.getpid(), memory, limits.max_tasks, *switches)
            self._process = _SPAWNER.submit(_spawn, theirs.fileno(), [str(argument) for argument in arguments]).result()
        self.isolation = msgspec.msgpack.decode(
            self.ask(SandboxRequest("isolation"), seconds=limits.load_seconds).result, type=Isolation
        )
        if "user" not in self.isolation.namespaces and os.geteuid():
            _close_memory()
        reply = self.ask(SandboxRequest("load", name, dict(table)), seconds=limits.load_seconds)
        if reply.problem or reply.kind:
            self.close()
        if reply.kind == "missing extra":
            self.info = Unavailable(name, reply.problem).info
        elif reply.kind == "memory":
            raise ValueError(f"environments.{name}: loading it took more than memory_mb = {limits.memory_mb}")
        elif reply.problem:
            raise ValueError(reply.problem if reply.kind == "setting" else f"environments.{name}: {reply.problem}")
        else:
            self.info = msgspec.msgpack.decode(reply.result, type=EnvironmentInfo)

    @property
    def lost(self) -> bool:
        return bool(self._lost)

    def ask(
        self, request: SandboxRequest, descriptor: int | None = None, seconds: float = _CONTROL_SECONDS
    ) -> SandboxReply:
        with self._lock:
            if not self._lost:
                try:
                    send(self._control, request, descriptor, seconds)
                    received = receive(self._control, SandboxReply, seconds)
                    if received is not None:
                        return received[0]
                    self._lost = _ending(self._stopped(_CONTROL_SECONDS))
                except TimeoutError:
                    self._lost = f"did not answer within {seconds:g} s"
                except OSError:
                    self._lost = _ending(self._stopped(_CONTROL_SECONDS))
                except Garbled as error:
                    self._lost = str(error)
                self._stopped(0.0)
            raise _HostLost(f"the process that loaded the environment {self._lost}")

    def end(self, process: int) -> int:
        """Kills a process. Returns its status as of waitpid."""
        return msgspec.msgpack.decode(self.ask(SandboxRequest("end", process=process)).result, type=int)

    def close(self) -> None:
        with self._lock:
            self._lost = self._lost or "was closed"
            self._control.close()
            self._stopped(_CONTROL_SECONDS)

    def _stopped(self, seconds: float) -> int:
        """The exit status of the process. Kills it if it does not end in time."""
        try:
            status = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        return status


def _close_memory() -> None:
    """Keeps processes of the same user from reading and writing this one's memory by /proc. Those in another user
    namespace cannot, nor can those that have fewer capabilities."""
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def _spawn(descriptor: int, arguments: list[str]) -> subprocess.Popen[bytes]:
    """Starts the host process, with only those environment variables of the server that Python needs to find
    modules."""
    variables = {
        "PATH": os.defpath,
        "LANG": "C.UTF-8",
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        "OMP_NUM_THREADS": "1",  # thread pools do not survive a fork
        "MALLOC_ARENA_MAX": "2",  # each arena takes address space, which is limited
    }
    return subprocess.Popen(
        [sys.executable, "-m", "mulligan.env.sandbox_host", *arguments],
        env=variables,
        pass_fds=[descriptor],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


class _ForkedProcess:
    """The server's side of a process of one episode or one listing."""

    def __init__(
        self, host: _HostProcess, limits: ProcessLimits, seconds: float, connection: socket.socket, process: int
    ) -> None:
        self._host = host
        self._limits = limits
        self._seconds = seconds
        self._connection = connection
        self._id = process
        self._lock = threading.Lock()
        self._ended: str | None = None  # how

    def ask(self, request: SandboxRequest, kind: type[T]) -> T:
        self._send(request)
        return self.answer(kind)

    def answer(self, kind: type[T]) -> T:
        """Receives an answer. Raises UnknownTask; TimedOut, and Faulted for everything else, after which the process is
        gone unless it only reported an error."""
        try:
            received = receive(self._connection, SandboxReply, self._seconds)
            if received is None:
                raise Faulted(self.end())
            reply, descriptor = received
            if descriptor is not None:
                os.close(descriptor)
            if reply.kind == "unknown task":
                raise UnknownTask(reply.problem)
            if reply.kind == "memory":
                raise Faulted(self._too_much_memory())
            if reply.problem:
                raise Faulted(reply.problem)
            return msgspec.msgpack.decode(reply.result, type=kind)
        except TimeoutError:
            self.end()
            raise TimedOut(f"not finished within {self._seconds:g} s") from None
        except Garbled as error:
            self.end()
            raise Faulted(f"its process {error}") from None
        except msgspec.ValidationError as error:
            self.end()
            raise Faulted(f"its answer has another type than it should: {error}") from None
        except OSError:
            raise Faulted(self.end()) from None

    def fork(self) -> tuple[_ForkedProcess, EpisodeStarted]:
        ours, theirs = socket.socketpair()
        with theirs:
            self._send(SandboxRequest("fork"), theirs.fileno())
        copied = _ForkedProcess(self._host, self._limits, self._seconds, ours, 0)
        first = copied.answer(EpisodeStarted)
        copied._id = first.process
        return copied, first

    def end(self) -> str:
        """Kills the process if it still runs. Returns how it ended."""
        with self._lock:
            if self._ended is None:
                self._ended = self._end()  # first: now its children can still be found
                with suppress(OSError):
                    self._connection.shutdown(socket.SHUT_RDWR)  # wakes a thread that waits for an answer
                self._connection.close()
            return self._ended

    def _end(self) -> str:
        if not self._id:
            return "its process did not start"
        try:
            waited = self._host.end(self._id)
        except _HostLost as error:
            return str(error)
        if waited < 0:
            return "its process is unknown"
        status = os.waitstatus_to_exitcode(waited)
        return self._too_much_memory() if status == _MEMORY_STATUS else f"its process {_ending(status)}"

    def _send(self, request: SandboxRequest, descriptor: int | None = None) -> None:
        try:
            send(self._connection, request, descriptor, self._seconds)
        except TimeoutError:
            self.end()
            raise TimedOut(f"not finished within {self._seconds:g} s") from None
        except OSError:
            raise Faulted(self.end()) from None

    def _too_much_memory(self) -> str:
        return f"used more than memory_mb = {self._limits.memory_mb}"


def _ending(status: int) -> str:
    if status >= 0:
        return f"exited with status {status}"
    name = signal.Signals(-status).name if -status in tuple(signal.Signals) else "unknown"
    return f"ended with signal {-status} ({name})"


class SandboxedEpisode:
    reads_thoughts = True  # the process removes thoughts if the episode does not read them

    def __init__(self, process: _ForkedProcess, observation: str, player: int) -> None:
        self.observation = observation
        self.player = player
        self._process = process

    def step(self, action: str) -> StepResult:
        return self._process.ask(SandboxRequest("step", action), StepResult)

    def fork(self) -> SandboxedEpisode:
        copied, _ = self._process.fork()
        return SandboxedEpisode(copied, self.observation, self.player)

    def close(self) -> None:
        self._process.end()


class Sandboxed:
    """An environment whose code runs in other processes. `seconds` limits each call into it.

    `start` asks the host process to fork, hands it one end of a socket pair, and reads the first observation from the
    other end. Each later call into the episode is a message to that process. `_running` returns the host, and loads a
    new one in a thread if it was lost; meanwhile starts are refused with CAPACITY_REACHED.
    """

    def __init__(self, name: str, table: Mapping[str, Any], limits: ProcessLimits, seconds: float) -> None:
        """Raises ValueError that names the setting."""
        self._name = name
        self._table = dict(table)
        self._limits = limits
        self._seconds = seconds
        self._lock = threading.Lock()
        self._loading: Future[_HostProcess] | None = None
        try:
            self._host = _HostProcess(name, table, limits)
        except _HostLost as error:
            raise ValueError(f"environments.{name}: {error}") from error
        can_fork = limits.subprocesses and not self._host.info.unavailable
        self.info = replace(self._host.info, can_fork=can_fork)

    def list_tasks(self, split: Split, offset: int, limit: int) -> Sequence[TaskInfo]:
        process = self._start(SandboxRequest("list", split=split, offset=offset, limit=limit))
        try:
            return process.answer(list[TaskInfo])
        finally:
            process.end()

    def start(self, task_id: str) -> SandboxedEpisode:
        process = self._start(SandboxRequest("start", task_id))
        try:
            first = process.answer(EpisodeStarted)
        except BaseException:
            process.end()
            raise
        return SandboxedEpisode(process, first.observation, first.player)

    def close(self) -> None:
        self._host.close()

    @property
    def isolation(self) -> Isolation:
        return self._host.isolation

    def log_protection(self) -> None:
        """Tells what protects the server from the environment's code."""
        isolation = self.isolation
        facts = {
            "environment": self._name,
            "namespaces": " ".join(isolation.namespaces) or "none",
            "processes": "limited" if os.geteuid() else "not limited for root",
            "shared_memory": "limited" if "mount" in isolation.namespaces else "not limited",
            "network": "open" if self._limits.network else "refused",
        }
        if isolation.lacks:
            log.warning("an untrusted environment lacks namespaces", **facts, reason=isolation.lacks)
        else:
            log.info("an untrusted environment has namespaces of its own", **facts)

    def _start(self, request: SandboxRequest) -> _ForkedProcess:
        ours, theirs = socket.socketpair()
        with theirs:
            host = self._running()
            try:
                reply = host.ask(request, theirs.fileno())
            except _HostLost:  # the loss is noticed only now
                host = self._running()
                try:
                    reply = host.ask(request, theirs.fileno())
                except _HostLost as error:
                    raise Faulted(str(error)) from error
        if reply.problem:
            raise Faulted(reply.problem)
        return _ForkedProcess(host, self._limits, self._seconds, ours, msgspec.msgpack.decode(reply.result, type=int))

    def _running(self) -> _HostProcess:
        """The host process; a lost one is replaced. Raises CAPACITY_REACHED while loading takes long, and Faulted when
        it fails."""
        with self._lock:
            if not self._host.lost:
                return self._host
            if self._loading is None or self._loading.done():
                log.warning("an untrusted environment is loaded again", environment=self._name)
                self._loading = Future()
                threading.Thread(target=self._load, args=(self._loading,), name="loading", daemon=True).start()
            loading = self._loading
        try:
            return loading.result(self._seconds / 2)
        except TimeoutError:
            message = f"{self._name!r} is being loaded again: its process was lost"
            raise DomainError(Reason.CAPACITY_REACHED, message, retry_after=_RETRY_AFTER) from None
        except (ValueError, _HostLost) as error:
            raise Faulted(f"it could not be loaded again: {error}") from error

    def _load(self, loading: Future[_HostProcess]) -> None:
        try:
            host = _HostProcess(self._name, self._table, self._limits)
        except BaseException as error:  # noqa: BLE001 - raised for those that wait
            loading.set_exception(error)
            return
        with self._lock:
            self._host = host
        loading.set_result(host)


def sandboxed(name: str, table: Mapping[str, Any], limits: ProcessLimits, seconds: float) -> Environment:
    """An environment in processes with limits. One that lacks packages is listed as unavailable."""
    environment = Sandboxed(name, table, limits, seconds)
    return Unavailable(name, environment.info.unavailable) if environment.info.unavailable else environment
