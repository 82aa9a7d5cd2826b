"""How commands reach services: addresses from flags or the environment; an error is one line."""

from __future__ import annotations

import asyncio
import os
import shlex
import socket
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from mulligan.cli.out import fail
from mulligan.common import proxies
from mulligan.common.addresses import Addresses
from mulligan.common.channel import Endpoint
from mulligan.common.errors import CallFailed, DomainError, ServiceUnavailable

PORT_BASE = 50051


def addresses_from(port: int) -> dict[str, str]:
    """Addresses of the four services on loopback, at this port and the next three."""
    return {name: f"127.0.0.1:{port + place}" for place, name in enumerate(("env", "policy", "memory", "trainer"))}


DEFAULT_ADDRESSES = addresses_from(PORT_BASE)
OUTAGE_SECONDS = 5.0  # a person waits at the terminal

TrainerAddress = Annotated[
    str, typer.Option("--trainer", envvar="MULLIGAN_CLI_TRAINER", help="Address of the trainer service.")
]
MemoryAddress = Annotated[
    str, typer.Option("--memory", envvar="MULLIGAN_CLI_MEMORY", help="Address of the memory service.")
]
EnvAddress = Annotated[
    str, typer.Option("--env", envvar="MULLIGAN_CLI_ENV", help="Address of the environment service.")
]
# `mulligan eval --policy` is a policy's name.
PolicyAddress = Annotated[
    str,
    typer.Option(
        "--policy-address", envvar="MULLIGAN_CLI_POLICY", help="Address of the policy service, or of all its servers."
    ),
]
T = TypeVar("T")


def program() -> str:
    """The name under which this program was called, for commands to copy."""
    return sys.argv[0] if Path(sys.argv[0]).name == "mulligan" else "mulligan"


def command(*words: str, trainer: str = "") -> str:
    """A command line to copy, for the same trainer."""
    elsewhere = ["--trainer", trainer] if trainer not in ("", DEFAULT_ADDRESSES["trainer"]) else []
    return shlex.join([program(), *words, *elsewhere])


def endpoint(address: str, outage_seconds: float = OUTAGE_SECONDS) -> Endpoint:
    """The endpoint, with `service_token`. Ends the program if the address is not that of one server.

    Raises ServiceUnavailable if its host is unknown.
    """
    try:
        parsed = Addresses.parse(address)
    except ValueError as error:
        fail(error, 2)
    if len(parsed.fixed) + len(parsed.names) != 1:
        fail(f"{address!r} names several servers: expected the host:port of one", 2)
    host = proxies.host_of(address)
    if host and not proxies.hint(address):  # a proxy knows hosts that this machine does not
        try:
            socket.getaddrinfo(host, None)
        except OSError as error:
            raise ServiceUnavailable(address, 0, f"the host is not known: {error.strerror or error}") from error
    return Endpoint(address, token=service_token(), outage_seconds=outage_seconds)


def service_token() -> str | None:
    """The services' token: from MULLIGAN_CLI_TOKEN, or the file that MULLIGAN_CLI_TOKEN_FILE names. A flag could be
    seen in the process list."""
    return _secret("MULLIGAN_CLI_TOKEN")


def admin_token() -> str | None:
    """The token of PolicyAdminService, if it has its own: from MULLIGAN_CLI_ADMIN_TOKEN, or the file that
    MULLIGAN_CLI_ADMIN_TOKEN_FILE names."""
    return _secret("MULLIGAN_CLI_ADMIN_TOKEN")


def _secret(variable: str) -> str | None:
    """Ends the program when the file cannot be read."""
    file = os.environ.get(f"{variable}_FILE")
    if not file:
        return os.environ.get(variable)
    try:
        return Path(file).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        fail(f"{variable}_FILE: {error}", 2)


def run(main: Coroutine[Any, Any, T]) -> T:
    """Runs a command. If a service refuses or fails, prints one line to stderr and exits with status 1. A value that
    cannot be sent, such as a number out of range or text that is not UTF-8, exits with status 2."""
    try:
        return asyncio.run(main)
    except (DomainError, CallFailed, ServiceUnavailable) as error:
        fail(error)
    except ValueError as error:
        fail(f"a value of this call cannot be sent: {error}", 2)
