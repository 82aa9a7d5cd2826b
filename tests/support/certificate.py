"""Certificates for servers and clients under test, made as `mulligan certs` makes them."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from mulligan.common import certificates
from mulligan.common.access import ROLE_URI, AccessRole
from mulligan.common.tls import ClientTls


class Authority:
    """An authority. `ca` is its certificate."""

    def __init__(self, folder: Path, name: str):
        self._folder = folder / name
        self._folder.mkdir(parents=True)
        self._made = certificates.Authority.make(datetime.now(UTC))
        self.ca = self._folder / "ca.crt"
        self.ca.write_bytes(certificates.certificate_pem(self._made.certificate))

    def issue(self, name: str, *names: str) -> tuple[Path, Path]:
        """A private key, and a certificate with these subject alternative names, such as `env` and `127.0.0.1`."""
        key = self._folder / f"{name}.key"
        certificate = self._folder / f"{name}.pem"
        pem = self._made.issue(name, names, datetime.now(UTC), days=2)
        key.write_bytes(pem[0])
        certificate.write_bytes(pem[1])
        return key, certificate

    def client(self, role: AccessRole | None, name: str = "") -> ClientTls:
        """A client with a certificate of this authority, which gives it the role. `name` is that of the server."""
        key, certificate = self.issue(f"client-{role}", *([f"{ROLE_URI}{role}"] if role else []))
        return ClientTls(self.ca, name, certificate, key)
