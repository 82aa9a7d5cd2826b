"""The process that has loaded one untrusted environment, and forks a process for each of its episodes.

`python -m mulligan.env.sandbox_host DESCRIPTOR PARENT MEMORY SUBPROCESSES`, started by `sandbox.py` without the
server's variables. It talks to the server on the descriptor. Apart from loading, no code of the environment runs in it:
episodes start, and tasks are listed, in processes of their own. These talk to the server directly; each ends when the
server closes its end, and all end with this one, which ends with the server.
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

MEMORY_STATUS = 77  # of a process that has no memory left to say so
_MAX_OPEN_FILES = 256
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38
_CLONE_THREAD = 0x10000
_PROBLEM_LENGTH = 400
_libc = ctypes.CDLL(None, use_errno=True)


class _Host:
    """`memory` is what loading may take, and each process after that on top, in bytes."""

    def __init__(self, control: socket.socket, memory: int, subprocesses: bool) -> None:
        self._control = control
        self._memory = memory
        self._subprocesses = subprocesses
        self._environment: Environment | None = None

    def serve(self) -> None:
        """Until the server is gone."""
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
        gc.freeze()  # what is loaded stays: the collector in each process would only copy its pages
        self._environment = environment
        if self._subprocesses:
            _prctl(_PR_SET_PDEATHSIG, 0)  # from here on the connection's end is enough, and what runs is ended in order
        return environment.info

    def _fork(self, request: SandboxRequest, descriptor: int) -> SandboxReply:
        """A process for one task or list."""
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
    """The whole life of an episode's process."""
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
        pass  # the server has closed its end
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
    if isinstance(rewards, tuple | list):  # else the server says what is wrong
        rewards = tuple(map(read_reward, rewards))
    return replace(result, reward=read_reward(result.reward), rewards=rewards)  # plain numbers, which travel


def _copy(connection: socket.socket, descriptor: int, host: int) -> socket.socket:
    """The connection of whoever returns: this process, or its copy, which becomes a child of the host. The copy tells
    the server so itself."""
    try:
        between = os.fork()
    except OSError:  # the server sees that nobody answers
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
    """What it returns or raises, as a reply. A ValueError at load names a setting."""
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
    """The number in a NumPy scalar."""
    if not hasattr(value, "item"):
        raise NotImplementedError(f"{type(value).__name__} cannot travel")
    return value.item()


def _words(error: BaseException) -> str:
    return str(error)[:_PROBLEM_LENGTH].encode("utf-8", "replace").decode()


def _belong_to(host: int) -> None:
    """A session of its own; ends with the host."""
    if os.getsid(0) != os.getpid():
        os.setsid()
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != host:
        os._exit(0)


def _limit_memory(more: int, *, final: bool) -> None:
    """The address space may grow by this many bytes: that counts whatever is allocated, by whichever means."""
    with open("/proc/self/statm", "rb") as file:
        pages = int(file.read().split()[0])
    limit = pages * resource.getpagesize() + more
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit if final else hard))


def _forbid_processes() -> None:
    """Refuses new processes and programs, signals to others, and to outlive the host. Threads are allowed."""
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
    """Kills a process of an episode, with all that it started; its status, as of waitpid, -1 for none of ours. One that
    has ended by itself keeps the status that it ended with."""
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
    """A child of this one now, unless it is an episode's process: those lead their sessions. Killed if it was started
    by `process`."""
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
    except OSError:  # it is gone
        return []


def _descendants(process: int) -> list[int]:
    found = _children(process)
    for child in found:  # which grows meanwhile
        found += _children(child)
    return found


def _kill(process: int) -> None:
    """Its session's first group, where it leads one, and itself."""
    for kill in (os.killpg, os.kill):
        try:
            kill(process, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _end_all() -> None:
    """All descendants: those of an ended process become children of this one."""
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
