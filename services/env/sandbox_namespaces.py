"""What an untrusted environment sees of the machine: namespaces of its own, where the kernel lets the user have them.

| namespace | the code cannot |
|---|---|
| user | have rights over anything outside, even as root |
| mount | see more of /dev/shm than a small one of its own, write to /proc |
| pid | see or signal other processes; and all of its processes end with the first |
| ipc | reach System V shared memory and message queues of others |
| network | reach any network, abstract sockets included |

Many containers forbid them. Capabilities are dropped in any case.
"""

from __future__ import annotations

import ctypes
import os
import signal
import struct
from pathlib import Path
from typing import NoReturn

import msgspec

_FLAGS = {
    "user": 0x10000000,
    "mount": 0x00020000,
    "ipc": 0x08000000,
    "network": 0x40000000,
    "pid": 0x20000000,
}
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 1, 2, 4, 8
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000
_PR_SET_PDEATHSIG = 1
_PR_CAPBSET_DROP = 24
_CAPABILITY_VERSION_3 = 0x20080522
_SHARED_MEMORY_BYTES = 64 * 2**20  # as in containers


class Isolation(msgspec.Struct):
    """The namespaces that an environment has of its own, and why it lacks others."""

    namespaces: tuple[str, ...] = ()
    lacks: str = ""


def isolate(*, network: bool, memory: int) -> Isolation:
    """Moves the calling process, which must have one thread, into namespaces of its own, and drops its capabilities.
    With a pid namespace it returns in a child; the calling process ends when that one ends, in the same way.

    /dev/shm is of `memory` bytes at most. With `network` the environment stays in the server's.
    """
    wanted = tuple(name for name in _FLAGS if name != "network" or not network)
    without_processes = tuple(name for name in wanted if name != "pid")  # where /proc is covered in part
    lacks = ""
    for namespaces in (wanted, without_processes):
        problem = _trial(namespaces, memory)
        if not problem:
            _enter(namespaces, memory)
            _drop_capabilities()
            return Isolation(namespaces, lacks)
        lacks = lacks or problem
    _drop_capabilities()
    return Isolation((), lacks)


def _trial(namespaces: tuple[str, ...], memory: int) -> str:
    """Enters the namespaces in a child process. Returns why they cannot be had."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            _enter(namespaces, memory)
            os.write(writing, b"entered")
        except OSError as error:
            os.write(writing, f"{error.filename or ''}: {error.strerror}".encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        said = file.read().decode()
    os.waitpid(child, 0)
    return "" if said == "entered" else said or "the process that tried ended"


def _enter(namespaces: tuple[str, ...], memory: int) -> None:
    """Raises OSError, whose file name is what was tried."""
    user, group = os.geteuid(), os.getegid()
    _call("unshare", sum(_FLAGS[name] for name in namespaces))
    # The user keeps its number, thus its files, and has rights over nothing but the namespaces.
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    if "pid" in namespaces and (child := os.fork()):
        _end_as(child)
    _call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    _call("mount", None, b"/", None, _MS_REC | _MS_PRIVATE, None)
    if "pid" in namespaces:
        _call("mount", b"proc", b"/proc", b"proc", _MS_RDONLY | _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, None)
    if os.path.isdir("/dev/shm"):
        size = f"mode=1777,size={min(memory, _SHARED_MEMORY_BYTES)}".encode()
        _call("mount", b"shm", b"/dev/shm", b"tmpfs", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, size)


def _end_as(child: int) -> NoReturn:
    """Waits for the first process of the pid namespace, and ends in the way it ended."""
    os.closerange(3, 256)  # the server's connection among them: it closes when the child ends
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status < 0:
        if -status not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


def _drop_capabilities() -> None:
    """Leaves no capability to the process, and none to the programs that it starts."""
    libc = ctypes.CDLL(None)
    for capability in range(64):
        libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)  # without CAP_SETPCAP it has none to lose
    header = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0)
    _call("capset", header, bytes(24))


def _call(name: str, *arguments: int | bytes | None) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments):
        number = ctypes.get_errno()
        what = f"mount of {arguments[1]!r}" if name == "mount" else name
        raise OSError(number, os.strerror(number), what)
