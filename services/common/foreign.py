"""What other servers say when they fail is for our log, not for our callers: it may quote anything that they know."""

from __future__ import annotations

import secrets

import structlog

from mulligan.common.text import bounded

log = structlog.get_logger()
_KEPT = 2000  # characters


def kept(server: str, said: str, *keys: str) -> str:
    """Writes to the log what the server with this address said, without these keys. Returns what callers are told in
    its place: the id by which it is found there."""
    incident = secrets.token_hex(4)
    for key in filter(None, keys):
        said = said.replace(key, "(the key)")
    log.warning("another server failed", server=server, incident=incident, said=bounded(said, _KEPT))
    return f"incident {incident}, this server's log has what it said"
