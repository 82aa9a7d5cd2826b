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
from mulligan.common.model_files import UnsupportedModel
from mulligan.policy.backends._servers import ServerSettings
from mulligan.policy.backends._servers.connection import HttpConnection, Unreachable
from mulligan.policy.backends._servers.server import EngineServer

log = structlog.get_logger()
_STOP_SECONDS = 5.0
_LOG_END = 4000  # bytes that an error shows
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
        self._keys = {"api-key": key, "admin-api-key": settings.admin_key}
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Returns when the server is ready. Raises UnsupportedModel, with the end of its log, if it does not get
        ready."""
        for attempt in range(1, _PORT_ATTEMPTS + 1):
            port = _free_port()
            self._server.connection = self._connect(f"http://127.0.0.1:{port}")
            try:
                await self._spawn(port)
                await self._ready()
            except UnsupportedModel:
                await self.stop()
                if attempt == _PORT_ATTEMPTS or _PORT_TAKEN not in self._log_end().lower():
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

    async def _spawn(self, port: int) -> None:
        server = self._server
        self._log_path.parent.mkdir(parents=True, exist_ok=True)
        keys = self._key_file() if server.takes_key_file else None
        arguments = server.launch_arguments(self._source, self._label, port, self._settings.flags, keys)
        with self._log_path.open("wb") as output:
            self._log_path.chmod(0o600)  # SGLang's has its keys
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", _GUARD, str(os.getpid()), self._settings.python, *arguments),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env={**os.environ, **server.launch_environment, **self._settings.environment},
            )

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
                raise UnsupportedModel(
                    f"{server.engine} was not ready within {seconds:g} s; its log ends with:\n{self._said()}"
                )
            await asyncio.sleep(0.1)
        raise UnsupportedModel(
            f"{server.engine} ended with status {self._process.returncode}; its log ends with:\n{self._said()}"
        )

    def _said(self) -> str:
        said = self._log_end().decode(errors="replace")
        for key in self._keys.values():
            said = said.replace(key.get_secret_value(), "***") if key is not None else said
        return said

    def _log_end(self) -> bytes:
        with self._log_path.open("rb") as file:
            file.seek(max(0, self._log_path.stat().st_size - _LOG_END))
            return file.read()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
