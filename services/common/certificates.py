"""A private authority, and the certificates that it gives to services and to their callers (docs/security.md).

    FOLDER/authority/current.pem      the key and the certificate of the authority that signs
    FOLDER/authority/next.pem         of the one that will replace it, while that happens
    FOLDER/authority/previous.pem     the certificate of the one before, which is still trusted
    FOLDER/services/NAME/             tls.crt and tls.key of a service, ca.crt with the authorities to trust
    FOLDER/clients/ROLE/              the same of callers with this role
    FOLDER/services/trainer/run-keys.pem    the private key of credentials of runs; memory's has the public one

Each file is written by one rename. What is there and still good is kept, so that a run that was broken off is made
complete by another one.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from mulligan.common import files
from mulligan.common.access import ROLE_URI, AccessRole
from mulligan.common.config import SERVICES
from mulligan.common.file_lock import lock_file

AUTHORITY_DAYS = 3650
_SKEW = timedelta(minutes=5)  # a clock of another machine may be behind
_RENEWED = 1 / 3  # a certificate is made again when less of its time is left
_LABEL = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_HOST = re.compile(rf"(\*\.)?{_LABEL}(\.{_LABEL})*")


class BadCertificates(OSError):
    """A folder in which nothing was made: the message says what is wrong with it."""


class RotationStep(StrEnum):
    """How an authority is replaced while services run. After each step all get their files, before the next one."""

    TRUST = "trust"  # a new authority is trusted beside the old one
    ISSUE = "issue"  # all certificates are those of the new one
    RETIRE = "retire"  # the old one is not trusted any longer


def default_names(service: str) -> tuple[str, ...]:
    """Of a service in docker/compose.yaml, in docker/kubernetes, and on its own machine."""
    return (service, f"mulligan-{service}", "localhost", "127.0.0.1", "::1")


def general_name(name: str) -> x509.GeneralName:
    """Of a host name, an IP address or a URN. Raises ValueError for anything else."""
    if name.startswith("urn:"):
        return x509.UniformResourceIdentifier(name)
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        if len(name) > 253 or not _HOST.fullmatch(name):
            raise ValueError(f"{name!r} is no host name and no IP address") from None
        return x509.DNSName(name)


@dataclass(frozen=True, slots=True)
class Authority:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def make(cls, now: datetime) -> Authority:
        key = ec.generate_private_key(ec.SECP256R1())
        # Its own name, so that two authorities are never taken for one another.
        name = _common_name(f"Mulligan authority {secrets.token_hex(4)}")
        usage = x509.KeyUsage(
            key_cert_sign=True,
            crl_sign=True,
            digital_signature=False,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            encipher_only=False,
            decipher_only=False,
        )
        made = (
            _builder(name, name, key, now - _SKEW, now + timedelta(days=AUTHORITY_DAYS))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .sign(key, hashes.SHA256())
        )
        return cls(made, key)

    @classmethod
    def read(cls, path: Path) -> Authority:
        """Raises BadCertificates."""
        try:
            content = path.read_bytes()
            key = serialization.load_pem_private_key(content, None)
            found = x509.load_pem_x509_certificate(content)
        except (OSError, ValueError) as error:
            raise BadCertificates(f"{path}: expected the key and the certificate of an authority: {error}") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != found.public_key():
            raise BadCertificates(f"{path}: the key is not that of the certificate")
        return cls(found, key)

    @property
    def pem(self) -> bytes:
        return _key_pem(self.key) + certificate_pem(self.certificate)

    def issue(self, name: str, names: Sequence[str], now: datetime, days: int) -> tuple[bytes, bytes]:
        """The key and the certificate, in PEM, of a server with these names, or of a caller whose only name is a
        role's. It ends with the authority at the latest. Raises ValueError for names that cannot be."""
        key = ec.generate_private_key(ec.SECP256R1())
        ends = min(now + timedelta(days=days), self.certificate.not_valid_after_utc)
        server = any(not each.startswith("urn:") for each in names)
        usage = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
        builder = (
            _builder(_common_name(name), self.certificate.subject, key, now - _SKEW, ends)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(x509.SubjectAlternativeName([general_name(each) for each in names]), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()),
                critical=False,
            )
        )
        return _key_pem(key), certificate_pem(builder.sign(self.key, hashes.SHA256()))

    def issued(self, certificate: x509.Certificate) -> bool:
        try:
            certificate.verify_directly_issued_by(self.certificate)
        except (ValueError, TypeError, InvalidSignature):
            return False
        return True


