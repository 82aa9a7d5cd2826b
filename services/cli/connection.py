"""How commands reach services: addresses from flags or the environment, tokens from the environment or from
`mulligan up`; an error is one line."""

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

from mulligan.cli.local_tokens import NotPrivate, check_private, find_tokens
from mulligan.cli.out import fail
from mulligan.common import proxies
from mulligan.common.access import AccessRole
from mulligan.common.addresses import Addresses
from mulligan.common.channel import Endpoint, UnprotectedToken, check_protection
from mulligan.common.errors import CallFailed, DomainError, Reason, ServiceUnavailable
from mulligan.common.tls import BadTls, ClientTls, read_client_tls
from mulligan.common.tokens import BadTokens, TokenFile, is_sendable

PORT_BASE = 50051


def addresses_from(port: int) -> dict[str, str]:
    """Addresses of the four services on loopback, at this port and the next three."""
    return {name: f"127.0.0.1:{port + place}" for place, name in enumerate(("env", "policy", "memory", "trainer"))}


DEFAULT_ADDRESSES = addresses_from(PORT_BASE)
OUTAGE_SECONDS = 5.0  # a person waits at the terminal
TOKEN = "MULLIGAN_CLI_TOKEN"  # a variable
READER_TOKEN = "MULLIGAN_CLI_READER_TOKEN"
RUN_CREDENTIAL = "MULLIGAN_CLI_RUN_CREDENTIAL"  # a variable: the credential of a run
TLS = "MULLIGAN_CLI_TLS"  # how variables begin
INSECURE = "MULLIGAN_CLI_INSECURE"

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


class UnusableEndpoint(ValueError):
    """An address or a credential that no call can be made with. The message says which variable or flag to change."""


def endpoint(address: str, outage_seconds: float = OUTAGE_SECONDS) -> Endpoint:
    """The endpoint, with the token of `token_file`, or of MULLIGAN_CLI_TOKEN. Ends the program if the address is not
    that of one server.

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
    try:
        return find_endpoint(address, outage_seconds)
    except UnusableEndpoint as error:
        fail(error, 2)


def find_endpoint(address: str, outage_seconds: float = OUTAGE_SECONDS) -> Endpoint:
    """The endpoint of one server, with its credentials. Raises UnusableEndpoint."""
    file = _find_token_file(address)
    for variable in (TOKEN, RUN_CREDENTIAL):
        if (given := os.environ.get(variable)) and not is_sendable(given):
            raise UnusableEndpoint(f"{variable}: expected at most 4,096 printable ASCII characters without spaces")
    token = None if file is not None else os.environ.get(TOKEN)
    found = Endpoint(
        address,
        token=token,
        token_file=file,
        tls=find_client_tls(),
        run_credential=os.environ.get(RUN_CREDENTIAL),
        insecure=insecure(),
        outage_seconds=outage_seconds,
    )
    try:
        check_protection(found)
    except UnprotectedToken as error:
        raise UnusableEndpoint(f"{error}: {TLS}_CA, or mulligan --insecure") from error
    return found


def token_file(address: str) -> Path | None:
    """The file that MULLIGAN_CLI_TOKEN_FILE names. Without it and MULLIGAN_CLI_TOKEN, that of this user's services at
    the address, if `mulligan up` runs them; else None. Ends the program when the file holds no token."""
    try:
        return _find_token_file(address)
    except UnusableEndpoint as error:
        fail(error, 2)


def _find_token_file(address: str) -> Path | None:
    name = os.environ.get(f"{TOKEN}_FILE")
    if not name:
        return _find_local(address, AccessRole.ADMIN)
    try:
        TokenFile(Path(name))
    except BadTokens as error:
        raise UnusableEndpoint(f"{TOKEN}_FILE: {error}") from error
    return Path(name)


def _found_file(address: str, role: AccessRole) -> Path | None:
    """A role's token of services that `mulligan up` runs. Ends the program when others may read it."""
    try:
        return _find_local(address, role)
    except UnusableEndpoint as error:
        fail(error, 2)


def _find_local(address: str, role: AccessRole) -> Path | None:
    if TOKEN in os.environ or os.environ.get(f"{TOKEN}_FILE"):
        return None
    try:
        folder = find_tokens(address)
        if folder is None:
            return None
        check_private(folder)
        check_private(folder / role)
        TokenFile(folder / role)
    except (NotPrivate, BadTokens, FileNotFoundError) as error:
        raise UnusableEndpoint(f"{error}; {TOKEN}_FILE may name another") from error
    return folder / role


def service_token(address: str) -> str | None:
    """The token of `token_file`, or of MULLIGAN_CLI_TOKEN. A flag could be seen in the process list."""
    file = token_file(address)
    return TokenFile(file).tokens[0] if file is not None else os.environ.get(TOKEN)


def reader_token(address: str) -> str | None:
    """The token of MULLIGAN_CLI_READER_TOKEN. Without it, and without other variables of tokens, that of `mulligan up`
    for the role reader."""
    file = _found_file(address, AccessRole.READER) if READER_TOKEN not in os.environ else None
    return TokenFile(file).tokens[0] if file is not None else os.environ.get(READER_TOKEN)


def insecure() -> bool:
    """Whether tokens may go to other machines without TLS: MULLIGAN_CLI_INSECURE, or `mulligan --insecure`."""
    return os.environ.get(INSECURE, "").lower() in ("1", "true", "yes")


def client_tls() -> ClientTls | None:
    """By the variables MULLIGAN_CLI_TLS_CA, …_NAME, …_CERT and …_KEY; None if none of them is set. Ends the program for
    a bad file."""
    try:
        return find_client_tls()
    except UnusableEndpoint as error:
        fail(error, 2)


def find_client_tls() -> ClientTls | None:
    """As `client_tls`. Raises UnusableEndpoint."""
    ca, name, cert, key = (os.environ.get(f"{TLS}_{part}", "") for part in ("CA", "NAME", "CERT", "KEY"))
    files = [Path(file) if file else None for file in (ca, cert, key)]
    try:
        return read_client_tls(files[0], name, files[1], files[2])
    except (BadTls, ValueError) as error:
        raise UnusableEndpoint(f"{TLS}_…: {error}") from error


def run(main: Coroutine[Any, Any, T]) -> T:
    """Runs a command. If a service refuses or fails, prints one line to stderr and exits with status 1. A value that
    cannot be sent, such as a number out of range or text that is not UTF-8, exits with status 2."""
    try:
        return asyncio.run(main)
    except (DomainError, CallFailed, ServiceUnavailable) as error:
        fail(said(error))
    except ValueError as error:
        fail(f"a value of this call cannot be sent: {error}", 2)


def said(error: BaseException) -> str:
    """What the error says and, where a token or the credential of a run is missing, how a command gets one."""
    if isinstance(error, DomainError) and error.reason is Reason.BAD_CREDENTIAL:
        return (
            f"{error}: {TOKEN}_FILE names its file; without that variable and {TOKEN}, a command has the token of your "
            f"own `mulligan up` while it runs at that address, 127.0.0.1:PORT"
        )
    if isinstance(error, DomainError) and error.reason is Reason.RUN_CREDENTIAL:
        return (
            f"{error}. A command sends the one of {RUN_CREDENTIAL}, else the one that `mulligan train` got when it "
            f"started the run; `mulligan token` prints another, and administrators need none"
        )
    return str(error)
