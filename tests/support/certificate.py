"""Certificates for servers on loopback."""

from __future__ import annotations

import subprocess
from pathlib import Path


def write_key_pair(folder: Path) -> tuple[Path, Path]:
    """A private key, and a certificate for 127.0.0.1 signed with it."""
    key = folder / "key.pem"
    certificate = folder / "certificate.pem"
    make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    make += ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
    subprocess.run([*make, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    return key, certificate
