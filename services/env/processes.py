"""Runs `processes = N` server processes with the same settings, each at its own port. Restarts those that die.

Clients reach them as `host:first-last`; an episode stays at its process (`replicas.py`). The supervisor serves nothing
itself. It holds a socket to each process, and a process ends when the supervisor does.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import structlog

from mulligan.common.tasks import cancel
from mulligan.env.config import EnvSettings

log = structlog.get_logger()
_SUPERVISOR = "MULLIGAN_SUPERVISOR"  # environment variable of a process: the descriptor of its end of the socket
# limit of starts of one process within the time below; more means a bug that a restart does not fix
_MOST_STARTS = 5
_STARTS_SECONDS = 60.0
_END_SECONDS = 10.0  # after the drain, before a process is killed
_BAD_SETTINGS = 2


class _Failed(Exception):
    def __init__(self, status: int):
        self.status = status


@dataclass
class _ServerProcess:
    arguments: list[str]
    port: int
    address: str = ""
    process: asyncio.subprocess.Process | None = None
    link: asyncio.StreamWriter | None = None  # when it closes, the process ends
    serves: asyncio.Event = field(default_factory=asyncio.Event)
    starts: list[float] = field(default_factory=list)

    async def keep_running(self) -> None:
        """Restarts the process whenever it ends. Raises _Failed when it cannot be kept running."""
        while True:
            status = await self._run()
            pid = self.process.pid if self.process is not None else None
            recent = [start for start in self.starts if start > time.monotonic() - _STARTS_SECONDS]
            if not self.serves.is_set() or len(recent) > _MOST_STARTS:
                raise _Failed(_BAD_SETTINGS if status == _BAD_SETTINGS else 1)
            log.warning("a process died and is started again", process=pid, address=self.address, status=status)

    async def _run(self) -> int:
        """Runs the process once. Returns its exit status; a negative one is the number of a signal."""
        self.starts.append(time.monotonic())
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "mulligan.env", *self.arguments, "--port", str(self.port)),
                pass_fds=[theirs.fileno()],
                env={**os.environ, _SUPERVISOR: str(theirs.fileno())},
                stdin=asyncio.subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C reaches the supervisor alone
            )
        reader, self.link = await asyncio.open_connection(sock=ours)
        if line := await reader.readline():
            self.address = line.decode().strip()
            self.port = int(self.address.rpartition(":")[2])
            self.serves.set()
        status = await self.process.wait()
        self.link.close()
        return status

    async def end(self, seconds: float) -> int:
        """Sends SIGTERM, and SIGKILL after `seconds`. Returns the exit status."""
        if self.process is None:
            return 0
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(seconds):
                    await self.process.wait()
            except TimeoutError:
                log.warning("a process did not end and is killed", address=self.address)
                self.process.kill()
        return await self.process.wait()


async def serve(settings: EnvSettings, arguments: Sequence[str]) -> None:
    """Runs the processes until SIGTERM or SIGINT. Exits with status 2 if they refuse their settings, and with 1 if one
    cannot be kept running or does not exit cleanly."""
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    children = [
        _ServerProcess(_arguments(settings, arguments, index), _port(settings.port, index))
        for index in range(settings.processes)
    ]
    keepers = [asyncio.create_task(child.keep_running()) for child in children]
    stopped = asyncio.create_task(stopping.wait())
    telling = asyncio.create_task(_tell(children))
    await asyncio.wait([stopped, *keepers], return_when=asyncio.FIRST_COMPLETED)
    failures = [keeper.exception() for keeper in keepers if keeper.done()]
    await cancel(stopped, telling, *keepers)
    log.info("draining", processes=len(children), seconds=settings.drain_seconds)
    statuses = await asyncio.gather(*(child.end(settings.drain_seconds + _END_SECONDS) for child in children))
    for failure in failures:
        if failure is not None and not isinstance(failure, _Failed):
            raise failure
        sys.exit(failure.status if failure is not None else 1)
    if any(statuses):
        log.error("processes did not end well", statuses=statuses)
        sys.exit(1)
    log.info("stopped", processes=len(children))


def name_process() -> None:
    """Adds the process id to every log line, in one of several processes."""
    if _SUPERVISOR in os.environ:
        structlog.contextvars.bind_contextvars(process=os.getpid())


async def served(address: str) -> None:
    """In a process with a supervisor: reports the address, and shuts down when the supervisor ends."""
    descriptor = os.environ.pop(_SUPERVISOR, "")
    if not descriptor:
        return
    link = socket.socket(fileno=int(descriptor))
    link.set_inheritable(False)
    link.sendall(f"{address}\n".encode())
    link.setblocking(False)
    loop = asyncio.get_running_loop()

    def supervisor_ended() -> None:
        loop.remove_reader(link)
        link.close()
        log.warning("the supervisor ended")
        os.kill(os.getpid(), signal.SIGTERM)

    loop.add_reader(link, supervisor_ended)


async def _tell(children: Sequence[_ServerProcess]) -> None:
    for child in children:
        await child.serves.wait()
    addresses = [child.address for child in children]
    host, first = addresses[0].rpartition(":")[::2]
    consecutive = [f"{host}:{int(first) + index}" for index in range(len(children))]
    text = f"{host}:{first}-{children[-1].port}" if addresses == consecutive else ",".join(addresses)
    log.info("all processes serve", address=text, processes=len(children))


def _arguments(settings: EnvSettings, arguments: Sequence[str], index: int) -> list[str]:
    """The flags of one process. The last of two equal flags wins."""
    metrics = str(_port(settings.metrics_port, index))
    return [*arguments, "--processes", "1", "--metrics-port", metrics]


def _port(first: int, index: int) -> int:
    return first + index if first > 0 else first
