"""PEM files of TLS, read again when they change: certificates and authorities are replaced while the services run.

A certificate and its key are two files, which rarely change in the same instant. So what was read is used only if it
belongs together; until then, what was there before stays in force. https://grpc.io/docs/guides/auth/
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

import structlog

from mulligan.common.files import Stamp, stamp

log = structlog.get_logger()


class BadTls(OSError):
    """Files that cannot be read, hold no PEM, or do not belong together. The message names them."""


@dataclass(frozen=True, slots=True)
class ClientTls:
    """How a client speaks TLS.

    `ca` is a PEM file with the authorities that it trusts, gRPC's own if None. `name` is the one in the server's
    certificate, where that is not the host of the address. `cert` and `key` are PEM files that a client identifies
    itself with, where a server asks for that.
    """

    ca: Path | None = None
    name: str = ""
    cert: Path | None = None
    key: Path | None = None


@dataclass(frozen=True, slots=True)
class Pem:
    """The content of the files."""

    ca: bytes | None
    cert: bytes | None
    key: bytes | None


class PemFiles:
    """Raises BadTls if the files are wrong at first. A change that makes them wrong later is logged, and what was there
    before stays in force."""

    def __init__(self, ca: Path | None, cert: Path | None, key: Path | None):
        self._paths = (ca, cert, key)
        self._seen = self._look()
        self._content = self._read(self._seen)

    @property
    def content(self) -> Pem:
        """The same object until it changes."""
        seen = self._look()
        if seen != self._seen:
            self._seen = seen
            try:
                self._content = self._read(seen)
            except BadTls as error:  # such as a certificate whose key is about to be replaced, too
                log.warning("the certificates are those from before", cause=str(error))
            else:
                log.info("certificates read again", files=[str(path) for path in self._paths if path is not None])
        return self._content

    def _look(self) -> tuple[Stamp | None, ...]:
        return tuple(None if path is None else stamp(path) for path in self._paths)

    def _read(self, seen: tuple[Stamp | None, ...]) -> Pem:
        content = Pem(*(None if path is None else _bytes(path) for path in self._paths))
        ca, cert, key = self._paths
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if cert is not None and key is not None:
            try:
                context.load_cert_chain(cert, key, password=lambda: b"")  # does not ask at a terminal
            except OSError as error:
                raise BadTls(f"{cert} and {key} are no certificate and its private key: {error}") from error
        if ca is not None:
            try:
                context.load_verify_locations(ca)
            except OSError as error:
                raise BadTls(f"{ca} holds no certificate: {error}") from error
        if self._look() != seen:  # what was checked may not be what was read
            raise BadTls(f"{', '.join(str(path) for path in self._paths if path is not None)}: changed just now")
        return content


def read_client_tls(ca: Path | None, name: str, cert: Path | None, key: Path | None) -> ClientTls | None:
    """None if nothing is set. Raises ValueError if one of cert and key is missing, and BadTls for bad files."""
    if (cert is None) != (key is None):
        raise ValueError("cert and key belong together")
    PemFiles(ca, cert, key)
    return ClientTls(ca, name, cert, key) if ca or name or cert else None


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadTls(f"{path}: {error.strerror}") from error
