"""Certificates: their dates, their names, who issued them, and who may read their keys."""

from __future__ import annotations

import asyncio
import importlib.util
import ipaddress
import os
import ssl
import stat
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509

from mulligan.cli.connection import TLS
from mulligan.cli.doctor.finding import Finding, Topic
from mulligan.common.tls import ClientTls

_SOON = timedelta(days=14)
_RENEW = "Renew it with `mulligan certs FOLDER`, or with what issued it; services read new files while they run."
_SECONDS = 3.0
# https://docs.openssl.org/3.0/man1/openssl-verification-options/
_UNKNOWN_ISSUER = (2, 18, 19, 20, 21)
_OTHER_NAME = (62, 64)


@dataclass(frozen=True, slots=True)
class Handshake:
    """What came of TLS with a server. `certificate` is what it showed; `error` is why no connection came about.
    `ended`: the server ended the connection at once, instead of the first frame of HTTP/2."""

    certificate: x509.Certificate | None = None
    error: BaseException | None = None
    ended: bool = False

    @property
    def speaks_tls(self) -> bool:
        return self.certificate is not None


def judge_dates(topic: Topic, begins: datetime, ends: datetime, now: datetime) -> Finding:
    """Of a certificate. It ends soon if that is in 14 days, or in a fifth of its life if that is less."""
    if now < begins:
        return topic.problem(
            f"The certificate is good from {_time(begins)}, and the clock here says {_time(now)}.",
            "Set the clock of this machine, and that of the machine that issued the certificate, or wait.",
        )
    if now >= ends:
        return topic.problem(f"The certificate expired at {_time(ends)}; the clock here says {_time(now)}.", _RENEW)
    if ends - now < min(_SOON, (ends - begins) / 5):
        return topic.warning(f"The certificate expires soon, at {_time(ends)}.", _RENEW)
    return topic.ok(f"The certificate is good until {_time(ends)}.")


def judge_mode(topic: Topic, path: Path, mode: int) -> Finding:
    """Of a file with a secret. Its group may read it: `mulligan certs --group` makes such files."""
    if mode & 0o037:
        return topic.problem(
            f"Other users may use {path}, a secret (mode {stat.S_IMODE(mode):o}).", f"Run `chmod go-rwx {path}`."
        )
    return topic.ok(f"Other users cannot read {path}.")


def check_key_files(paths: Iterable[Path]) -> list[Finding]:
    """Files with private keys and tokens."""
    found = []
    for path in dict.fromkeys(paths):
        topic = Topic("permissions", path.name)
        try:
            found.append(judge_mode(topic, path, path.stat().st_mode))
        except OSError as error:
            found.append(topic.problem(f"{path}: {error.strerror}.", "Correct the setting that names this file."))
    return found


def check_certificate_files(paths: Iterable[Path], now: datetime) -> list[Finding]:
    found = []
    for path in dict.fromkeys(paths):
        topic = Topic("certificate", path.name)
        try:
            certificates = x509.load_pem_x509_certificates(path.read_bytes())
        except (OSError, ValueError) as error:
            said = f"{path} cannot be read as certificates in PEM: {error}."
            found.append(topic.problem(said, "Correct the setting that names this file, or make the file again."))
            continue
        found += [judge_dates(topic, one.not_valid_before_utc, one.not_valid_after_utc, now) for one in certificates]
    return found


