"""Files of keys that sign and verify the credentials of runs."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat


def private_pem(key: Ed25519PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def public_pem(key: Ed25519PrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def write_keys(folder: Path) -> tuple[Path, Path]:
    """The files of a new private key and of its public one, as `openssl` writes them."""
    key = Ed25519PrivateKey.generate()
    private, public = folder / "run-keys.pem", folder / "run-keys-public.pem"
    private.write_bytes(private_pem(key))
    public.write_bytes(public_pem(key))
    return private, public
