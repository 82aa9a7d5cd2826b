"""Makes system calls under a filter of `services/env/sandbox_filter.py`, and prints what became of them:
`python -m tests.support.sandboxed_calls CALLS NETWORK CALL…`.

A call is `NUMBER`, with arguments that no call can use, or `NUMBER:ARGUMENT,…`, where `self` and `parent` are ids of
processes. A line for each: its place, and its errno; 0 if it succeeded.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys

from mulligan.env.sandbox_filter import CallFilter, Calls

_PR_SET_NO_NEW_PRIVS = 38
_USELESS = [-1] * 6


def main() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    processes = {"self": os.getpid(), "parent": os.getppid()}
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    signal.signal(signal.SIGALRM, signal.SIG_IGN)  # one of the calls sets an alarm
    CallFilter(Calls[sys.argv[1]], network=bool(int(sys.argv[2]))).load()
    for place, call in enumerate(sys.argv[3:]):
        number, _, listed = call.partition(":")
        arguments = [processes.get(value) or int(value, 0) for value in listed.split(",")] if listed else _USELESS
        ctypes.set_errno(0)
        failed = libc.syscall(ctypes.c_long(int(number)), *map(ctypes.c_ulong, arguments)) == -1
        os.write(1, f"{place} {ctypes.get_errno() if failed else 0}\n".encode())


if __name__ == "__main__":
    main()
