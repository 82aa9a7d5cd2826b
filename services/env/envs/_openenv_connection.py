"""A connection to an OpenEnv server that goes to no other server."""

from __future__ import annotations

from typing import Any

from websockets.exceptions import InvalidStatus, WebSocketException
from websockets.sync.client import ClientConnection

from mulligan.common.foreign import is_redirect, redirected


class Redirected(WebSocketException):
    """The server sends us elsewhere. The message is for callers."""


class UnredirectedConnection(ClientConnection):
    """websockets follows an InvalidStatus with a redirect, and nothing else."""

    def handshake(self, *given: Any, **named: Any) -> None:
        try:
            super().handshake(*given, **named)
        except InvalidStatus as error:
            status = error.response.status_code
            if is_redirect(status):
                raise Redirected(redirected("it", status, error.response.headers.get("Location", ""))) from None
            raise
