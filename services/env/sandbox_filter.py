"""Which system calls the code of an untrusted environment may make: an allow-list, for x86_64 and aarch64.

There are two. `Calls.WITH_PROCESSES` holds while an environment is loaded, and for episodes with `subprocesses = true`.
`Calls.ALONE` holds for all other episodes. A call that is not listed gets EPERM; a new one gets ENOSYS, as on a kernel
that does not have it, so that C libraries fall back to an older one.

Arguments are compared in all their 64 bits, and only allowed values are listed: a value with stray upper bits, which
the kernel would ignore, is refused. The kernel ends a process that makes calls of another architecture (32 bits, x32).
"""

from __future__ import annotations

import errno
import os
import socket
from contextlib import suppress
from enum import Enum

import pyseccomp
from pyseccomp import EQ, MASKED_EQ, Arg


class Calls(Enum):
    ALONE = "a process on its own"
    WITH_PROCESSES = "a process that starts others"


_MEMORY = "brk madvise mincore mlock mlock2 mmap mprotect mremap msync munlock munmap membarrier"
_FILES = """
    access close close_range copy_file_range creat dup dup2 dup3 faccessat faccessat2 fadvise64 fallocate fchdir fchmod
    fchmodat fchmodat2 fdatasync fgetxattr flistxattr flock fstat fstatfs fsync ftruncate futimesat getcwd getdents
    getdents64 getxattr lgetxattr link linkat listxattr llistxattr lseek lstat mkdir mkdirat newfstatat open openat pipe
    pipe2 pread64 preadv preadv2 pwrite64 pwritev pwritev2 read readlink readlinkat readv rename renameat renameat2
    rmdir sendfile stat statfs statx symlink symlinkat sync_file_range truncate umask unlink unlinkat utime utimensat
    utimes write writev chdir chmod
"""
_WAITING = """
    epoll_create epoll_create1 epoll_ctl epoll_pwait epoll_pwait2 epoll_wait eventfd eventfd2 poll ppoll pselect6 select
    signalfd4 timerfd_create timerfd_gettime timerfd_settime
"""
_TIME = """
    alarm clock_getres clock_gettime clock_nanosleep getitimer gettimeofday nanosleep setitimer time timer_create
    timer_delete timer_getoverrun timer_gettime timer_settime times
"""
_SIGNALS = "pause rt_sigaction rt_sigpending rt_sigprocmask rt_sigreturn rt_sigsuspend rt_sigtimedwait sigaltstack"
_ITSELF = """
    arch_prctl capget exit exit_group futex getcpu getegid geteuid getgid getgroups getpgid getpgrp getpid getppid
    getpriority getrandom getresgid getresuid getrlimit getrusage getsid gettid getuid restart_syscall rseq
    sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getparam sched_getscheduler
    sched_rr_get_interval sched_yield set_robust_list set_tid_address setrlimit sysinfo uname wait4 waitid
"""
_CONNECTED = "getpeername getsockname getsockopt recvfrom recvmmsg recvmsg sendmmsg sendmsg sendto setsockopt shutdown"
_NETWORK = "accept accept4 bind connect listen"
_PROCESSES = "execve fork kill pidfd_open setpgid setsid vfork"
# Calls from Linux 5.1 on have one number on all architectures. C libraries fall back from them where they are missing.
_NEW_NUMBERS = range(424, 512)

_CLONE_THREAD = 0x00010000
_CLONE_PARENT = 0x00008000  # the new process would be none of the episode's
_CLONE_NEW = 0x7E020000  # new namespaces
_IOCTLS = {
    "TCGETS": 0x5401,  # isatty
    "TCGETS2": 0x802C542A,
    "TIOCGWINSZ": 0x5413,
    "FIONREAD": 0x541B,
    "FIONBIO": 0x5421,
    "FIONCLEX": 0x5450,
    "FIOCLEX": 0x5451,
}
# Without F_SETOWN, F_SETOWN_EX and F_SETSIG, with which a file sends any signal to any process of the same user.
_FCNTLS = {
    "F_DUPFD": 0,
    "F_GETFD": 1,
    "F_SETFD": 2,
    "F_GETFL": 3,
    "F_SETFL": 4,
    "F_GETLK": 5,
    "F_SETLK": 6,
    "F_SETLKW": 7,
    "F_OFD_GETLK": 36,
    "F_OFD_SETLK": 37,
    "F_OFD_SETLKW": 38,
    "F_DUPFD_CLOEXEC": 1030,
    "F_SETPIPE_SZ": 1031,
    "F_GETPIPE_SZ": 1032,
    "F_ADD_SEALS": 1033,
    "F_GET_SEALS": 1034,
}
_PR_SET_PDEATHSIG = 1
_PR_SET_SECCOMP = 22
_PRCTLS = {
    "PR_GET_PDEATHSIG": 2,
    "PR_GET_DUMPABLE": 3,
    "PR_SET_NAME": 15,
    "PR_GET_NAME": 16,
    "PR_GET_SECCOMP": 21,
    "PR_CAPBSET_READ": 23,
    "PR_SET_NO_NEW_PRIVS": 38,
    "PR_GET_NO_NEW_PRIVS": 39,
    "PR_SET_VMA": 0x53564D41,  # names of anonymous memory
}
_SOCKET_TYPE = 0xF
_ASK_PERSONALITY = 0xFFFFFFFF


