"""The host process of one untrusted environment: it loads the environment and forks a process for each episode.

`python -m mulligan.env.sandbox_host DESCRIPTOR PARENT MEMORY SUBPROCESSES`, started by `sandbox.py` without the
server's variables. It talks to the server on the descriptor. Except for loading, it runs no code of the environment:
each episode and each listing has its own process, which talks to the server directly. Such a process ends when the
server closes its end of the socket. All of them end with this one, and this one ends with the server.
"""

from __future__ import annotations

import ctypes
import errno
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
import pyseccomp

from mulligan.common.rewards import read_reward
from mulligan.env.base import Environment, Episode, MissingExtra, Split, StepResult, UnknownTask, act
from mulligan.env.load import load
from mulligan.env.sandbox_pipe import EpisodeStarted, Garbled, SandboxReply, SandboxRequest, receive, send

MEMORY_STATUS = 77  # exit status of a process that has no memory left for a message
_MAX_OPEN_FILES = 256
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38
_CLONE_THREAD = 0x10000
_PROBLEM_LENGTH = 400
_libc = ctypes.CDLL(None, use_errno=True)


class _Host:
    """`memory` is what loading may use, and what each process may use in addition, in bytes."""

    def __init__(self, control: socket.socket, memory: int, subprocesses: bool) -> None:
        self._control = control
        self._memory = memory
        self._subprocesses = subprocesses
        self._environment: Environment | None = None

    def serve(self) -> None:
        """Serves requests until the server is gone."""
        while (received := receive(self._control, SandboxRequest)) is not None:
            request, descriptor = received
            if descriptor is not None:
                reply = self._fork(request, descriptor)
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
        if self._subprocesses:
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
        if not self._subprocesses:
            _forbid_processes()


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


def _forbid_processes() -> None:
    """Refuses new processes and programs, signals to other processes, and outliving the host. Threads are allowed."""
    refuse = pyseccomp.ERRNO(errno.EPERM)
    rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    for call in ("fork", "vfork", "execve", "execveat", "ptrace", "tkill", "rt_sigqueueinfo", "pidfd_send_signal"):
        rules.add_rule(refuse, call)
    rules.add_rule(refuse, "clone", pyseccomp.Arg(0, pyseccomp.MASKED_EQ, _CLONE_THREAD, 0))
    rules.add_rule(pyseccomp.ERRNO(errno.ENOSYS), "clone3")  # the C library then uses clone
    for call in ("kill", "tgkill"):
        rules.add_rule(refuse, call, pyseccomp.Arg(0, pyseccomp.NE, os.getpid()))
    rules.add_rule(refuse, "prctl", pyseccomp.Arg(0, pyseccomp.EQ, _PR_SET_PDEATHSIG))
    rules.load()


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
    descriptor, parent, memory, subprocesses = (int(argument) for argument in sys.argv[1:5])
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    files = _MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(_MAX_OPEN_FILES, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    try:
        _Host(socket.socket(fileno=descriptor), memory, bool(subprocesses)).serve()
    finally:
        _end_all()


if __name__ == "__main__":
    main()
