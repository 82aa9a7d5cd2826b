"""Room for new connections, whatever strangers hold: gRPC has a limit of all connections together, and none of an
address. So this looks at the connections of the process as its kernel has them.
"""

from __future__ import annotations

import heapq
import ipaddress
import os
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import structlog

from mulligan.common.callers import by_address
from mulligan.common.rate import TokenBucket

log = structlog.get_logger()
_SECONDS = 1.0  # between two looks
_FILES = next((path for path in (Path("/proc/self/fd"), Path("/dev/fd")) if path.is_dir()), None)
_FAMILIES = (socket.AF_INET, socket.AF_INET6)
_OF_FILES = 0.75  # the share of the descriptors of a process that may be connections


def allowed(most: int) -> int:
    """How many connections there may be, of `most` that are wanted: less where the process may not have so many files
    open. It lets it have as many as the system allows."""
    if sys.platform == "win32":
        return most
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(ValueError, OSError):  # macOS allows less than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
    return most if soft == resource.RLIM_INFINITY else max(1, min(most, int(soft * _OF_FILES)))


class Connections:
    """The connections to a port of this process, of which there may be `most`.

    When three quarters of them are there, `sweep` ends connections until half of them are left: those that no caller
    uses, so `is_used` says of the peer (as gRPC writes it), of the address that has most, the oldest first. Those that
    are used stay.
    """

    def __init__(self, port: int, most: int, is_used: Callable[[str], bool]):
        self._port = port
        self._most = most
        self._is_used = is_used
        self._seen: dict[str, float] = {}  # unused peers: since when
        self._lines = TokenBucket(0.1, 1)
        self._null = os.open(os.devnull, os.O_RDONLY)
        # Takes each connection in turn: no descriptor has to be free for it, and gRPC may close its own meanwhile.
        self._held = os.dup(self._null)

    def close(self) -> None:
        os.close(self._held)
        os.close(self._null)

    def sweep(self) -> int:
        """Returns how many it ended."""
        files = [int(name) for name in os.listdir(_FILES)] if _FILES is not None else []
        if len(files) < self._most * 0.75:
            self._seen.clear()
            return 0
        now = time.monotonic()
        present = {peer: file for file in files if (peer := self._peer(file)) is not None}
        self._seen = {peer: self._seen.get(peer, now) for peer in present if not self._is_used(peer)}
        if len(present) < self._most * 0.75:
            return 0
        ended = 0
        for peer in self._unused():
            if len(present) - ended <= self._most // 2:
                break
            ended += self._peer(present[peer], end=peer) is not None
        if ended and self._lines.take():
            log.warning("connections ended that no caller used", ended=ended, connections=len(present), most=self._most)
        return ended

    def _unused(self) -> Iterator[str]:
        """In the order in which they are ended."""
        of: dict[str, deque[str]] = {}
        for peer in sorted(self._seen, key=self._seen.__getitem__):  # of those seen at once, the kernel's order
            of.setdefault(by_address(peer), deque()).append(peer)
        heap = [(-len(peers), address) for address, peers in of.items()]
        heapq.heapify(heap)
        while heap:
            address = heap[0][1]
            yield of[address].popleft()
            if of[address]:
                heapq.heapreplace(heap, (-len(of[address]), address))
            else:
                heapq.heappop(heap)

    def _peer(self, file: int, end: str = "") -> str | None:
        """The peer of a connection to the port; None if the file is none. Ends the connection if its peer is `end`."""
        try:
            os.dup2(file, self._held, inheritable=False)
        except OSError:  # it is closed by now
            return None
        try:
            with _borrowed(self._held) as connection:
                if connection.family not in _FAMILIES or connection.getsockname()[1] != self._port:
                    return None
                found = peer_name(*connection.getpeername()[:2])
                if found == end:
                    connection.shutdown(socket.SHUT_RDWR)
                return found
        except OSError:  # no socket, or not connected
            return None
        finally:
            os.dup2(self._null, self._held, inheritable=False)


@contextmanager
def _borrowed(file: int) -> Iterator[socket.socket]:
    found = socket.socket(fileno=file)
    try:
        yield found
    finally:
        found.detach()


def peer_name(host: str, port: int) -> str:
    """As gRPC writes it."""
    if ":" not in host:
        return f"ipv4:{host}:{port}"
    mapped = ipaddress.IPv6Address(host).ipv4_mapped
    return f"ipv4:{mapped}:{port}" if mapped else f"ipv6:%5B{host.replace('%', '%25')}%5D:{port}"


@contextmanager
def kept_free(port: int, most: int, is_used: Callable[[str], bool]) -> Iterator[None]:
    """Sweeps them in a thread of its own while the block runs."""
    connections = Connections(port, most, is_used)
    ended = threading.Event()

    def keep() -> None:
        while not ended.wait(_SECONDS):
            try:
                connections.sweep()
            except OSError as error:
                log.warning("connections cannot be counted", cause=str(error))

    thread = threading.Thread(target=keep, name="connections", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        connections.close()
