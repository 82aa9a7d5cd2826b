"""PEM files of TLS, read again when they change: certificates and authorities are replaced while the services run.

A certificate and its key are two files, which rarely change in the same instant. So what was read is used only if it
belongs together; until then, what was there before stays in force. https://grpc.io/docs/guides/auth/
"""

from __future__ import annotations

import ssl
from contextlib import suppress
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


class HttpsContext:
    """How a client speaks TLS to servers that speak HTTP: `context`. `name` of the settings is not used, since HTTP
    compares certificates with the host of the address. Raises BadTls.

    A client calls `refresh` before it connects. Then it has the newest certificate, and trusts a new authority. One
    that was taken away stays trusted until another context is made.
    """

    def __init__(self, tls: ClientTls):
        self._tls = tls
        self._files = PemFiles(tls.ca, tls.cert, tls.key)
        self._content = self._files.content
        self.context = ssl.create_default_context(cafile=tls.ca)  # the system's authorities for None
        self._load()

    def refresh(self) -> None:
        content = self._files.content
        if content is not self._content:
            with suppress(OSError):  # changed again just now: the next call takes it
                self._load()
                self._content = content

    def _load(self) -> None:
        if self._tls.ca is not None:
            self.context.load_verify_locations(self._tls.ca)
        if self._tls.cert is not None and self._tls.key is not None:
            self.context.load_cert_chain(self._tls.cert, self._tls.key, password=lambda: b"")


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
