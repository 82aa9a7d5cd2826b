"""The console's web server: uvicorn, with room for people whatever others hold open.

uvicorn has neither a limit of connections nor one of the time that a request takes to arrive.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import uvicorn

from mulligan.common.connections import allowed, kept_free, peer_name

if TYPE_CHECKING:
    from starlette.types import ASGIApp

CONNECTIONS = 256


def serve(app: ASGIApp, listening: socket.socket, files: Mapping[str, Any]) -> None:
    """Until Ctrl-C. `files` are uvicorn's settings of TLS. What is no HTTP writes nothing on the terminal."""
    config = uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1, **files)
    server = uvicorn.Server(config)
    with kept_free(listening.getsockname()[1], allowed(CONNECTIONS), _used(server)):
        server.run([listening])


def _used(server: uvicorn.Server) -> Callable[[str], bool]:
    """Whether a request of a connection is being answered, so that it has arrived."""

    def is_used(peer: str) -> bool:
        for one in list(server.server_state.connections):
            cycle = getattr(one, "cycle", None)
            client = getattr(one, "client", None)
            if cycle is not None and not cycle.response_complete and client and peer_name(*client[:2]) == peer:
                return True
        return False

    return is_used
