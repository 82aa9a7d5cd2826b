"""A real Docker engine, and the services in containers on it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from docker.client import DockerClient
from docker.errors import DockerException
from testcontainers.compose import DockerCompose

from mulligan.cli.local import free_ports
from mulligan.common.channel import Endpoint
from mulligan.common.tls import ClientTls

FILES = ("compose.yaml",)
HEALTHY_SECONDS = 60.0


def missing_compose() -> str:
    """What keeps compose files from being read here; empty when nothing does."""
    if shutil.which("docker") is None:
        return "there is no docker on the PATH"
    compose = subprocess.run(["docker", "compose", "version"], capture_output=True, text=True, check=False)
    return f"docker compose does not run: {compose.stderr.strip()}" if compose.returncode else ""


def missing() -> str:
    """What keeps containers from being started here; empty when nothing does."""
    if problem := missing_compose():
        return problem
    try:
        client = DockerClient.from_env()
        client.ping()
        client.close()
    except DockerException as error:
        return f"no Docker engine answers: {error}"
    return ""


class Project(DockerCompose):
    """One compose project, apart from others on the same engine, at free ports of this machine. Its files lie in
    `folder`."""

    def __init__(
        self,
        name: str,
        *,
        folder: Path,
        files: Sequence[str] = FILES,
        services: Sequence[str] = (),
        variables: Mapping[str, str] | None = None,
        build: bool = True,
    ):
        super().__init__(folder, list(files), build=build, services=list(services) or None)
        ports = {f"{service.upper()}_PORT": str(port) for service, port in free_ports().items()}
        self._files = TemporaryDirectory()
        self.variables = {"COMPOSE_PROJECT_NAME": name, "MULLIGAN_TAG": "test", **ports, **(variables or {})}

    def run(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """`docker compose …`."""
        command = [*self.compose_command_property, *arguments]
        done = subprocess.run(
            command,
            cwd=self.context,
            env={**os.environ, **self.variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done

    def _run_command(self, cmd: str | list[str], context: str | None = None) -> subprocess.CompletedProcess[bytes]:
        """The parent's commands, in this project's surroundings."""
        arguments = list(cmd)[len(self.compose_command_property) :]
        done = self.run(*arguments)
        return subprocess.CompletedProcess(cmd, done.returncode, done.stdout.encode(), done.stderr.encode())

    def address(self, service: str) -> str:
        return f"127.0.0.1:{self.variables[f'{service.upper()}_PORT']}"

    def endpoint(self, service: str, *, outage_seconds: float = 120.0) -> Endpoint:
        """With an administrator's token, over TLS."""
        folder = "/run/env-tokens" if service == "env" else "/run/tokens"
        token = self.run("exec", "-T", service, "cat", f"{folder}/admin").stdout.strip()
        return Endpoint(self.address(service), token=token, tls=self.trust(service), outage_seconds=outage_seconds)

    def trust(self, service: str) -> ClientTls:
        """The authority of the services, without anything that identifies a caller."""
        ca = Path(self._files.name) / "ca.crt"
        ca.write_text(self.run("exec", "-T", service, "cat", "/run/tls/ca.crt").stdout)
        return ClientTls(ca)

    def execute(self, service: str, *command: str) -> subprocess.CompletedProcess[str]:
        """In a service's container; a status other than 0 is for the caller to judge."""
        return self.run("exec", "-T", service, *command, check=False)

    def inspect(self, service: str) -> dict[str, Any]:
        client = DockerClient.from_env()
        try:
            (identity,) = self.run("ps", "--all", "--quiet", service).stdout.split()
            attributes: dict[str, Any] = client.containers.get(identity).attrs
        finally:
            client.close()
        return attributes

    @contextmanager
    def another(self, service: str) -> Iterator[Any]:
        """One more container of a service, healthy, under the same name in the network, at no port of this machine."""
        started = self.run("run", "--detach", "--no-deps", "--use-aliases", service)
        client = DockerClient.from_env()
        container = client.containers.get(started.stdout.split()[-1])
        deadline = time.monotonic() + HEALTHY_SECONDS
        try:
            while container.attrs["State"]["Health"]["Status"] != "healthy":
                assert time.monotonic() < deadline, container.logs().decode()
                time.sleep(0.2)
                container.reload()
            yield container
        finally:
            container.remove(force=True)
            client.close()

    def __exit__(self, *problem: object) -> None:
        """All of the project goes, volumes included; after a failure the ends of its logs are shown."""
        if problem[0] is not None:
            print(self.run("logs", "--tail", "40", check=False).stdout, file=sys.stderr)
        self.run("down", "--volumes", "--timeout", "5")
        self._files.cleanup()


def image(name: str, tag: str = "test") -> dict[str, Any]:
    """What the engine knows about one of the images."""
    client = DockerClient.from_env()
    try:
        attributes: dict[str, Any] = client.images.get(name if ":" in name else f"mulligan/{name}:{tag}").attrs
    finally:
        client.close()
    return attributes


@contextmanager
def project(name: str, **settings: Any) -> Iterator[Project]:
    """Started, healthy, and gone at the end."""
    with Project(name, **settings) as running:
        yield running
