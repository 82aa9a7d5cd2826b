"""The four services as processes on loopback, supervised: started, waited for, started again when they die, ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import mulligan
from mulligan.cli.connection import DEFAULT_ADDRESSES
from mulligan.cli.local_tokens import LocalTokens, announced
from mulligan.cli.out import Heartbeat, note
from mulligan.common.access import AccessRole
from mulligan.common.addresses import Addresses
from mulligan.common.channel import Endpoint, is_healthy
from mulligan.common.tasks import cancel, gather_or_cancel

START_SECONDS = 600.0  # a large model takes minutes, and progress is shown meanwhile
STOP_SECONDS = 40.0
LOG_BYTES = 2**24  # of a service's log, before it begins anew
RESTARTS = 5  # of one service within a minute; more is a defect that restarting does not mend


class ServiceFailed(Exception):
    """A service process ended or did not become healthy; the message holds the end of its log."""


@dataclass
class _Process:
    name: str
    address: str
    command: list[str]
    log: Path
    process: subprocess.Popen[bytes] | None = None  # the only one, or the supervisor of several
    started: list[float] = field(default_factory=list)
    _log_start: int = 0

    @property
    def servers(self) -> tuple[str, ...]:
        return Addresses.parse(self.address).fixed

    def start(self) -> None:
        self.started.append(time.monotonic())
        self._log_start = self.log.stat().st_size if self.log.exists() else 0
        with open(self.log, "ab", opener=_open_private) as log:
            # A process group of its own: Ctrl-C in the terminal reaches this process alone, which ends the others.
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_environment(),
                start_new_session=True,
            )

    def rotate_log(self) -> None:
        """Has a long log begin anew, and keeps what it had as NAME.log.1, in place of what that had. The service writes
        to the end of the same file and notices nothing. Raises OSError; then the log is as it was."""
        if self.log.stat().st_size > LOG_BYTES:
            with (
                open(self.log, "rb") as log,
                open(self.log.with_name(f"{self.log.name}.1"), "wb", opener=_open_private) as kept,
            ):
                shutil.copyfileobj(log, kept)
            os.truncate(self.log, 0)
            self._log_start = 0

    def log_end(self) -> str:
        """Of what it wrote since its last start."""
        if not self.log.exists():
            return ""
        return "\n".join(self.log.read_bytes()[self._log_start :].decode(errors="replace").splitlines()[-15:])


class LocalServices:
    """`async with LocalServices(folder) as services:` all four are healthy inside.

    `folder` gets runs, weights, checkpoints, the memory's database, the policy service's state, tokens and the logs, of
    which each has at most about twice LOG_BYTES. At `log_level` info, each service logs a line per request. `configs`
    are TOML files with settings, by service; addresses, folders and tokens are those of this class. The env service
    runs a process for each port of its address, such as `127.0.0.1:50055-50057`. `model` wins over the policy's, and
    without either it is the embedded one. Models in folders come from below `models_folder`.

    Calls need a token of `tokens`; `endpoint` has one. The command line finds them while the services run.
    """

    def __init__(
        self,
        folder: Path,
        *,
        model: str = "",
        configs: Mapping[str, Path] | None = None,
        models_folder: Path = Path(),
        addresses: Mapping[str, str] | None = None,
        log_level: str = "warning",
    ):
        self.folder = folder.resolve()
        self.addresses = dict(addresses or {name: f"127.0.0.1:{port}" for name, port in free_ports().items()})
        self.tokens = LocalTokens(self.folder)
        runs = self.folder
        address = self.addresses
        flags: dict[str, list[str]] = {
            "env": ["--processes", str(len(Addresses.parse(address["env"]).fixed))],
            "policy": [
                *(("--model", model) if model else ()),
                *("--weights-folder", str(runs / "weights"), "--state-folder", str(runs / "policy")),
                *("--models-folder", str(models_folder.resolve())),
            ],
            "memory": ["--database", str(runs / "memory.sqlite")],
            "trainer": [
                *("--runs-folder", str(runs / "runs"), "--checkpoint-folder", str(runs / "checkpoints")),
                *("--weights-folder", str(runs / "weights"), "--models-folder", str(models_folder.resolve())),
                *("--env-address", address["env"], "--policy-address", address["policy"]),
                *("--memory-address", address["memory"]),
            ],
        }
        for name, file in (configs or {}).items():
            flags[name] += ["--config", str(file.resolve())]
        for name, files in self.tokens.settings().items():
            flags[name] += [word for key, file in files.items() for word in (f"--{key.replace('_', '-')}", str(file))]
        quiet = ["--log-level", log_level]
        self._processes = {name: self._process(name, [*flags[name], *quiet]) for name in DEFAULT_ADDRESSES}
        self._supervisor: asyncio.Task[None] | None = None
        self._announced = contextlib.ExitStack()

    def _process(self, name: str, flags: list[str]) -> _Process:
        host, _, port = Addresses.parse(self.addresses[name]).fixed[0].rpartition(":")
        command = [sys.executable, "-m", f"mulligan.{name}", "--host", host, "--port", port, *flags]
        return _Process(name, self.addresses[name], command, self.folder / "logs" / f"{name}.log")

    @property
    def processes(self) -> dict[str, int]:
        """The process ids of the services that have been started, by name."""
        return {name: one.process.pid for name, one in self._processes.items() if one.process is not None}

    async def __aenter__(self) -> LocalServices:
        self._make_folders()
        self.tokens.make()
        self._check_ports()
        for process in self._processes.values():
            process.start()
        try:
            await self._wait_for_all()
        except BaseException:
            await self._end()
            raise
        self._supervisor = asyncio.create_task(self._supervise())
        self._announce()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._end()

    def _make_folders(self) -> None:
        """What is made can be read by this user alone, whatever the umask of the process."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        for folder in ("", "logs", "weights", "runs", "checkpoints", "policy"):
            (self.folder / folder).mkdir(mode=0o700, exist_ok=True)

    def endpoint(self, service: str, role: AccessRole = AccessRole.ADMIN) -> Endpoint:
        """A service's, with a token of this role."""
        return Endpoint(self.addresses[service], token_file=self.tokens.of(service) / role)

    def _announce(self) -> None:
        """The services run without it, too."""
        folders = {
            server: self.tokens.of(name) for name, process in self._processes.items() for server in process.servers
        }
        try:
            self._announced.enter_context(announced(folders))
        except OSError as error:
            note(f"other commands do not find the tokens by themselves: {error}")
            note(f"they need MULLIGAN_CLI_TOKEN_FILE={self.tokens.of('trainer') / AccessRole.ADMIN}")

    async def failed(self) -> None:
        """Returns never; raises ServiceFailed when a service cannot be kept running."""
        assert self._supervisor is not None
        await asyncio.shield(self._supervisor)

    async def _wait_for_all(self) -> None:
        missing = list(self._processes)

        async def wait(process: _Process) -> None:
            await self._wait_until_healthy(process)
            missing.remove(process.name)

        with Heartbeat(lambda: f"starting {', '.join(missing)}"):
            await gather_or_cancel(wait(process) for process in self._processes.values())

    async def _wait_until_healthy(self, process: _Process) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            healthy = all([await is_healthy(server) for server in process.servers])
            if process.process is None or process.process.poll() is not None:  # whoever answers there is another
                raise ServiceFailed(f"{process.name} ended at start:\n{process.log_end()}")
            if healthy:
                return
            if time.monotonic() > deadline:
                raise ServiceFailed(f"{process.name} was not healthy after {START_SECONDS:.0f} s:\n{process.log_end()}")
            await asyncio.sleep(0.1)

    def _check_ports(self) -> None:
        servers = [(server, process.name) for process in self._processes.values() for server in process.servers]
        taken = [(server, name) for server, name in servers if not _is_free(server)]
        if taken:
            places = ", ".join(f"{server} ({name})" for server, name in taken)
            raise ServiceFailed(f"another process listens at {places}: end it, or take other ports with --port-base")

    async def _supervise(self) -> None:
        while True:
            await asyncio.sleep(0.5)
            for process in self._processes.values():
                with contextlib.suppress(OSError):  # the disk is full, or the log was removed
                    process.rotate_log()
                if process.process is not None and process.process.poll() is not None:
                    recent = [start for start in process.started if start > time.monotonic() - 60]
                    if len(recent) > RESTARTS:
                        raise ServiceFailed(f"{process.name} keeps dying:\n{process.log_end()}")
                    process.start()

    async def _end(self) -> None:
        """SIGTERM, trainer first, so that it finishes its step while the others still serve; SIGKILL at last."""
        with contextlib.suppress(OSError):  # the home folder is away
            self._announced.close()
        await cancel(self._supervisor)
        for name in reversed(self._processes):
            process = self._processes[name].process
            if process is None or process.poll() is not None:
                continue
            process.send_signal(signal.SIGTERM)
            try:
                await asyncio.to_thread(process.wait, STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                await asyncio.to_thread(process.wait)


def _open_private(path: str, flags: int) -> int:
    """Opens a file that its user alone can read, also one that an earlier release made for all."""
    descriptor = os.open(path, flags, 0o600)
    try:
        os.fchmod(descriptor, 0o600)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _is_free(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what has just ended leaves connections behind
        try:
            probe.bind((host, int(port)))
        except OSError:
            return False
    return True


def free_ports() -> dict[str, int]:
    """A free port per service. All are held until each has one, so that they differ."""
    sockets: dict[str, socket.socket] = {}
    for name in DEFAULT_ADDRESSES:
        sockets[name] = socket.socket()
        sockets[name].bind(("127.0.0.1", 0))
    ports = {name: held.getsockname()[1] for name, held in sockets.items()}
    for held in sockets.values():
        held.close()
    return ports


def _environment() -> dict[str, str]:
    """The processes import what this one does, wherever it was started."""
    root = Path(mulligan.__file__).parents[1]
    roots = [] if root == Path(sysconfig.get_path("purelib")) else [str(root)]
    path = os.pathsep.join([*roots, *filter(None, [os.environ.get("PYTHONPATH")])])
    found = {**os.environ, "PYTHONPATH": path} if path else dict(os.environ)
    # Threads of one service that spin while they wait would take the cores from the others.
    return {"OMP_WAIT_POLICY": "PASSIVE", **found}
