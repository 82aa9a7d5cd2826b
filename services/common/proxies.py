"""Which addresses are reached without an HTTP proxy, and what to say of one that may be in the way.

gRPC, httpx and websockets all read `http_proxy` and its relatives. A proxy of a company's network knows neither
loopback nor the names of containers, so a service of ours at such an address would never answer.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping

_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy", "all_proxy")
_PRIVATE_ENDINGS = (".local", ".internal", ".localhost", ".svc")


def is_direct(host: str) -> bool:
    """Whether a host is of this machine or of a private network: loopback, private and link-local addresses, names
    without a dot (as containers have), and the endings that are kept for private names."""
    name = host.strip("[]").rstrip(".").lower()
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return "." not in name or name.endswith(_PRIVATE_ENDINGS)
    return address.is_loopback or address.is_private or address.is_link_local or address.is_unspecified


def host_of(address: str) -> str:
    """Of HOST:PORT, [HOST]:PORT, unix:PATH (then "") or dns:///HOST:PORT."""
    if address.startswith("unix:"):
        return ""
    name = address.rpartition("/")[2]
    return name.partition("]")[0].strip("[") if name.startswith("[") else name.partition(":")[0]


def grpc_options(address: str) -> list[tuple[str, int]]:
    """Of a channel: https://grpc.github.io/grpc/core/group__grpc__arg__keys.html"""
    return [("grpc.enable_http_proxy", 0)] if is_direct(host_of(address)) else []


def hint(address: str, environment: Mapping[str, str] = os.environ) -> str:
    """A sentence for an address that cannot be reached, where a proxy is set for it; else "". Values are not told: they
    may hold credentials."""
    if is_direct(host_of(address)):
        return ""
    found = next((name for name in environment if name.lower() in _VARIABLES and environment[name]), None)
    if found is None:
        return ""
    return f" (an HTTP proxy is set by {found}; where it should not be used, name this host in no_proxy)"