def allowed(calls: Calls, *, network: bool) -> frozenset[str]:
    """The names of calls that are allowed whatever their arguments are."""
    lists = [_MEMORY, _FILES, _WAITING, _TIME, _SIGNALS, _ITSELF, _CONNECTED]
    if network:
        lists.append(_NETWORK)
    if calls is Calls.WITH_PROCESSES:
        lists += [_PROCESSES, "seccomp"]  # a process can only restrict itself further
    return frozenset(name for names in lists for name in names.split())


def _of_itself(calls: Calls, process: int) -> dict[str, list[list[Arg]]]:
    """Signals to the process `process`, which is the one that is filtered."""
    if calls is Calls.WITH_PROCESSES:
        return {"tgkill": [[]]}  # `kill` is allowed as well, so nothing is gained by a condition
    return {name: [[Arg(0, EQ, process)]] for name in ("kill", "tgkill")}


def conditions(calls: Calls, *, network: bool) -> dict[str, list[list[Arg]]]:
    """The calls that are allowed with some arguments, each with its alternatives of conditions."""
    options = list(_PRCTLS.values())
    kept, bits = (_CLONE_PARENT | _CLONE_NEW | _CLONE_THREAD, _CLONE_THREAD)  # threads alone
    if calls is Calls.WITH_PROCESSES:
        kept, bits = (_CLONE_PARENT | _CLONE_NEW, 0)
        options += [_PR_SET_PDEATHSIG, _PR_SET_SECCOMP]
    families = (socket.AF_INET, socket.AF_INET6) if network else ()
    return {
        "clone": [[Arg(0, MASKED_EQ, kept, bits)]],
        "fcntl": [[Arg(1, EQ, command)] for command in _FCNTLS.values()],
        "ioctl": [[Arg(1, EQ, request)] for request in _IOCTLS.values()],
        "personality": [[Arg(0, EQ, _ASK_PERSONALITY)]],
        "prctl": [[Arg(0, EQ, option)] for option in options],
        "prlimit64": [[Arg(0, EQ, 0)]],
        "sched_setaffinity": [[Arg(0, EQ, 0)]],
        "setpriority": [[Arg(0, EQ, os.PRIO_PROCESS), Arg(1, EQ, 0)]],
        "socket": [[Arg(0, EQ, family)] for family in families],
        # A datagram socket of a pair can send to any other socket that has a path.
        "socketpair": [[Arg(0, EQ, socket.AF_UNIX), Arg(1, MASKED_EQ, _SOCKET_TYPE, socket.SOCK_STREAM)]],
    }


class CallFilter:
    """The rules of `calls`. They are compiled for a process when it loads them."""

    def __init__(self, calls: Calls, *, network: bool, architecture: int = 0) -> None:
        """`architecture` is one of `pyseccomp.Arch`; the machine's own without it."""
        self.rules = pyseccomp.SyscallFilter(pyseccomp.ERRNO(errno.EPERM))
        if architecture not in (pyseccomp.Arch.NATIVE, pyseccomp.system_arch()):
            self.rules.add_arch(architecture)
            self.rules.remove_arch(pyseccomp.Arch.NATIVE)
        self.rules.set_attr(pyseccomp.Attr.ACT_BADARCH, pyseccomp.KILL_PROCESS)
        with suppress(OSError):  # a search tree in place of a list; libseccomp has it since 2.5
            self.rules.set_attr(pyseccomp.Attr.CTL_OPTIMIZE, 2)
        self._calls = calls
        some = conditions(calls, network=network)
        whole = allowed(calls, network=network)
        for name in whole:
            self.rules.add_rule(pyseccomp.ALLOW, name)
        self._add(some)
        listed = {pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name) for name in whole | some.keys()}
        for number in set(_NEW_NUMBERS) - listed:
            with suppress(OSError):  # one without a name, for another architecture than the machine's
                self.rules.add_rule(pyseccomp.ERRNO(errno.ENOSYS), number)

    def load(self) -> None:
        """Filters the calling process from now on, and all that it starts."""
        self.add_process(os.getpid())
        self.rules.load()

    def add_process(self, process: int) -> None:
        """Allows signals to `process`, which is the one that will be filtered."""
        self._add(_of_itself(self._calls, process))

    def _add(self, conditional: dict[str, list[list[Arg]]]) -> None:
        for name, alternatives in conditional.items():
            for arguments in alternatives:
                self.rules.add_rule(pyseccomp.ALLOW, name, *arguments)