async def shake_hands(host: str, port: int, tls: ClientTls | None) -> Handshake:
    """Begins TLS without looking at the certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return await _handshake(context, host, port, tls)


async def _handshake(context: ssl.SSLContext, host: str, port: int, tls: ClientTls | None) -> Handshake:
    context.set_alpn_protocols(["h2"])
    if tls is not None and tls.cert is not None and tls.key is not None:
        context.load_cert_chain(tls.cert, tls.key, password=lambda: b"")
    name = (tls.name if tls is not None else "") or host
    try:
        async with asyncio.timeout(_SECONDS):
            reader, writer = await asyncio.open_connection(host, port, ssl=context, server_hostname=name)
    except (OSError, TimeoutError) as error:  # errors of TLS are of this kind
        return Handshake(error=error)
    shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    certificate = x509.load_der_x509_certificate(shown)
    refused: BaseException | None = None
    ended = False
    try:  # with TLS 1.3 a server that asks for a certificate refuses only now
        async with asyncio.timeout(_SECONDS):
            ended = not await reader.read(1)
    except TimeoutError:
        pass
    except ssl.SSLError as error:
        refused = error
    except OSError as error:
        refused, ended = error, True
    finally:
        writer.close()
        with suppress(OSError, TimeoutError):
            async with asyncio.timeout(1.0):
                await writer.wait_closed()
    return Handshake(certificate, refused, ended)


async def check_certificate(
    service: str, host: str, port: int, tls: ClientTls, shown: Handshake, now: datetime
) -> list[Finding]:
    """The dates, the name and the issuer of the certificate that a server showed."""
    topic = Topic("certificate", service)
    certificate = shown.certificate
    assert certificate is not None, "TLS came about"
    dates = judge_dates(topic, certificate.not_valid_before_utc, certificate.not_valid_after_utc, now)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        _trust(context, tls.ca)
    except OSError as error:
        return [dates, topic.problem(f"{TLS}_CA: {error}.", "Name a PEM file with certificates of authorities.")]
    verified = await _handshake(context, host, port, tls)
    others = _refusals(topic, certificate, tls.name or host, verified.error, tls.ca)
    return [dates, *others]


def _trust(context: ssl.SSLContext, ca: Path | None) -> None:
    """Trusts the same authorities as gRPC: those of the file, or those that it brings."""
    if ca is not None:
        context.load_verify_locations(ca)
        return
    found = importlib.util.find_spec("grpc")
    own = Path(found.origin or "").parent / "_cython/_credentials/roots.pem" if found is not None else Path()
    chosen = Path(os.environ.get("GRPC_DEFAULT_SSL_ROOTS_FILE_PATH", own))
    if chosen.is_file():
        context.load_verify_locations(chosen)
    else:
        context.load_default_certs()


def _refusals(
    topic: Topic, certificate: x509.Certificate, name: str, error: BaseException | None, ca: Path | None
) -> list[Finding]:
    found = []
    code = error.verify_code if isinstance(error, ssl.SSLCertVerificationError) else 0
    if code in _UNKNOWN_ISSUER:
        trusted = str(ca) if ca is not None else "gRPC's own authorities"
        said = f"An authority issued the certificate that is not among {trusted}: {_issuer(certificate)}."
        found.append(topic.problem(said, f"Let {TLS}_CA name the PEM file with the certificate of that authority."))
    names = names_of(certificate)
    if code in _OTHER_NAME or not has_name(names, name):
        said = f"The certificate is for {', '.join(names) or 'no name'}, not for {name}."
        found.append(
            topic.problem(
                said, f"Call the service by such a name, let {TLS}_NAME name one, or issue a certificate for {name}."
            )
        )
    elif code and code not in (*_UNKNOWN_ISSUER, 9, 10):  # 9 and 10 are about dates
        said = f"The certificate is refused: {getattr(error, 'verify_message', error)}."
        found.append(topic.problem(said, "Make it again with `mulligan certs FOLDER`, or with what issued it."))
    return found


def names_of(certificate: x509.Certificate) -> Sequence[str]:
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return ()
    return [str(one.value) for one in found]


def has_name(names: Iterable[str], name: str) -> bool:
    """Whether one of a certificate's names is this one. `*.example.com` is a name of `a.example.com`."""
    wanted = name.strip("[]").rstrip(".").lower()
    with suppress(ValueError):
        address = ipaddress.ip_address(wanted)
        return str(address) in names
    _, dot, parent = wanted.partition(".")
    known = {one.lower() for one in names}
    return wanted in known or (bool(dot) and f"*.{parent}" in known)


def client_key_files(tls: ClientTls | None, token: Path | None) -> list[Path]:
    return [path for path in (tls.key if tls is not None else None, token) if path is not None]


def wants_certificate(handshake: Handshake) -> bool:
    """Whether the server refused because it was shown no certificate, or one that it does not know. With TLS 1.3 gRPC's
    servers only end the connection then."""
    said = str(handshake.error).upper()
    return handshake.ended or (
        isinstance(handshake.error, ssl.SSLError) and "CERTIFICATE" in said and "VERIFY" not in said
    )


def _issuer(certificate: x509.Certificate) -> str:
    return certificate.issuer.rfc4514_string() or "one without a name"


def _time(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