@dataclass(frozen=True)
class Certificates:
    """The files of a folder. `names`: further ones of services, beside the default ones. With `group` the files but
    those of the authority can be read by their group, too. `others` are host names of other servers, such as a
    collector of traces; they are remembered by their folders, `others/NAME`."""

    folder: Path
    names: Mapping[str, Sequence[str]] = field(default_factory=dict)
    days: int = 365
    group: bool = False
    others: Sequence[str] = ()
    now: datetime = field(default_factory=lambda: datetime.now(UTC))

    def update(self, step: RotationStep | None = None) -> list[str]:
        """Makes what is missing, is about to expire, or has too few names. Before that, takes a step of a rotation,
        which changes nothing if it was taken already. Returns the folders whose certificate was made, as
        `services/env`.

        Raises BadCertificates where the authority cannot be used, another process is at work, or a step comes too
        early, and OSError where the folder cannot be written.
        """
        with self._locked():
            current = self._authority()
            match step:
                case RotationStep.TRUST:
                    self._trust()
                case RotationStep.ISSUE:
                    current = self._issue(current)
                case RotationStep.RETIRE:
                    self._retire(current)
                case None:
                    pass
            if current.certificate.not_valid_after_utc <= self.now and not self._next.exists():
                ended = f"{current.certificate.not_valid_after_utc:%Y-%m-%d}"
                raise BadCertificates(f"{self._current}: the authority ended on {ended}: replace it, with --rotate")
            self._spread_trust(current)
            self._make_run_keys()
            return self._certify(current)

    def ends(self) -> dict[str, datetime]:
        """When each certificate ends, by folder; that of the authority is `authority`."""
        found = {name: self._read(self.folder / name) for name in self._wanted()}
        ends = {name: pair[0].not_valid_after_utc for name, pair in found.items() if pair is not None}
        return ends | {"authority": Authority.read(self._current).certificate.not_valid_after_utc}

    # The authority

    @property
    def _current(self) -> Path:
        return self.folder / "authority" / "current.pem"

    @property
    def _next(self) -> Path:
        return self.folder / "authority" / "next.pem"

    @property
    def _previous(self) -> Path:
        return self.folder / "authority" / "previous.pem"

    def _authority(self) -> Authority:
        if not self._current.exists():
            orphans = [name for name in self._wanted() if (self.folder / name / "tls.crt").exists()]
            if orphans:  # a new authority would be trusted by nobody who has the old files
                raise BadCertificates(
                    f"{self._current}: missing, but {orphans[0]} has a certificate: put it back, or begin with an "
                    "empty folder"
                )
            files.replace(self._current, Authority.make(self.now).pem, 0o600)
        return Authority.read(self._current)

    def _trust(self) -> None:
        if self._previous.exists():
            raise BadCertificates("--rotate trust: the rotation before is not complete: --rotate retire comes first")
        if not self._next.exists():
            files.replace(self._next, Authority.make(self.now).pem, 0o600)

    def _issue(self, current: Authority) -> Authority:
        if self._next.exists():
            Authority.read(self._next)
            files.replace(self._previous, certificate_pem(current.certificate), 0o600)  # its key is not needed
            files.move(self._next, self._current)
        elif not self._previous.exists():
            raise BadCertificates("--rotate issue: there is no new authority: --rotate trust comes first")
        return Authority.read(self._current)

    def _retire(self, current: Authority) -> None:
        if self._next.exists():
            raise BadCertificates("--rotate retire: the new authority signs nothing yet: --rotate issue comes first")
        found = {name: self._read(self.folder / name) for name in self._wanted()}
        if old := [name for name, pair in found.items() if pair is None or not current.issued(pair[0])]:
            raise BadCertificates(
                f"--rotate retire: {old[0]} has none of the new authority: --rotate issue comes first"
            )
        self._previous.unlink(missing_ok=True)

    def _spread_trust(self, current: Authority) -> None:
        trusted = [current.certificate]
        for path in (self._next, self._previous):
            if path.exists():
                trusted += x509.load_pem_x509_certificates(path.read_bytes())
        content = b"".join(certificate_pem(each) for each in trusted)
        for name in self._wanted():
            path = self.folder / name / "ca.crt"
            if not path.exists() or path.read_bytes() != content:
                files.make_folder(path.parent)
                files.replace(path, content, 0o600)
            self._set_mode(path)

    def _make_run_keys(self) -> None:
        """A private key for the trainer, if it has none; its public one for the memory service, before others that are
        there. Raises BadCertificates for a file without a private key."""
        private, public = (self.folder / "services" / name / "run-keys.pem" for name in ("trainer", "memory"))
        if not private.exists():
            made = Ed25519PrivateKey.generate()
            key = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
            files.replace(private, made.private_bytes(*key), 0o600)
        try:
            signing = serialization.load_pem_private_key(private.read_bytes(), None)
        except ValueError as error:
            raise BadCertificates(f"{private}: expected a private key first: {error}") from error
        form = (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        wanted = signing.public_key().public_bytes(*form)
        known = public.read_bytes() if public.exists() else b""
        if wanted not in known:
            files.replace(public, wanted + known, 0o600)
        self._set_mode(private, public)

    # Certificates

    def _wanted(self) -> dict[str, tuple[str, ...]]:
        """By folder, the names that a certificate has at least."""
        services = {f"services/{each}": (*default_names(each), *self.names.get(each, ())) for each in SERVICES}
        others = sorted({*self.others, *(path.name for path in (self.folder / "others").glob("*"))})
        wanted = services | {f"others/{name}": (name,) for name in others}
        wanted |= {f"clients/{role}": (f"{ROLE_URI}{role}",) for role in AccessRole}
        return {folder: tuple(str(general_name(each).value) for each in names) for folder, names in wanted.items()}

    def _certify(self, current: Authority) -> list[str]:
        if current.certificate.not_valid_after_utc <= self.now:
            return []
        made = []
        for name, wanted in self._wanted().items():
            folder = self.folder / name
            pair = self._read(folder)
            present = () if pair is None else _names_of(pair[0])
            names = [*dict.fromkeys((*wanted, *present))]
            if pair is None or not self._is_good(pair, current) or len(names) > len(present):
                key, certificate = current.issue(name.rpartition("/")[2], names, self.now, self.days)
                files.replace(folder / "tls.key", key, 0o600)
                files.replace(folder / "tls.crt", certificate, 0o600)
                made.append(name)
            self._set_mode(folder / "tls.key", folder / "tls.crt")
        return made

    def _read(self, folder: Path) -> tuple[x509.Certificate, object] | None:
        """The certificate and the public key of the private one; None where one is missing or damaged."""
        try:
            certificate = x509.load_pem_x509_certificate((folder / "tls.crt").read_bytes())
            key = serialization.load_pem_private_key((folder / "tls.key").read_bytes(), None)
            _names_of(certificate)
        except (FileNotFoundError, ValueError):
            return None
        return certificate, key.public_key()

    def _is_good(self, pair: tuple[x509.Certificate, object], current: Authority) -> bool:
        certificate, public_key = pair
        begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        lasts = begins <= self.now and ends - self.now > (ends - begins) * _RENEWED
        return lasts and certificate.public_key() == public_key and current.issued(certificate)

    def _set_mode(self, *paths: Path) -> None:
        for path in paths:
            path.chmod(0o640 if self.group else 0o600)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        for name in ("authority", *self._wanted()):
            folder = self.folder / name
            if not folder.exists():
                files.make_folder(folder)
                folder.chmod(0o750 if self.group and name != "authority" else 0o700)
        try:
            lock = lock_file(self.folder / "authority" / ".lock")
        except BlockingIOError as error:
            raise BadCertificates(f"{self.folder}: another process makes certificates there") from error
        with lock:
            yield


def certificate_pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _common_name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, begins: datetime, ends: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(ends)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _names_of(certificate: x509.Certificate) -> tuple[str, ...]:
    """Raises ValueError for a damaged certificate."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    return tuple(str(each.value) for each in found)
