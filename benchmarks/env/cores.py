"""One core for servers and one for clients. A process inherits the cores of its parent."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Cores:
    """The numbers of two cores, equal on a machine with one core; None if processes cannot be pinned."""

    server: int | None
    client: int | None

    def __str__(self) -> str:
        if self.server is None:
            return "not pinned: this system has no sched_setaffinity"
        if self.server == self.client:
            return f"servers and clients share core {self.server}, the only one"
        return f"servers on core {self.server}, clients on core {self.client}"


def choose() -> Cores:
    if not hasattr(os, "sched_setaffinity"):
        return Cores(None, None)
    cores = sorted(os.sched_getaffinity(0))
    return Cores(cores[0], cores[-1])


@contextmanager
def on(core: int | None) -> Iterator[None]:
    """Pins this thread, and the processes that it starts, to a core for the block."""
    if core is None:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def allow_many_files() -> int:
    """Raises the limit of open files of this process and its children as far as possible. A connection is a file."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return most
