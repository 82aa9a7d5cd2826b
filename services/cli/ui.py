"""`mulligan ui`: the console, in a browser."""

from __future__ import annotations

import contextlib
import secrets
import socket
import string
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from mulligan.cli.connection import (
    DEFAULT_ADDRESSES,
    TLS,
    EnvAddress,
    MemoryAddress,
    PolicyAddress,
    TrainerAddress,
    endpoint,
    insecure,
)
from mulligan.cli.local_tokens import NotPrivate, check_private
from mulligan.cli.out import fail, note
from mulligan.cli.run_credentials import kept_credential
from mulligan.common.addresses import Addresses
from mulligan.common.channel import Endpoint, UnprotectedToken, check_protection, for_servers
from mulligan.common.errors import ServiceUnavailable
from mulligan.common.extras import MissingExtra
from mulligan.console.access import Access

FOLDER = Path("runs")
HOST = "127.0.0.1"
PORT = 8050
KEY_LENGTH = 20  # characters, at least
_KEY_CHARACTERS = set(string.ascii_letters + string.digits + "-_")


def ui(
    folder: Annotated[
        Path | None,
        typer.Argument(
            help="Shows the runs in this folder and those below it.", exists=True, file_okay=False, show_default="runs"
        ),
    ] = None,
    demo: Annotated[bool, typer.Option("--demo", help="Show recorded runs; nothing else has to run.")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = PORT,
    host: Annotated[str, typer.Option(help="Where it listens. Beyond this machine it wants TLS.")] = HOST,
    name: Annotated[
        list[str] | None, typer.Option(help="A name or address under which browsers open it; several are possible.")
    ] = None,
    tls_certificate: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="Its key, PEM.")] = None,
    key_file: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="Has the console's key. Without it the key is a new one each time."
        ),
    ] = None,
    env: EnvAddress = DEFAULT_ADDRESSES["env"],
    policy: PolicyAddress = DEFAULT_ADDRESSES["policy"],
    memory: MemoryAddress = DEFAULT_ADDRESSES["memory"],
    trainer: TrainerAddress = DEFAULT_ADDRESSES["trainer"],
) -> None:
    """Look at runs and experiences in a browser, also while they go on; and at the memory, policies and services that
    run. Ctrl-C ends it; the runs go on. The address that it prints has its key, which everybody needs.

    Example: `mulligan ui runs/local`; without any run `mulligan ui --demo`
    """
    _check_extra()
    shown = _shown(folder, demo)
    local = _is_local(host)
    _check_tls(host, local, tls_certificate, tls_key)
    key = secrets.token_urlsafe(24) if key_file is None else _read_key(key_file)
    addresses = {"env": env, "policy": policy, "memory": memory, "trainer": trainer}
    try:
        endpoints = {} if demo else {name: _endpoint(address) for name, address in addresses.items()}
    except ServiceUnavailable as error:
        fail(error, 2)
    with _listening(host, port) as listening:
        port = listening.getsockname()[1]
        names = ["127.0.0.1", "localhost"] if local else [host, socket.gethostname()]
        own = [f"{_bracketed(one)}:{port}" for one in dict.fromkeys([*(name or []), host, *names])]
        address = f"{'http' if tls_key is None else 'https'}://{own[0] if local or name else own[-1]}"
        is_open = demo and local  # the recording is public
        what = "recorded runs" if shown is None else f"the runs below {shown}"
        note(f"{what}: {address}" if is_open else f"{what}, with the console's key: {address}/?key={key}")
        files = {"ssl_certfile": tls_certificate, "ssl_keyfile": tls_key}
        access = Access(own, key, port, is_open=is_open)
        if shown is None:
            _serve_recording(listening, access, files)
        else:
            _serve(listening, shown.resolve(), endpoints, access, files)


def _shown(folder: Path | None, demo: bool) -> Path | None:
    """The folder whose runs are shown, None for the recording."""
    if not demo:
        shown = folder or FOLDER
        if not shown.is_dir():
            fail(f"there is no folder {shown} here: expected FOLDER, or --demo for recorded runs", 2)
        return shown
    if folder is not None:
        fail(f"--demo: expected without a folder, not with {folder}", 2)
    return None


