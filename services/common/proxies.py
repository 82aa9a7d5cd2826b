"""Which addresses bypass an HTTP proxy, and a hint when a proxy may be the cause of a failure.

gRPC, httpx and websockets all read `http_proxy` and its relatives. A company's proxy reaches neither loopback nor the
names of containers, so a service there would never answer through it.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping

_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy", "all_proxy")
_PRIVATE_ENDINGS = (".local", ".internal", ".localhost", ".svc")


def is_direct(host: str) -> bool:
    """Whether a host is on this machine or in a private network: loopback, private and link-local addresses, names
    without a dot (such as containers), and endings reserved for private names."""
    name = host.strip("[]").rstrip(".").lower()
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return "." not in name or name.endswith(_PRIVATE_ENDINGS)
    return address.is_loopback or address.is_private or address.is_link_local or address.is_unspecified


def host_of(address: str) -> str:
    """The host in HOST:PORT, [HOST]:PORT or dns:///HOST:PORT; "" for unix:PATH."""
    if address.startswith("unix:"):
        return ""
    name = address.rpartition("/")[2]
    return name.partition("]")[0].strip("[") if name.startswith("[") else name.partition(":")[0]


def grpc_options(address: str) -> list[tuple[str, int]]:
    """Channel options that disable a proxy where none is needed:
    https://grpc.github.io/grpc/core/group__grpc__arg__keys.html"""
    return [("grpc.enable_http_proxy", 0)] if is_direct(host_of(address)) else []


def hint(address: str, environment: Mapping[str, str] = os.environ) -> str:
    """A hint for an unreachable address if a proxy is configured for it, else "". It does not show the proxy's URL,
    which may hold credentials."""
    if is_direct(host_of(address)):
        return ""
    found = variable(environment)
    return found and f" (an HTTP proxy is set by {found}; to bypass it, add this host to no_proxy)"


def variable(environment: Mapping[str, str] = os.environ) -> str:
    """The name of a variable that sets a proxy, or ""."""
    return next((name for name in environment if name.lower() in _VARIABLES and environment[name]), "")
