"""How commands reach services: addresses from flags or environment, and one line instead of a traceback."""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from mulligan.cli.out import fail
from mulligan.common.channel import Endpoint
from mulligan.common.errors import CallFailed, DomainError, ServiceUnavailable

PORT_BASE = 50051


def addresses_from(port: int) -> dict[str, str]:
    """Of the four services on loopback, at this port and the three after it."""
    return {name: f"127.0.0.1:{port + place}" for place, name in enumerate(("env", "policy", "memory", "trainer"))}


DEFAULT_ADDRESSES = addresses_from(PORT_BASE)
OUTAGE_SECONDS = 5.0  # a person waits at the terminal

TrainerAddress = Annotated[
    str, typer.Option("--trainer", envvar="MULLIGAN_CLI_TRAINER", help="Address of the trainer service.")
]
MemoryAddress = Annotated[
    str, typer.Option("--memory", envvar="MULLIGAN_CLI_MEMORY", help="Address of the memory service.")
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
    """How this program was called, for commands that a person may paste."""
    return sys.argv[0] if Path(sys.argv[0]).name == "mulligan" else "mulligan"


def command(*words: str, trainer: str = "") -> str:
    """One that a person may paste, at the same trainer."""
    elsewhere = ["--trainer", trainer] if trainer not in ("", DEFAULT_ADDRESSES["trainer"]) else []
    return shlex.join([program(), *words, *elsewhere])


def endpoint(address: str, outage_seconds: float = OUTAGE_SECONDS) -> Endpoint:
    """The token, if any, is in MULLIGAN_CLI_TOKEN, or in the file that MULLIGAN_CLI_TOKEN_FILE names: a flag would show
    it in the process list."""
    return Endpoint(address, token=_secret("MULLIGAN_CLI_TOKEN"), outage_seconds=outage_seconds)


def admin_token() -> str | None:
    """Of PolicyAdminService, where that has one of its own: in MULLIGAN_CLI_ADMIN_TOKEN, or the file that
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
    """Runs a command. What a service refuses is one line on stderr and exit status 1; a value that no message can
    carry, such as a number above its field's range or text that is no UTF-8, is status 2."""
    try:
        return asyncio.run(main)
    except (DomainError, CallFailed, ServiceUnavailable) as error:
        fail(error)
    except ValueError as error:
        fail(f"a value of this call cannot be sent: {error}", 2)