def _check_tls(host: str, local: bool, tls_certificate: Path | None, tls_key: Path | None) -> None:
    if (tls_certificate is None) != (tls_key is None):
        fail("--tls-certificate and --tls-key: expected both, or none", 2)
    if not local and tls_key is None and not insecure():
        missing = "--tls-key and --tls-certificate, or mulligan --insecure"
        fail(f"--host {host}: without TLS others could read the key on its way. Expected {missing}", 2)


def _check_extra() -> None:
    try:
        import uvicorn  # noqa: F401

        import mulligan.console.app  # noqa: F401
    except ImportError as error:
        fail(MissingExtra("ui", error), 2)


def _serve(
    listening: socket.socket,
    folder: Path,
    endpoints: Mapping[str, Endpoint],
    access: Access,
    files: Mapping[str, Any],
) -> None:
    """Until Ctrl-C. `files` are uvicorn's settings of TLS."""
    from mulligan.console import web_server
    from mulligan.console.app import make_app
    from mulligan.console.index import ExperienceIndex
    from mulligan.console.library import Library
    from mulligan.console.reading import index_file
    from mulligan.console.services import Services
    from mulligan.console.watcher import Watcher

    services = Services(endpoints, partial(kept_credential, endpoints["trainer"].address))
    with contextlib.closing(ExperienceIndex(index_file(folder))) as index:
        web_server.serve(make_app(Watcher(Library(folder), index), index, services, access), listening, files)


def _serve_recording(listening: socket.socket, access: Access, files: Mapping[str, Any]) -> None:
    """As `_serve`, of the package's recording, in a folder that is gone afterwards."""
    from mulligan.console import web_server
    from mulligan.console.app import make_app
    from mulligan.console.index import ExperienceIndex
    from mulligan.console.library import Library
    from mulligan.console.recording import RecordedServices, unpack
    from mulligan.console.watcher import Watcher

    with tempfile.TemporaryDirectory(prefix="mulligan-demo-") as name:
        folder = Path(name)
        try:
            answers = unpack(folder / "runs")
        except OSError as error:
            fail(f"--demo: the recording cannot be unpacked: {error}")
        with contextlib.closing(ExperienceIndex(folder / "index.sqlite")) as index:
            watcher = Watcher(Library(folder / "runs"), index)
            app = make_app(watcher, index, RecordedServices(answers), access, answers.banner)
            web_server.serve(app, listening, files)


def _is_local(host: str) -> bool:
    try:
        return Addresses.parse(f"{_bracketed(host)}:{PORT}").loopback
    except ValueError:
        fail(f"--host {host}: expected a name or an address of this machine", 2)


def _listening(host: str, port: int) -> socket.socket:
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen()  # who comes before the pages are ready waits
    except OSError as error:
        listening.close()
        fail(f"--host {host} --port {port}: {error.strerror or error}", 2)
    return listening


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _read_key(file: Path) -> str:
    """Of a file that this user alone may read."""
    try:
        check_private(file)
        key = file.read_text("ascii").strip()
    except (NotPrivate, OSError, UnicodeDecodeError) as error:
        fail(f"--key-file: {error}", 2)
    if len(key) < KEY_LENGTH or not set(key) <= _KEY_CHARACTERS:
        fail(f"--key-file {file}: expected at least {KEY_LENGTH} letters, digits, - and _", 2)
    return key


def _endpoint(address: str) -> Endpoint:
    """Of all servers that the address names, with the credentials for the first one."""
    try:
        found = Addresses.parse(address)
        first = next(iter(found.fixed), None) or str(found.names[0])
        servers = replace(endpoint(first), address=address)
        check_protection(servers)
        for_servers(servers, found)
    except UnprotectedToken as error:
        fail(f"{error}: {TLS}_CA, or mulligan --insecure", 2)
    except ValueError as error:
        fail(error, 2)
    return servers
