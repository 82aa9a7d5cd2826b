"""Servers that this service starts. It restarts those that end, and stops all when it ends."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import structlog
from pydantic import SecretStr

from mulligan.common.files import replace
from mulligan.common.foreign import kept
from mulligan.common.model_files import UnsupportedModel
from mulligan.policy.backends._servers import ServerSettings
from mulligan.policy.backends._servers.connection import HttpConnection, Unreachable
from mulligan.policy.backends._servers.engine_log import EngineLog
from mulligan.policy.backends._servers.server import EngineServer

log = structlog.get_logger()
_STOP_SECONDS = 5.0
_LOG_END = 4000  # bytes of its log that are looked at when an engine fails
_LOG_TOLD = 1500  # characters of them that the service's log gets
_LOG_SECONDS = 2.0  # for what an engine wrote last to reach its log
_BACKOFF = (0.0, 1.0, 5.0, 15.0, 60.0)  # seconds before the nth start in a row that failed
_PORT_TAKEN = b"address already in use"
_PORT_ATTEMPTS = 5
# The kernel ends the server when this service dies, however that comes. When the server dies, a process that watches it
# ends what it has started: an engine's own processes see to that themselves, but only once they have begun.
_GUARD = """
import ctypes, os, signal, sys
prctl, server = ctypes.CDLL(None).prctl, os.getpid()
prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):
    sys.exit("the policy service is gone")
if os.fork() == 0:
    signal.signal(signal.SIGUSR1, lambda *_: os.killpg(server, signal.SIGKILL))
    prctl(1, signal.SIGUSR1)
    while os.getppid() == server:
        signal.pause()
    os.killpg(server, signal.SIGKILL)
try:
    os.execvp(sys.argv[2], sys.argv[2:])
except OSError as error:
    sys.exit(f"{sys.argv[2]}: {error.strerror}")
"""


class LaunchedServer:
    """The process of one server, and its log. Each start gives the server a new address, to which `connect` connects
    it. `label` names the weights that it starts with; no other version has it. `key` is what requests will carry."""

    def __init__(
        self,
        server: EngineServer,
        connect: Callable[[str], HttpConnection],
        settings: ServerSettings,
        source: str,
        label: str,
        log_path: Path,
        key: SecretStr | None = None,
    ):
        self._server = server
        self._connect = connect
        self._settings = settings
        self._source = source
        self._label = label
        self._log_path = log_path
        self._log = EngineLog(log_path)
        self._keys = {"api-key": key, "admin-api-key": settings.admin_key}
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Returns when the server is ready. Raises UnsupportedModel if it does not get ready; this service's log gets
        the end of the server's."""
        for attempt in range(1, _PORT_ATTEMPTS + 1):
            port = _free_port()
            self._server.connection = self._connect(f"http://127.0.0.1:{port}")
            try:
                await self._spawn(port)
                await self._ready()
            except UnsupportedModel:
                await self.stop()
                if attempt == _PORT_ATTEMPTS or _PORT_TAKEN not in self._log.end(_LOG_END).lower():
                    raise
            except BaseException:
                await self.stop()
                raise
            else:
                log.info("server started", server=self._server.address, log=str(self._log_path))
                return

    async def supervise(self, died: Callable[[str], None]) -> None:
        """Restarts the server whenever it ends, until cancelled. `died` is told how it ended."""
        failures = 0
        while True:
            if self._process is not None:
                started = time.monotonic()
                status = await self._process.wait()
                await self.stop()  # what is left of its group
                log.error("server ended", server=self._server.address, status=status, log=str(self._log_path))
                failures = 0 if time.monotonic() - started > _BACKOFF[-1] else failures + 1
                died(f"it ended with status {status}")
            await asyncio.sleep(_BACKOFF[min(failures, len(_BACKOFF) - 1)])
            try:
                await self.start()
            except (UnsupportedModel, OSError) as error:
                failures += 1
                log.error("server does not start", server=self._server.address, problem=str(error))

    async def stop(self) -> None:
        """Ends it with all its processes."""
        process = self._process
        self._process = None
        if process is None:
            return
        with suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(_STOP_SECONDS):
                await process.wait()
        except TimeoutError:
            pass
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
        await asyncio.to_thread(self._log.finish, _LOG_SECONDS)

    async def _spawn(self, port: int) -> None:
        server = self._server
        output = self._log.start()
        try:
            keys = self._key_file() if server.takes_key_file else None
            arguments = server.launch_arguments(self._source, self._label, port, self._settings.flags, keys)
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", _GUARD, str(os.getpid()), self._settings.python, *arguments),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env={**os.environ, **server.launch_environment, **self._settings.environment},
            )
        finally:
            os.close(output)

    def _key_file(self) -> Path:
        given = {name: key.get_secret_value() for name, key in self._keys.items() if key is not None}
        path = self._log_path.with_suffix(".keys.yaml")
        replace(path, json.dumps(given).encode(), 0o600)  # which is YAML, too
        return path

    async def _ready(self) -> None:
        server = self._server
        deadline = time.monotonic() + self._settings.start_seconds
        assert self._process is not None
        while self._process.returncode is None:
            with suppress(Unreachable):
                await server.connection.get(server.ready_path, 5.0)
                return
            if time.monotonic() > deadline:
                seconds = self._settings.start_seconds
                raise UnsupportedModel(f"{server.engine} was not ready within {seconds:g} s: {self._told()}")
            await asyncio.sleep(0.1)
        await asyncio.to_thread(self._log.finish, _LOG_SECONDS)
        raise UnsupportedModel(f"{server.engine} ended with status {self._process.returncode}: {self._told()}")

    def _told(self) -> str:
        """What callers of LoadModel are told in place of the end of the log, which may quote anything."""
        said = self._log.end(_LOG_END).decode(errors="replace")
        for key in self._keys.values():  # before it is cut, so that no part of one is left
            said = said.replace(key.get_secret_value(), "(the key)") if key is not None else said
        return kept(f"{self._server.engine}, {self._log_path}", said[-_LOG_TOLD:])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
