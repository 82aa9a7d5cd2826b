"""Whether a key or token may go to a server that is reached by HTTP or a WebSocket."""

from __future__ import annotations

from urllib.parse import urlsplit

from mulligan.common.addresses import is_loopback
from mulligan.common.text import bounded

_ENCRYPTED = frozenset({"https", "wss"})
_SHOWN = 200  # characters of an address


def userinfo_problem(url: str) -> str:
    """Why an address cannot be a setting: it has a user or a password. They would be sent without further ado, and
    shown wherever the address is. Empty if it has none. A malformed one is for others to refuse."""
    try:
        parts = urlsplit(url if "://" in url else f"//{url}")
    except ValueError:
        return ""
    if "@" not in parts.netloc:
        return ""
    return f"{bounded(parts.netloc.rpartition('@')[2], _SHOWN)}: expected an address without a user or a password"


def key_problem(url: str, *, insecure: bool = False) -> str:
    """Why a key must not go there: others could read it on its way. Empty if it may, or if `insecure` allows it."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
    except ValueError as error:
        return f"{bounded(url, _SHOWN)} is no address: {error}"
    if insecure or parts.scheme in _ENCRYPTED or (host and is_loopback(host)):
        return ""
    shown = bounded(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}", _SHOWN)  # without its query, or a password
    return f"the key for {shown} would cross the network without TLS: expected https or wss"
