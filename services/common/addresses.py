"""Addresses of a service: parsing, DNS look-up, and the server that an id belongs to.

An address setting is a comma-separated list of

    host:50051                  one server (also [::1]:50051 and unix:/path)
    host:50051-50054            one at each of these ports, the last one included
    dns:///name:50051           one at each address that the name resolves to, looked up again every few seconds: a
                                compose service and a headless Kubernetes service resolve to all their replicas
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b

_FORMS = "expected host:port, host:first-last or dns:///name:port"
_HOST = re.compile(r"\[[0-9A-Fa-f:.]+(%[\w.-]+)?\]|[\w.-]+")
_MOST_PORTS = 1000


@dataclass(frozen=True, slots=True)
class DnsName:
    name: str
    port: int

    def __str__(self) -> str:
        return f"dns:///{self.name}:{self.port}"


@dataclass(frozen=True, slots=True)
class Addresses:
    """The servers of a service, made by `parse`. `fixed` are addresses, `names` are resolved at run time, `text` is the
    setting."""

    text: str
    fixed: tuple[str, ...]
    names: tuple[DnsName, ...] = ()

    @property
    def single(self) -> bool:
        """Whether there is exactly one server and no DNS name."""
        return len(self.fixed) == 1 and not self.names

    @property
    def loopback(self) -> bool:
        """Whether all are on this machine."""
        hosts = ("" if one.startswith("unix:") else one.rpartition(":")[0] for one in self.fixed)
        return not self.names and all(map(is_loopback, hosts))

    @classmethod
    def parse(cls, text: str) -> Addresses:
        """Raises ValueError, which names the bad part and what was expected."""
        fixed: list[str] = []
        names: list[DnsName] = []
        for part in map(str.strip, text.split(",")):
            found = _part(part)
            for known in [found] if isinstance(found, DnsName) else found:
                if known in fixed or known in names:
                    raise ValueError(f"{str(known)!r} is named twice")
            if isinstance(found, DnsName):
                names.append(found)
            else:
                fixed += found
        return cls(text, tuple(fixed), tuple(names))

    async def look_up(self) -> tuple[str, ...]:
        """The current addresses, each once. Raises OSError, which names the DNS name, when one does not resolve."""
        found = dict.fromkeys(self.fixed)
        for name in self.names:
            found |= dict.fromkeys(await _resolve(name))
        return tuple(found)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host: localhost, an address of the loopback network, or "" for a socket."""
    try:
        return host in ("", "localhost") or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def one_server(text: str) -> str:
    """Returns the address. Raises ValueError when it names several servers."""
    if not Addresses.parse(text).single:
        raise ValueError(f"{text!r} names several servers: expected the host:port of one")
    return text


def by_rank(key: str, addresses: Iterable[str]) -> list[str]:
    """Sorts servers by rendezvous hashing: the id belongs to the first, and is tried at the others in this order.

    The order depends on the id and the addresses alone, so all clients agree. Ids spread evenly, and a server that
    joins or leaves moves only its own ids. Thaler and Ravishankar, 1998
    """
    return sorted(addresses, key=lambda address: (_rank(key, address), address), reverse=True)


def _rank(key: str, address: str) -> bytes:
    return blake2b(f"{address}\0{key}".encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _part(part: str) -> list[str] | DnsName:
    if not part:
        raise ValueError(f"a part is empty: {_FORMS}")
    if part.startswith("unix:"):
        return [part]
    if "@" in part:  # a password is not shown
        raise ValueError(f"an address holds no user and no password: {_FORMS}")
    if part.startswith("dns:"):
        rest = part.removeprefix("dns:")
        if rest.startswith("//") and not rest.startswith("///"):
            raise ValueError(f"{part!r}: only the system's resolver is supported: expected dns:///name:port")
        host, [port] = _split(part, rest.removeprefix("///"), ranges=False)
        return DnsName(host, port)
    host, ports = _split(part, part)
    return [f"{host}:{port}" for port in ports]


def _split(part: str, text: str, *, ranges: bool = True) -> tuple[str, list[int]]:
    """Splits into host and ports."""
    host, colon, given = text.rpartition(":")
    if not colon or not _HOST.fullmatch(host):
        raise ValueError(f"{part!r}: {_FORMS}")
    first, dash, last = given.partition("-")
    if dash and not ranges:
        raise ValueError(f"{part!r}: expected one port behind a DNS name")
    low = _port(part, first)
    high = _port(part, last if dash else first)
    if low > high:
        raise ValueError(f"{part!r}: expected the lower port first")
    if high - low >= _MOST_PORTS:
        raise ValueError(f"{part!r}: expected at most {_MOST_PORTS} ports")
    return host, list(range(low, high + 1))


def _port(part: str, text: str) -> int:
    if not re.fullmatch("[0-9]{1,5}", text) or not 1 <= int(text) <= 65535:
        raise ValueError(f"{part!r}: expected a port from 1 to 65535, not {text!r}")
    return int(text)


async def _resolve(name: DnsName) -> list[str]:
    loop = asyncio.get_running_loop()
    host = name.name.strip("[]")
    try:
        found = await loop.getaddrinfo(host, name.port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise OSError(f"{name}: {error.strerror or error}") from error
    hosts = {str(address[0]) for *_, address in found}
    return sorted(f"[{host}]:{name.port}" if ":" in host else f"{host}:{name.port}" for host in hosts)
