"""`mulligan ui`: the console, in a browser."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Annotated

import typer

from mulligan.cli.connection import (
    DEFAULT_ADDRESSES,
    EnvAddress,
    MemoryAddress,
    PolicyAddress,
    TrainerAddress,
    endpoint,
)
from mulligan.cli.out import fail, note
from mulligan.common.addresses import Addresses
from mulligan.common.errors import ServiceUnavailable
from mulligan.common.extras import MissingExtra

PORT = 8050


def ui(
    folder: Annotated[
        Path, typer.Argument(help="Shows the runs in this folder and those below it.", exists=True, file_okay=False)
    ] = Path("runs"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = PORT,
    env: EnvAddress = DEFAULT_ADDRESSES["env"],
    policy: PolicyAddress = DEFAULT_ADDRESSES["policy"],
    memory: MemoryAddress = DEFAULT_ADDRESSES["memory"],
    trainer: TrainerAddress = DEFAULT_ADDRESSES["trainer"],
) -> None:
    """Look at runs and experiences in a browser, also while they go on; and at the memory, policies and services that
    run. Ctrl-C ends it; the runs go on.

    Example: `mulligan ui runs/local`
    """
    try:
        import uvicorn

        from mulligan.console.app import make_app
        from mulligan.console.index import ExperienceIndex
        from mulligan.console.library import Library
        from mulligan.console.reading import index_file
        from mulligan.console.services import Services
        from mulligan.console.watcher import Watcher
    except ImportError as error:
        fail(MissingExtra("ui", error), 2)
    addresses = {"env": env, "policy": policy, "memory": memory, "trainer": trainer}
    try:
        services = Services({name: endpoint(_first(address)) for name, address in addresses.items()})
    except ServiceUnavailable as error:
        fail(error, 2)
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(("127.0.0.1", port))
            listening.listen()  # who comes before the pages are ready waits
        except OSError as error:
            fail(f"--port {port}: {error.strerror}", 2)
        port = listening.getsockname()[1]
        index = ExperienceIndex(index_file(folder.resolve()))
        hosts = [f"127.0.0.1:{port}", f"localhost:{port}"]
        app = make_app(Watcher(Library(folder.resolve()), index), index, services, hosts)
        note(f"the runs below {folder}: http://127.0.0.1:{port}")
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        server.run(sockets=[listening])
        index.close()


def _first(address: str) -> str:
    """Of several servers of a service the first: their policies are at one version."""
    try:
        return next(iter(Addresses.parse(address).fixed), address)
    except ValueError as error:
        fail(error, 2)
