"""Certificates for servers and clients under test, made by openssl."""

from __future__ import annotations

import subprocess
from pathlib import Path

from mulligan.common.access import ROLE_URI, AccessRole
from mulligan.common.tls import ClientTls

_MAKE = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]


def _make(key: Path, certificate: Path, *arguments: str) -> None:
    subprocess.run([*_MAKE, *arguments, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)


def write_key_pair(folder: Path) -> tuple[Path, Path]:
    """A private key, and a certificate for 127.0.0.1 signed with it."""
    key = folder / "key.pem"
    certificate = folder / "certificate.pem"
    _make(key, certificate, "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1")
    return key, certificate


class Authority:
    """An authority. `ca` is its certificate."""

    def __init__(self, folder: Path, name: str):
        self._folder = folder / name
        self._folder.mkdir(parents=True)
        self._key = self._folder / "ca.key"
        self.ca = self._folder / "ca.pem"
        _make(self._key, self.ca, "-subj", f"/CN={name}")

    def issue(self, name: str, *names: str) -> tuple[Path, Path]:
        """A private key, and a certificate with these subject alternative names, such as `DNS:env` and
        `IP:127.0.0.1`."""
        key = self._folder / f"{name}.key"
        certificate = self._folder / f"{name}.pem"
        signed = ["-CA", str(self.ca), "-CAkey", str(self._key), "-subj", f"/CN={name}"]
        _make(key, certificate, *signed, *(["-addext", f"subjectAltName={','.join(names)}"] if names else []))
        return key, certificate

    def client(self, role: AccessRole | None, name: str = "") -> ClientTls:
        """A client with a certificate of this authority, which gives it the role. `name` is that of the server."""
        key, certificate = self.issue(f"client-{role}", *([f"URI:{ROLE_URI}{role}"] if role else []))
        return ClientTls(self.ca, name, certificate, key)
