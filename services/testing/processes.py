"""Real service processes on free loopback ports, for tests that need a server which can be killed and come back."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mulligan.testing.forked import ForkedProcess

START_SECONDS = 120.0  # torch takes its time on a busy machine
STOP_SECONDS = 120.0


class ProcessFailed(AssertionError):
    """A service process did not do what it was asked to; the message ends with its log."""


@dataclass
class ServiceProcess:
    """One `python -m mulligan.NAME`. It listens on the same port after a restart.

    `program` are arguments of python that start the service instead. `before` is a command that runs it as its child,
    such as a tracer; it ends with the service. `forked` starts it from a process in which all is imported already,
    unless one of these or an environment of its own is given.
    """

    name: str
    arguments: list[str]
    log_path: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    address: str = ""
    process: subprocess.Popen[bytes] | ForkedProcess | None = None
    start_seconds: float = START_SECONDS
    program: Sequence[str] = ()
    before: Sequence[str] = ()
    forked: bool = False
    _log_start: int = 0

    @property
    def log(self) -> str:
        """What it wrote since its last start."""
        return self.log_path.read_bytes()[self._log_start :].decode(errors="replace") if self.log_path.exists() else ""

    @property
    def log_lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.splitlines() if line.startswith("{")]

    @property
    def memory(self) -> int:
        """Bytes of it that are in memory."""
        assert self.process is not None
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def start(self) -> None:
        assert self.process is None, f"{self.name} runs already"
        port = self.address.rpartition(":")[2] or "0"
        arguments = ["--port", port, "--log-format", "json", *self.arguments]
        path = os.pathsep.join(filter(None, sys.path))  # it imports what this process does
        environment = {**os.environ, "PYTHONPATH": path, **self.environment}
        self._log_start = self.log_path.stat().st_size if self.log_path.exists() else 0
        if self.forked and not (self.program or self.before or self.environment):
            self.process = ForkedProcess(f"mulligan.{self.name}", arguments, self.log_path, environment)
        else:
            self.process = self._start_python(arguments, environment)
        self.address = self._wait_until_it_serves()

    def _start_python(self, arguments: list[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        program = self.program or ["-m", f"mulligan.{self.name}"]
        with self.log_path.open("ab") as log:
            return subprocess.Popen(
                [*self.before, sys.executable, *program, *arguments],
                cwd=self.log_path.parent,  # what it writes by default stays there
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _wait_until_it_serves(self) -> str:
        """The address it printed, once its health service (or the log, for a server with TLS) says that it serves."""
        deadline = time.monotonic() + self.start_seconds
        while time.monotonic() < deadline:
            if self.process is not None and self.process.poll() is not None:
                status = self.process.returncode
                self.process = None
                raise ProcessFailed(f"{self.name} ended with status {status}:\n{self.log}")
            for line in self.log_lines:
                if line["event"] == "serving":
                    return str(line["address"])
            time.sleep(0.02)
        self.kill()
        raise ProcessFailed(f"{self.name} did not serve within {self.start_seconds:g} s:\n{self.log}")

    def is_healthy(self, service: str = "") -> bool:
        with grpc.insecure_channel(self.address) as channel:
            try:
                stub = health_pb2_grpc.HealthStub(channel)
                request = health_pb2.HealthCheckRequest(service=service)
                response = stub.Check(request, timeout=5.0)  # type: ignore[attr-defined]  # the type stub lacks it
            except grpc.RpcError:
                return False
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)

    def terminate(self) -> None:
        """SIGTERM, without waiting."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)

    def wait(self, timeout: float = STOP_SECONDS) -> int:
        """The exit status."""
        assert self.process is not None
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise ProcessFailed(f"{self.name} did not end within {timeout:g} s:\n{self.log}") from None
        self.process = None
        return status

    def stop(self) -> int:
        self.terminate()
        return self.wait()

    def kill(self) -> None:
        """SIGKILL: no chance to finish anything."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    @property
    def pid(self) -> int:
        """Of the service itself, also where `before` runs it."""
        assert self.process is not None
        if not self.before:
            return self.process.pid
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0]) if children else self.process.pid

    def restart(self) -> None:
        """Kills it, where it still runs, and starts it again on the same port."""
        self.kill()
        self.start()


def flags(settings: Mapping[str, object]) -> list[str]:
    """Settings as command-line flags: `max_episodes=2` is `--max-episodes 2`; a mapping or list is JSON."""
    found: list[str] = []
    for name, value in settings.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            found += [f"--{flag}", json.dumps(value) if isinstance(value, dict | list | tuple) else str(value)]
    return found


class ServiceProcesses:
    """Starts service processes and ends those, and only those, that it started.

    With `forked` they start from a process in which all is imported already, which saves seconds.
    """

    def __init__(self, folder: Path, *, forked: bool = False):
        self._folder = folder
        self._forked = forked
        self.started: list[ServiceProcess] = []

    def start(
        self,
        name: str,
        *,
        environment: Mapping[str, str] | None = None,
        address: str = "",
        start_seconds: float = START_SECONDS,
        program: Sequence[str] = (),
        **settings: object,
    ) -> ServiceProcess:
        """Starts `python -m mulligan.NAME`, or another program for it, with these settings and waits until it serves,
        at a free port by default."""
        log_path = self._folder / f"{name}-{len(self.started)}.log"
        service = ServiceProcess(
            name,
            flags(settings),
            log_path,
            environment or {},
            address,
            start_seconds=start_seconds,
            program=program,
            forked=self._forked,
        )
        self.started.append(service)
        service.start()
        return service

    def end(self) -> None:
        for service in self.started:
            service.kill()

    def logs(self) -> str:
        """The ends of all logs, to be shown with a failed test."""
        return "\n".join(f"== {service.log_path.name}\n{service.log[-4000:]}" for service in self.started)
