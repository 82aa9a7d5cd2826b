"""The host process of one untrusted environment: it loads the environment and forks a process for each episode.

`python -m mulligan.env.sandbox_host DESCRIPTOR PARENT MEMORY TASKS SUBPROCESSES NETWORK`, started by `sandbox.py`
without the server's variables. It moves into namespaces of its own (`sandbox_namespaces.py`), and makes no other system
calls than those of a list (`sandbox_filter.py`). It talks to the server on the descriptor. Except for loading, it runs
no code of the environment: each episode and each listing has its own process, which talks to the server directly. Such
a process ends when the server closes its end of the socket. All of them end with this one, and this one ends with the
server.
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NoReturn

import msgspec

from mulligan.common.rewards import read_reward
from mulligan.env.base import Environment, Episode, MissingExtra, Split, StepResult, UnknownTask, act
from mulligan.env.load import load
from mulligan.env.sandbox_filter import CallFilter, Calls
from mulligan.env.sandbox_namespaces import Isolation, isolate
from mulligan.env.sandbox_pipe import EpisodeStarted, Garbled, SandboxReply, SandboxRequest, receive, send

MEMORY_STATUS = 77  # exit status of a process that has no memory left for a message
_MAX_OPEN_FILES = 256
_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38
_PROBLEM_LENGTH = 400
_libc = ctypes.CDLL(None, use_errno=True)


class _Host:
    """`memory` is what loading may use, and what each process may use in addition, in bytes; `tasks`, how many
    processes and threads an episode may add."""

    def __init__(
        self, control: socket.socket, memory: int, tasks: int, subprocesses: bool, network: bool, isolation: Isolation
    ) -> None:
        self._control = control
        self._memory = memory
        self._tasks = tasks
        self._subprocesses = subprocesses
        self._isolation = isolation
        self._environment: Environment | None = None
        CallFilter(Calls.WITH_PROCESSES, network=network).load()
        self._alone = None if subprocesses else CallFilter(Calls.ALONE, network=network)

    def serve(self) -> None:
        """Serves requests until the server is gone."""
        while (received := receive(self._control, SandboxRequest)) is not None:
            request, descriptor = received
            if descriptor is not None:
                reply = self._fork(request, descriptor)
            elif request.do == "isolation":
                reply = _attempt(lambda: self._isolation)
            elif request.do == "load":
                reply = _attempt(lambda: self._load(request), at_load=True)  # noqa: B023 - called at once
            else:
                reply = SandboxReply(msgspec.Raw(msgspec.msgpack.encode(_end(request.process))))
            send(self._control, reply)

    def _load(self, request: SandboxRequest) -> object:
        _limit_memory(self._memory, final=False)
        environment = load(request.text, request.table)
        gc.collect()
        gc.freeze()  # the loaded objects stay: collecting them in each process would only copy their pages
        self._environment = environment
        if self._subprocesses and "pid" not in self._isolation.namespaces:
            _prctl(_PR_SET_PDEATHSIG, 0)  # `serve` now ends with the connection, then `_end_all` runs
        return environment.info

    def _fork(self, request: SandboxRequest, descriptor: int) -> SandboxReply:
        """Forks a process for one episode or listing."""
        assert self._environment is not None
        host = os.getpid()
        try:
            process = os.fork()
        except OSError as error:
            os.close(descriptor)
            return SandboxReply(problem=f"no process for it: {error}")
        if process:
            os.close(descriptor)
            return SandboxReply(msgspec.Raw(msgspec.msgpack.encode(process)))
        self._control.close()
        return _run(self._environment, request, socket.socket(fileno=descriptor), host, self._restrict)

    def _restrict(self) -> None:
        _limit_memory(self._memory, final=True)
        _limit_tasks(self._tasks)
        if self._alone is not None:
            self._alone.load()


def _run(
    environment: Environment,
    request: SandboxRequest,
    connection: socket.socket,
    host: int,
    restrict: Callable[[], None],
) -> NoReturn:
    """Runs a forked process from begin to end."""
    try:
        _belong_to(host)
        restrict()
        if request.do == "list":
            split = Split(request.split)
            begin = request.offset
            limit = request.limit
            send(connection, _attempt(lambda: list(environment.list_tasks(split, begin, limit))))
        else:
            _play(environment, request.text, connection, host)
    except MemoryError:
        os._exit(MEMORY_STATUS)
    except OSError:
        pass  # the server closed the connection
    finally:
        os._exit(0)


def _play(environment: Environment, task_id: str, connection: socket.socket, host: int) -> None:
    episode: Episode | None = None

    def begin() -> EpisodeStarted:
        nonlocal episode
        episode = environment.start(task_id)
        return EpisodeStarted(episode.observation, getattr(episode, "player", 0))

    _answer(connection, _attempt(begin))
    while (received := receive(connection, SandboxRequest)) is not None:
        request, descriptor = received
        if descriptor is not None:
            connection = _copy(connection, descriptor, host)
            continue
        _answer(connection, _attempt(lambda: _step(episode, request.text)))  # noqa: B023 - called at once


def _step(episode: Episode | None, action: str) -> StepResult:
    assert episode is not None
    result = act(episode, action)
    if not isinstance(result, StepResult):
        raise TypeError(f"step returned {type(result).__name__}, not StepResult")
    rewards = result.rewards
    if isinstance(rewards, tuple | list):  # the server reports another type
        rewards = tuple(map(read_reward, rewards))
    return replace(result, reward=read_reward(result.reward), rewards=rewards)  # plain numbers for msgpack


def _copy(connection: socket.socket, descriptor: int, host: int) -> socket.socket:
    """Forks an episode. Returns the connection of the process that returns: this one, or the copy, which becomes a
    child of the host and reports to the server itself."""
    try:
        between = os.fork()
    except OSError:  # the server notices that the connection closed
        os.close(descriptor)
        return connection
    if between:
        os.waitpid(between, 0)
        os.close(descriptor)
        return connection
    if os.fork():
        os._exit(0)
    connection.close()
    copied = socket.socket(fileno=descriptor)
    while os.getppid() != host:
        time.sleep(0.0005)
    _belong_to(host)
    _answer(copied, _attempt(lambda: EpisodeStarted(process=os.getpid())))
    return copied


def _answer(connection: socket.socket, reply: SandboxReply) -> None:
    try:
        send(connection, reply)
    except Garbled as error:
        send(connection, SandboxReply(problem=f"its process {error}"))


def _attempt(call: Callable[[], Any], *, at_load: bool = False) -> SandboxReply:
    """Calls, and encodes the result or the exception as a reply. A ValueError while loading names a setting."""
    try:
        return SandboxReply(msgspec.Raw(msgspec.msgpack.encode(call(), enc_hook=_plain)))
    except UnknownTask as error:
        return SandboxReply(problem=_words(error), kind="unknown task")
    except MissingExtra as error:
        return SandboxReply(problem=_words(error), kind="missing extra")
    except MemoryError:
        return SandboxReply(problem="", kind="memory")
    except BaseException as error:  # noqa: BLE001 - foreign code may raise anything, SystemExit included
        if at_load and isinstance(error, ValueError):
            return SandboxReply(problem=_words(error), kind="setting")
        return SandboxReply(problem=f"{type(error).__name__}: {_words(error)}")


def _plain(value: Any) -> Any:
    """Converts a NumPy scalar to a number."""
    if not hasattr(value, "item"):
        raise NotImplementedError(f"{type(value).__name__} cannot be sent")
    return value.item()


def _words(error: BaseException) -> str:
    return str(error)[:_PROBLEM_LENGTH].encode("utf-8", "replace").decode()


def _belong_to(host: int) -> None:
    """Gives the process its own session and ends it with the host."""
    if os.getsid(0) != os.getpid():
        os.setsid()
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != host:
        os._exit(0)


def _limit_memory(more: int, *, final: bool) -> None:
    """Limits the growth of the address space to `more` bytes, which covers every kind of allocation."""
    with open("/proc/self/statm", "rb") as file:
        pages = int(file.read().split()[0])
    limit = pages * resource.getpagesize() + more
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit if final else hard))


def _limit_tasks(more: int) -> None:
    """Limits how many processes and threads the user may have, to `more` than there are. The kernel counts them in a
    user namespace if the process has one, else on the machine, and does not apply the limit to root."""
    user = os.getuid()
    tasks = 0
    for entry in os.scandir("/proc"):
        try:
            if entry.name.isdecimal() and entry.stat().st_uid == user:
                tasks += os.stat(f"/proc/{entry.name}/task").st_nlink - 2
        except OSError:  # it has ended
            continue
    hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
    limit = tasks + more if hard == resource.RLIM_INFINITY else min(tasks + more, hard)
    resource.setrlimit(resource.RLIMIT_NPROC, (limit, limit))


def _end(process: int) -> int:
    """Kills the process of an episode and everything that it started. Returns its status as of waitpid, or -1 if it is
    not a child. A process that ended by itself keeps its status."""
    try:
        os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except OSError:
        return -1
    started = _descendants(process)
    for one in (process, *started):
        _kill(one)
    status = os.waitpid(process, 0)[1]
    for orphan in _children(os.getpid()):
        _reap(orphan, process)
    return status


def _reap(orphan: int, process: int) -> None:
    """Reaps a process that became a child of this one; kills it if `process` started it. Skips the processes of
    episodes, which lead their own sessions."""
    try:
        session = os.getsid(orphan)
        if session == orphan:
            return
        if session == process:
            _kill(orphan)
        os.waitpid(orphan, 0 if session == process else os.WNOHANG)
    except (ProcessLookupError, ChildProcessError):
        return


def _children(process: int) -> list[int]:
    try:
        with open(f"/proc/{process}/task/{process}/children", encoding="ascii") as file:
            return [int(child) for child in file.read().split()]
    except OSError:  # the process is gone
        return []


def _descendants(process: int) -> list[int]:
    found = _children(process)
    for child in found:  # the list grows meanwhile
        found += _children(child)
    return found


def _kill(process: int) -> None:
    """Kills the process, and its process group if it leads one."""
    for kill in (os.killpg, os.kill):
        try:
            kill(process, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _end_all() -> None:
    """Ends all descendants. Orphans become children of this process."""
    try:
        while True:
            for process in _children(os.getpid()):
                _kill(process)
            os.waitpid(-1, 0)
    except ChildProcessError:
        return


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl {option}")


def main() -> None:
    descriptor, parent, memory, tasks, subprocesses, network = (int(argument) for argument in sys.argv[1:7])
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    isolation = isolate(network=bool(network), memory=memory)
    _prctl(_PR_SET_DUMPABLE, 0)  # no process of the same user can read or write the memory of another
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    files = _MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(_MAX_OPEN_FILES, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    try:
        control = socket.socket(fileno=descriptor)
        _Host(control, memory, tasks, bool(subprocesses), bool(network), isolation).serve()
    finally:
        _end_all()


if __name__ == "__main__":
    main()
