"""What other servers say when they fail is for our log, not for our callers: it may quote anything that they know."""

from __future__ import annotations

import secrets
from urllib.parse import urlsplit

import structlog

from mulligan.common.text import bounded, one_line

log = structlog.get_logger()
_KEPT = 2000  # characters
_SHOWN = 200  # characters of an address


def kept(server: str, said: str, *keys: str) -> str:
    """Writes to the log what the server with this address said, without these keys. Returns what callers are told in
    its place: the id by which it is found there."""
    incident = secrets.token_hex(4)
    for key in filter(None, keys):
        said = said.replace(key, "(the key)")
    log.warning("another server failed", server=server, incident=incident, said=bounded(said, _KEPT))
    return f"incident {incident}, this server's log has what it said"


def is_redirect(status: int) -> bool:
    """Whether an answer of this HTTP status sends the client elsewhere."""
    return 300 <= status < 400


def redirected(server: str, status: int, to: str) -> str:
    """What callers are told where the server with this address sends us elsewhere. Nobody goes there: settings name the
    addresses that prompts, actions and keys are sent to."""
    try:
        parts = urlsplit(to)
        place = parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
    except ValueError:
        place = ""
    where = bounded(one_line(place), _SHOWN) or "no address"
    return (
        f"{server} answers with a redirect (HTTP {status}) to {where}, which is not followed: expected its own address"
    )
